"""`unicomp export`: another on-disk layout of the same codes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicomp import size
from unicomp.cli import method_options, show
from unicomp.cli.options import Json, Model, Overwrite, Quiet
from unicomp.cli.plan import unnumbered

if TYPE_CHECKING:
    from unicomp.recipes.publish.export import Exported

FORMATS = sorted(
    path.stem.replace("_", "-") for path in (method_options.ROOT / "kernels/exports").glob("*.py")
)


def _complete(incomplete: str) -> list[str]:
    return [name for name in FORMATS if name.startswith(incomplete)]


Format = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="|".join(FORMATS),
        help="Layout to write; `gguf` is one file, the others folders.",
        autocompletion=_complete,
    ),
]
Path_ = Annotated[
    Path, typer.Option("--out", metavar="PATH", help="The folder, or the `.gguf` file, to make.")
]
Type = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="gguf: f16, q8_0, q4_0, tq2_0 or tq1_0; gptq: v1 or v2; bitnet: autobitlinear or "
        "bitlinear. Default: what holds the codes exactly in the fewest bytes; plain weights are "
        "rounded only where a type is given.",
        show_default=False,
    ),
]


def export(
    model: Model,
    format: Format,
    out: Path_,
    type_: Type = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the codes of a quantized model in another layout.

    They go over exactly where it has room for them. What is stored otherwise is said with its
    reason; a linear that cannot be stored refuses the whole.

    Example: unicomp export builtin:tinyworld --format gguf --type q8_0 --out tinyworld.gguf
    """
    from unicomp.recipes.publish.export import export as carry_out

    done = carry_out(model, format, out, kind=type_, overwrite=overwrite)
    if json:
        show.json(done.to_json())
    else:
        _show(done)


def _show(done: "Exported") -> None:
    from unicomp.recipes.lint.rules import refused

    groups: dict[tuple[str, str, str, str], int] = {}
    for name, verdict in done.verdicts.items():
        key = (unnumbered(name), verdict.stored, verdict.kind, verdict.why or "")
        groups[key] = groups.get(key, 0) + 1
    rows = [(name, str(count), *rest) for (name, *rest), count in groups.items()]
    show.table(
        f"{done.source.id} as {done.format}", ("linears", "count", "stored", "codes", "why"), rows
    )
    show.text("")
    show.facts([("written", f"{done.path}, {size.show(done.bytes)}")])
    for note in (*refused(done.loaders), *done.notes):
        show.text(f"note: {note}")

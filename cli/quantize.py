"""`unicomp quantize`: one stage of a recipe, from the command line alone."""

from typing import Annotated, Any

import typer

from unicomp.cli import method_options, stage
from unicomp.cli.groups import grouped
from unicomp.cli.options import Model
from unicomp.cli.work import Work

VERB = "quantize"


def _formats(incomplete: str) -> list[str]:
    folder = method_options.ROOT / "kernels/formats"
    names = sorted(path.stem.replace("_", "-") for path in folder.glob("[!_]*.py"))
    return [name for name in names if name.startswith(incomplete)]


Method = Annotated[
    str,
    stage.method(VERB, "How codes are found; `gptq` needs `--calibration`. Default: gptq."),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="|".join(_formats("")),
        help="Layout on disk. Default: compressed-tensors.",
        autocompletion=_formats,
    ),
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="LOADER",
        help="A loader that must take the result, as `transformers` or `vllm==0.33`. Repeatable.",
    ),
]


@grouped
@method_options.accept(stage.options(VERB), before="format")
def quantize(
    model: Model,
    work: Work,
    method: Method = "gptq",
    format: Format = None,
    target: Target = None,
    **words: Any,
) -> None:
    """Quantize a model's linear layers; transformers loads the result.

    Every option is the key of the same name in a recipe; DIR/recipe.yaml has them all. Example:
    unicomp quantize builtin:tinyworld --out out/w4 --calibration builtin:tinyworld
    """
    stage.run_stage(
        VERB,
        method,
        words,
        work,
        model=model,
        format=format,
        target=target or None,
    )

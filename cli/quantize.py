"""`unicomp quantize`: one stage of a recipe, from the command line alone."""

from typing import Annotated, Any

import typer

from unicomp.cli import method_options
from unicomp.cli.options import (
    Device,
    DryRun,
    Json,
    MaxMemory,
    Model,
    Out,
    Overwrite,
    Quiet,
    Resume,
)
from unicomp.cli.plan import show_plan
from unicomp.cli.run import carry_out, require

VERB = "quantize"
METHOD = method_options.of_verb(VERB)
CALIBRATION = method_options.of_class(method_options.ROOT / "recipes/schema.py", "Calibration")


def _methods(incomplete: str) -> list[str]:
    from unicomp.compress.methods import methods

    return [name for name in methods(VERB) if name.startswith(incomplete)]


def _formats(incomplete: str) -> list[str]:
    folder = method_options.ROOT / "kernels/formats"
    names = sorted(path.stem.replace("_", "-") for path in folder.glob("[!_]*.py"))
    return [name for name in names if name.startswith(incomplete)]


Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="|".join(method_options.methods(VERB)),
        help="How codes are found; `gptq` needs `--calibration`. Default: gptq.",
        autocompletion=_methods,
        show_default=False,
    ),
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


@method_options.accept([*METHOD, *CALIBRATION], before="format")
def quantize(
    model: Model,
    out: Out = None,
    method: Method = "gptq",
    format: Format = None,
    target: Target = None,
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    resume: Resume = True,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Quantize the linear layers of a model and write a checkpoint that transformers loads.

    Every option is the key of the same name in a recipe; DIR/recipe.yaml has them all. Example:
    unicomp quantize builtin:tinyworld --out out/w4 --calibration builtin:tinyworld
    """
    require(out, device, dry_run)
    from unicomp.recipes.load import from_options
    from unicomp.recipes.plan import plan

    recipe = from_options(
        VERB,
        method,
        method_options.given(METHOD, options),
        model=model,
        calibration=method_options.given(CALIBRATION, options) or None,
        format=format,
        target=target or None,
    )
    found = plan(recipe, max_memory=max_memory)
    if out is None or dry_run:
        show_plan(found, json)
    else:
        carry_out(found, out, overwrite=overwrite, resume=resume, json=json)

"""`unicomp prune`: one stage of a recipe, from the command line alone."""

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
from unicomp.cli.quantize import CALIBRATION
from unicomp.cli.run import carry_out, require

VERB = "prune"
METHOD = method_options.of_verb(VERB)


def _methods(incomplete: str) -> list[str]:
    from unicomp.compress.methods import methods

    return [name for name in methods(VERB) if name.startswith(incomplete)]


Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="|".join(method_options.methods(VERB)),
        help="How zeros are chosen; all but `magnitude` need `--calibration`. Default: sparsegpt.",
        autocompletion=_methods,
        show_default=False,
    ),
]


@method_options.accept([*METHOD, *CALIBRATION], before="max_memory")
def prune(
    model: Model,
    out: Out = None,
    method: Method = "sparsegpt",
    max_memory: MaxMemory = None,
    device: Device = "cpu",
    resume: Resume = True,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    **options: Any,
) -> None:
    """Make weights of the linear layers zero; shapes, bytes and speed stay as they are.

    Every option is the key of the same name in a recipe; DIR/recipe.yaml has them all. Example:
    unicomp prune builtin:tinyworld --out out/sparse --sparsity 2:4 --calibration builtin:tinyworld
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
    )
    found = plan(recipe, max_memory=max_memory)
    if out is None or dry_run:
        show_plan(found, json)
    else:
        carry_out(found, out, overwrite=overwrite, resume=resume, json=json)

"""`unicomp prune`: one stage of a recipe, from the command line alone."""

from typing import Annotated, Any

from unicomp.cli import method_options, stage
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

VERB = "prune"

Method = Annotated[
    str,
    stage.method(
        VERB,
        "What goes: `magnitude`, `wanda`, `sparsegpt` make zeros in shapes that stay; `width`, "
        "`depth`, `heads`, `experts` make shapes smaller. All but `magnitude` need "
        "`--calibration`. Default: sparsegpt.",
    ),
]


@method_options.accept(stage.options(VERB), before="max_memory")
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
    **words: Any,
) -> None:
    """Make weights zero, where shapes, bytes and speed stay; or make the model's shapes smaller.

    Every option is the key of the same name in a recipe; DIR/recipe.yaml has them all. Example:
    unicomp prune builtin:tinyworld --out out/sparse --sparsity 2:4 --calibration builtin:tinyworld
    """
    stage.run_stage(
        VERB,
        method,
        words,
        model=model,
        out=out,
        max_memory=max_memory,
        device=device,
        resume=resume,
        overwrite=overwrite,
        dry_run=dry_run,
        json=json,
    )

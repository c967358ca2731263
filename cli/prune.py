"""`unicomp prune`: one stage of a recipe, from the command line alone."""

from typing import Annotated, Any

from unicomp.cli import method_options, stage
from unicomp.cli.groups import grouped
from unicomp.cli.options import Model
from unicomp.cli.work import Work

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


@grouped
@method_options.accept(stage.options(VERB))
def prune(
    model: Model,
    work: Work,
    method: Method = "sparsegpt",
    **words: Any,
) -> None:
    """Make weights zero, or a model's shapes smaller.

    Where weights become zero, shapes, bytes and speed stay. Every option is the key of the same
    name in a recipe; DIR/recipe.yaml has them all. Example:
    unicomp prune builtin:tinyworld --out out/sparse --sparsity 2:4 --calibration builtin:tinyworld
    """
    stage.run_stage(
        VERB,
        method,
        words,
        work,
        model=model,
    )

"""What all processes but the first do in a run that a launcher started several of.

They plan, so that whatever is refused is refused by all, and then wait for the first: it carries
out every pass, and tells them when a pass trains and on which folder.
"""

from dataclasses import replace
from pathlib import Path

from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill.training.together import hear
from unicomp.kernels.dense import open_dense
from unicomp.recipes.distill.plan import DistillPlan, plan_distill
from unicomp.recipes.distill.run import train_beside
from unicomp.recipes.layers.plan import Plan
from unicomp.recipes.pipeline.plan import Pipeline


def follow(plan: Plan | Pipeline) -> None:
    """Train along with the first process until it has done all.

    Raises UnicompError where it ends before that.
    """
    passes = plan.passes if isinstance(plan, Pipeline) else ()
    trains = {one.sha256: one for one in passes if isinstance(one, DistillPlan)}
    while (told := hear()) is not None:
        own = trains[told["plan"]]
        source = replace(own.source, folder=Path(told["source"]))
        checkpoint = Checkpoint.open(source.folder)
        dense = open_dense(checkpoint)
        planned = plan_distill(
            own.recipe, None, source, checkpoint, dense, None, original=plan.source
        )
        train_beside(planned, Path(told["folder"]), told["rows"])

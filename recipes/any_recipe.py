"""`unicomp.plan` and `unicomp.run`: a recipe of any kind, a delta's included.

A delta is no checkpoint, so its plan and its manifest are types of their own: what only handles
models calls those of `pipeline/`, and need not tell them apart. What carries out is imported when
something is carried out.
"""

from pathlib import Path
from typing import TYPE_CHECKING, overload

from unicomp.compress.method import DeltaMethod
from unicomp.kernels.delta_folder import DeltaManifest
from unicomp.manifest import Manifest
from unicomp.recipes.delta.plan import DeltaPlan, plan_recipe
from unicomp.recipes.layers.plan import Plan
from unicomp.recipes.pipeline import plan as pipeline
from unicomp.recipes.pipeline.plan import Pipeline
from unicomp.recipes.schema import Recipe

if TYPE_CHECKING:
    from unicomp.recipes.stage.progress import Show


def plan(
    recipe: Recipe,
    *,
    model: str | None = None,
    text: str | None = None,
    max_memory: int | None = None,
) -> Plan | Pipeline | DeltaPlan:
    """Work out what a recipe does to a model, from headers only.

    As `pipeline/plan.py`, or `delta/plan.py` where there is a `delta` stage.
    """
    if any(isinstance(stage.options, DeltaMethod) for stage in recipe.stages):
        return plan_recipe(recipe, model=model, text=text, max_memory=max_memory)
    return pipeline.plan(recipe, model=model, text=text, max_memory=max_memory)


@overload
def run(
    plan: Plan | Pipeline,
    out: Path,
    *,
    overwrite: bool = ...,
    resume: bool = ...,
    progress: "Show" = ...,
) -> Manifest: ...


@overload
def run(
    plan: DeltaPlan,
    out: Path,
    *,
    overwrite: bool = ...,
    resume: bool = ...,
    progress: "Show" = ...,
) -> DeltaManifest: ...


def run(
    plan: Plan | Pipeline | DeltaPlan,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: "Show" = lambda _: None,
) -> Manifest | DeltaManifest:
    """Carry out a plan; the output stands under its name only when whole.

    As `pipeline/run.py`, or `delta/run.py` where the plan is a delta's.
    """
    from unicomp.recipes.delta import run as delta_run
    from unicomp.recipes.pipeline import run as pipeline_run

    if isinstance(plan, DeltaPlan):
        return delta_run.compress(plan, out, overwrite=overwrite, resume=resume, progress=progress)
    return pipeline_run.run(plan, out, overwrite=overwrite, resume=resume, progress=progress)

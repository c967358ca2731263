"""A recipe's stages in order, each on what the one before it made; the last one is published.

Stages that go together are one pass over the model (`recipes.plan.fuse`); structured pruning is a
pass of its own. Later passes are planned on the names and shapes that the earlier ones will leave,
so that what cannot be carried out is said before any work. The passes' folders lie in the working
folder, each with its own journal; the working folder's says which passes are done, so that an
interrupted run goes on in the pass, and in the layer, where it stopped. Only the last folder is
scored, against the source, and has a manifest of all stages.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from unicomp import __version__, machine, manifest
from unicomp.checkpoint import Checkpoint
from unicomp.compress.cut_method import CutMethod
from unicomp.compress.distill_method import DistillMethod
from unicomp.compress.method import QuantizeMethod
from unicomp.errors import UnsupportedError
from unicomp.evaluate.cost.gain import Gain, beside
from unicomp.hub import Source
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.manifest import Manifest
from unicomp.recipes import card
from unicomp.recipes import plan as plans
from unicomp.recipes import run as runs
from unicomp.recipes.cut_run import run_cut
from unicomp.recipes.cutting import CutPlan, plan_cut
from unicomp.recipes.distill_run import figures_of, run_distill
from unicomp.recipes.distilling import DistillPlan, plan_distill
from unicomp.recipes.forecast import IMPORTS
from unicomp.recipes.journal import FOLDER as JOURNAL
from unicomp.recipes.journal import Journal
from unicomp.recipes.plan import Plan, working_folder
from unicomp.recipes.prepare import check_whole, make_folder, score_output
from unicomp.recipes.run import Progress, Show
from unicomp.recipes.schema import Recipe, Stage
from unicomp.writer import check_target, publish, write_file

Pass = Plan | CutPlan | DistillPlan
ALONE = (CutMethod, DistillMethod)  # what is always a pipeline, if only of one pass
SPARE = 1.5  # what models take in memory to run, as a share of their tensors


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes over a model, one after another.

    text      recipe text as written, or as its defaults make it
    passes    their plans; but for the first one on what the one before will leave
    scored    axes that the result is scored on, against the source
    held_out  the text to score on; None: there is none
    """

    recipe: Recipe
    text: str
    source: Source
    passes: tuple[Pass, ...]
    max_memory: int | None
    scored: tuple[str, ...]
    held_out: str | None

    @property
    def stages(self) -> list[Stage]:
        """What is carried out, in order."""
        return [stage for one in self.passes for stage in one.stages]

    @property
    def params(self) -> int:
        """Parameters of the output."""
        return self.passes[-1].params

    @property
    def bytes_in(self) -> int:
        """Bytes of all tensors of the source."""
        return self.passes[0].bytes_in

    @property
    def bytes_out(self) -> int:
        """Bytes of all tensors of the output."""
        return self.passes[-1].bytes_out

    @property
    def peak_host_bytes(self) -> int:
        """The forecast of the process's greatest resident size."""
        return max(one.peak_host_bytes for one in self.passes)

    @property
    def disk_bytes(self) -> int:
        """Most that the run takes on disk: a pass, and what the one before it made."""
        before = [0, *(one.bytes_out for one in self.passes)]
        return max(one.disk_bytes + kept for one, kept in zip(self.passes, before, strict=False))

    @property
    def seconds(self) -> float:
        """The forecast of all passes together."""
        return sum(one.seconds for one in self.passes)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know, each thing once."""
        return tuple(dict.fromkeys(note for one in self.passes for note in one.notes))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values: of several passes, each under `passes`."""
        parts = [one.to_json() for one in self.passes]
        if len(parts) == 1:
            return parts[0]
        return {
            "schema": "unicomp.plan/1",
            "source": parts[0]["source"],
            "architecture": parts[0]["architecture"],
            "stages": [stage for part in parts for stage in part["stages"]],
            "format": self.recipe.format,
            "params": self.params,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "bits_per_weight": 8 * self.bytes_out / self.params,
            "peak_host_bytes": self.peak_host_bytes,
            "disk_bytes": self.disk_bytes,
            "seconds": self.seconds,
            "notes": list(self.notes),
            "passes": parts,
        }


def plan(
    recipe: Recipe,
    *,
    model: str | None = None,
    text: str | None = None,
    max_memory: int | None = None,
) -> Plan | Pipeline:
    """Work out what a recipe of any stages does to a model, from headers only.

    As `recipes.plan.plan`, to which it leaves a recipe that is one pass.

    Raises RecipeError or UnicompError where a stage cannot be carried out on what the ones before
    it leave, or not within `max_memory`.
    """
    passes = _passes(recipe)
    if len(passes) == 1 and not isinstance(passes[0][0].options, ALONE):
        return plans.plan(recipe, model=model, text=text, max_memory=max_memory)
    source = plans.find_source(recipe, model)
    checkpoint = Checkpoint.open(source.folder)
    dense = open_dense(checkpoint)
    made: list[Pass] = []
    for stages in passes:
        part = _part(recipe, stages, stages == passes[-1])
        one = _plan(part, source, dense, max_memory, source)
        made.append(one)
        dense = one.result() if isinstance(one, CutPlan) else replace(dense, notes=())
    scored, held_out = plans.what_is_scored(recipe, source)
    if recipe.gates:
        made[-1] = replace(made[-1], notes=(*made[-1].notes, plans.GATES))
    return Pipeline(
        recipe=recipe,
        text=recipe.dump() if text is None else text,
        source=source,
        passes=tuple(made),
        max_memory=max_memory,
        scored=scored,
        held_out=held_out,
    )


def _passes(recipe: Recipe) -> list[tuple[Stage, ...]]:
    """Put stages that go together into one pass; UnsupportedError for an order that makes none."""
    found: list[tuple[Stage, ...]] = []
    for stage in recipe.stages:
        trains = isinstance(stage.options, DistillMethod)
        if any(isinstance(s.options, QuantizeMethod) for p in found for s in p) and not trains:
            raise UnsupportedError(
                f"`{stage.verb}: {stage.method}` after `quantize` would undo it",
                hint="put `quantize` last, or only `distill` after it",
            )
        if found and len(found[-1]) == 1 and plans.fuse(found[-1][0], stage):
            found[-1] = (*found[-1], stage)
        else:
            found.append((stage,))
    return found


def _part(recipe: Recipe, stages: tuple[Stage, ...], last: bool) -> Recipe:
    """Return the recipe of one pass; scores and gates are the whole recipe's."""
    without: dict[str, Any] = {"stages": stages, "score": (), "gates": ()}
    return recipe.model_copy(update=without if last else without | {"target": ()})


def _plan(
    recipe: Recipe,
    source: Source,
    dense: DenseSource,
    max_memory: int | None,
    original: Source,
) -> Pass:
    if isinstance(recipe.stages[0].options, DistillMethod):
        return plan_distill(
            recipe, None, source, dense.checkpoint, dense, max_memory, original=original
        )
    make = plan_cut if isinstance(recipe.stages[0].options, CutMethod) else plans.plan_source
    return make(recipe, None, source, dense.checkpoint, dense, max_memory)


def run(
    plan: Plan | Pipeline,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: Show = lambda _: None,
) -> Manifest:
    """Carry out a plan; the output stands under its name only when whole.

    As `recipes.run.run`, to which it leaves a plan of one pass.

    Raises UnicompError for whatever the user can mend; what was done so far then stays in
    `<out>.partial`, unless nothing was.
    """
    if isinstance(plan, Plan):
        return runs.run(plan, out, overwrite=overwrite, resume=resume, progress=progress)
    check_target(out, overwrite=overwrite)
    folder = working_folder(out)
    fresh = make_folder(folder, resume=resume)
    hashes = plan.passes[0].checkpoint.sha256()
    with Journal(folder, _fingerprint(plan, hashes)) as journal:
        try:
            made = _carry_out(plan, journal, progress)
            last = journal.folder / str(len(plan.passes))
            found = _finish(plan, last, made, hashes, out.name, progress)
        except BaseException:
            if fresh and not _worked(journal):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        publish(last, out, overwrite=overwrite)
    shutil.rmtree(folder)
    return found


def _worked(journal: Journal) -> bool:
    """Tell whether there is anything to resume."""
    return bool(journal.entries) or any(path.is_dir() for path in journal.folder.iterdir())


def _fingerprint(plan: Pipeline, hashes: dict[str, str]) -> dict[str, Any]:
    return {
        "unicomp": __version__,
        "recipe": sha256(plan.text.encode()).hexdigest(),
        "plan": [one.sha256 for one in plan.passes],
        "source": sha256(repr(sorted(hashes.items())).encode()).hexdigest(),
        "torch": torch.__version__,
    }


def _carry_out(plan: Pipeline, journal: Journal, progress: Show) -> list[Manifest]:
    """Carry out the passes that are left; return the manifests of all."""
    made = [Manifest.model_validate(entry["made"]) for entry in journal.entries]
    for number, planned in enumerate(plan.passes):
        folder = journal.folder / str(number + 1)
        before = journal.folder / str(number)
        if number < len(made):
            continue
        if number:
            source = replace(plan.source, folder=before)
            checkpoint = Checkpoint.open(before)
            dense = open_dense(checkpoint)
            planned = _plan(planned.recipe, source, dense, plan.max_memory, plan.source)
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(planned, CutPlan):
            found = run_cut(planned, folder, progress=progress)
        elif isinstance(planned, DistillPlan):
            found = run_distill(planned, folder, progress=progress)
        else:
            found = runs.run(planned, folder, progress=progress)
        measured = _measures(plan, number)
        if measured is not None:
            figures = figures_of(measured, folder, progress)
            last = found.stages[-1].model_copy(update={"held_out": figures})
            found = found.model_copy(update={"stages": [*found.stages[:-1], last]})
        journal.append({"made": found.to_json()})
        made.append(found)
        shutil.rmtree(before, ignore_errors=True)
    return made


def _measures(plan: Pipeline, number: int) -> DistillPlan | None:
    """Return the training whose held-out text is to say what a pass cost.

    None where nothing trains, and where a training measures that anyhow: it, or the next pass.
    """
    trains = [one for one in plan.passes if isinstance(one, DistillPlan)]
    if not trains or any(isinstance(one, DistillPlan) for one in plan.passes[number : number + 2]):
        return None
    before = [one for one in plan.passes[:number] if isinstance(one, DistillPlan)]
    return before[-1] if before else trains[0]


def _finish(
    plan: Pipeline,
    folder: Path,
    made: Sequence[Manifest],
    hashes: dict[str, str],
    name: str,
    progress: Show,
) -> Manifest:
    """Let the last folder's manifest, recipe, scores and card speak of all passes."""
    first, last = made[0], made[-1]
    write_file(folder / "recipe.yaml", plan.text.encode())
    start = plan.passes[0]
    params = start.params_in if isinstance(start, CutPlan) else start.params
    totals = last.totals.model_copy(
        update={
            "bytes_in": first.totals.bytes_in,
            "params_in": None if params == last.totals.params else params,
        }
    )
    whole = last.model_copy(
        update={
            "source": first.source,
            "recipe_sha256": sha256(plan.text.encode()).hexdigest(),
            "calibration": next((one.calibration for one in made if one.calibration), None),
            "stages": [stage for one in made for stage in one.stages],
            "totals": totals,
            "files": manifest.hashes(folder),
            "seeds": {key: seed for one in made for key, seed in one.seeds.items()},
            "notes": list(plan.notes),
        }
    )
    manifest.write(folder, whole)

    def step(what: str, done: int, total: int) -> None:
        progress(Progress("score", done, total, what))

    report = score_output(folder, name, plan.source, plan.scored, plan.held_out, step)
    text = card.write(plan.passes[-1], whole, report, _gain(plan, folder, progress))
    write_file(folder / "README.md", text.encode())
    check_whole(folder)
    shutil.rmtree(folder / JOURNAL, ignore_errors=True)
    return whole


def _gain(plan: Pipeline, folder: Path, progress: Show) -> Gain | None:
    """Measure how much faster the result runs than its source; None where both do not fit."""
    both = IMPORTS + SPARE * (plan.bytes_in + plan.bytes_out)
    limit = plan.max_memory or (machine.describe()["memory_bytes"] or 0) // 2
    if both > limit or not any(isinstance(one, CutPlan) for one in plan.passes):
        return None

    def step(done: int, total: int) -> None:
        progress(Progress("speed", done, total, "the source and the result in turn"))

    return beside(folder, plan.source.folder, progress=step)

"""Carry out a recipe's passes in order, each on what the one before it made; publish the last.

The passes' folders lie in the working folder, each with its own journal; the working folder's says
which passes are done, so that an interrupted run goes on in the pass, and in the layer, where it
stopped. Only the last folder is scored, against the source, and has a manifest of all stages.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from unicomp import __version__, machine, manifest, processes
from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill.training.together import tell
from unicomp.evaluate.cost.gain import Gain, beside
from unicomp.kernels.dense import open_dense
from unicomp.manifest import Manifest
from unicomp.recipes.cut.plan import CutPlan
from unicomp.recipes.cut.run import run_cut
from unicomp.recipes.distill.plan import DistillPlan
from unicomp.recipes.distill.run import figures_of, run_distill
from unicomp.recipes.layers import run as runs
from unicomp.recipes.layers.plan import Plan
from unicomp.recipes.pipeline.following import follow
from unicomp.recipes.pipeline.plan import Pipeline, plan_pass
from unicomp.recipes.publish import card
from unicomp.recipes.stage.journal import FOLDER as JOURNAL
from unicomp.recipes.stage.journal import Journal
from unicomp.recipes.stage.prepare import check_whole, make_folder, score_output, working_folder
from unicomp.recipes.stage.progress import Progress, Show
from unicomp.writer import check_target, publish, write_file


def run(
    plan: Plan | Pipeline,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: Show = lambda _: None,
    began: float | None = None,
) -> Manifest:
    """Carry out a plan; the output stands under its name only when whole.

    As `recipes.run.run`, to which it leaves a plan of one pass. Of several processes the first does
    it; the others join where a pass trains, and return when all is done. Forecast and actual cost
    are put side by side into the manifest.

    began  when the command began, by `time.monotonic`; default: now

    Raises UnicompError for whatever the user can mend; what was done so far then stays in
    `<out>.partial`, unless nothing was.
    """
    if not processes.first():
        follow(plan)
        return manifest.read(out)
    began = time.monotonic() if began is None else began
    resumed = resume and working_folder(out).exists()
    if isinstance(plan, Plan):
        made = runs.run(plan, out, overwrite=overwrite, resume=resume, progress=progress)
    else:
        made = _run(plan, out, overwrite=overwrite, resume=resume, progress=progress)
    tell(None)
    made = made.model_copy(update={"cost": _cost(plan, made, None if resumed else began)})
    manifest.write(out, made)
    return made


def _cost(plan: Plan | Pipeline, made: Manifest, began: float | None) -> manifest.Cost:
    """Return what was forecast beside what it came to; of a resumed run no whole time is known."""
    peak = max(machine.peak_rss_bytes(), *(stage.peak_rss_bytes for stage in made.stages))
    return manifest.Cost(
        forecast=manifest.Spent(seconds=plan.seconds, peak_rss_bytes=plan.peak_host_bytes),
        actual=manifest.Spent(
            seconds=None if began is None else time.monotonic() - began, peak_rss_bytes=peak
        ),
    )


def _run(plan: Pipeline, out: Path, *, overwrite: bool, resume: bool, progress: Show) -> Manifest:
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
            planned = plan_pass(planned.recipe, source, dense, plan.max_memory, plan.source)
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
            "notes": list(dict.fromkeys([*plan.notes, *(n for one in made for n in one.notes)])),
        }
    )
    manifest.write(folder, whole)

    def step(what: str, done: int, total: int) -> None:
        progress(Progress("score", done, total, what))

    gates = plan.recipe.gates
    report = score_output(folder, name, plan.source, plan.scored, plan.held_out, step, gates)
    text = card.write(plan.output(), whole, report, _gain(plan, folder, progress))
    write_file(folder / "README.md", text.encode())
    check_whole(folder)
    shutil.rmtree(folder / JOURNAL, ignore_errors=True)
    return whole


def _gain(plan: Pipeline, folder: Path, progress: Show) -> Gain | None:
    """Measure how much faster the result runs than its source; None where both do not fit."""
    if plan.comparison() is None:
        return None

    def step(done: int, total: int) -> None:
        progress(Progress("speed", done, total, "the source and the result in turn"))

    return beside(folder, plan.source.folder, progress=step)

"""What every run does around its work: the text, its folder, checks, what lies beside the weights.

A run works in a folder of its own, `Workplace`, which becomes the output only when whole.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicomp import __version__, manifest, mixture, text
from unicomp.compress.calibrate import Decoder
from unicomp.errors import CheckpointError, UnicompError
from unicomp.evaluate import scores
from unicomp.evaluate.score import score
from unicomp.evaluate.scores import Subject
from unicomp.evaluate.verdicts.gates import decide
from unicomp.hub import Source
from unicomp.recipes.gate_file import to_gates
from unicomp.recipes.schema import Gate
from unicomp.recipes.stage.journal import FOLDER as JOURNAL
from unicomp.recipes.stage.journal import Journal
from unicomp.recipes.stage.planned import Planned
from unicomp.recipes.stage.progress import Progress, Show
from unicomp.writer import Writer, check_target, copy_file, publish, write_file

PIECE = 1 << 24  # elements of a tensor that stays as it is, copied at once


@dataclass(slots=True)
class CalibrationWindows:
    """The calibration windows and what the manifest says of them."""

    ids: Tensor
    record: manifest.Calibration


def read_calibration(plan: Planned) -> CalibrationWindows | None:
    """Return the windows of the recipe's text; None where the method needs none."""
    wanted = plan.recipe.calibration
    if not plan.method.wants() or wanted is None:
        return None
    tokenizer = text.tokenizer(plan.source.folder)
    vocab = plan.dense.config.get("vocab_size")
    windows, described = mixture.windows(
        wanted.data,
        tokenizer,
        vocab=int(vocab) if vocab else None,
        field=wanted.field,
        samples=wanted.samples,
        seq_len=wanted.length,
        seed=wanted.seed,
    )
    return CalibrationWindows(windows, described)


def fingerprint(
    plan: Planned, hashes: dict[str, str], calibration: CalibrationWindows | None
) -> dict[str, Any]:
    """Return what decides the output's bytes; two runs with one fingerprint may share work."""
    ids = b"" if calibration is None else calibration.ids.numpy().tobytes()
    return {
        "unicomp": __version__,
        "plan": plan.sha256,
        "recipe": sha256(plan.text.encode()).hexdigest(),
        "source": sha256(repr(sorted(hashes.items())).encode()).hexdigest(),
        "calibration": sha256(ids).hexdigest(),
        "batch": plan.batch,
        "torch": torch.__version__,
    }


def check_values(plan: Planned) -> None:
    """Refuse NaN and Inf before hours of work, not when their layer's turn comes."""
    problems = list(manifest.wrong_values(plan.checkpoint))
    if problems:
        more = f" (and {len(problems) - 1} more tensors)" if len(problems) > 1 else ""
        raise CheckpointError(
            problems[0] + more,
            hint="the checkpoint is damaged or was trained to divergence; "
            "download it again, or use an earlier one",
        )


def check_space(plan: Planned, folder: Path) -> None:
    """Refuse a disk that the run would fill; what it holds of the run already counts as free."""
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if plan.disk_bytes > free + held:
        raise UnicompError(
            f"`{folder.parent}` has {free} bytes free, the run needs {plan.disk_bytes - held}",
            hint="free some space, or choose an output folder on another disk",
        )


def score_output(
    folder: Path,
    name: str,
    source: Source,
    axes: tuple[str, ...],
    held_out: str | None,
    show: Callable[[str, int, int], None],
    gates: Sequence[Gate] = (),
) -> dict[str, Any] | None:
    """Score a finished folder against its source on some axes; write `report.json`.

    name      what the report calls it
    axes      where there are none but gates, efficiency, which needs no text: gates on anything
              else then stay open
    held_out  the text for axes that read one
    show      called with what is measured, units done, and units in all
    gates     the recipe's; the report has their verdicts
    """
    if not axes and not gates:
        return None

    axes = axes or ("efficiency",)
    show(", ".join(axes), 0, 0)
    report = score(folder, source.folder, axes=axes, text=held_out, progress=show)
    baseline = Subject(id=source.id, revision=source.revision)
    report = report.model_copy(update={"model": Subject(id=name), "baseline": baseline})
    verdicts = [verdict.to_json() for verdict in decide(report, to_gates(gates))]
    report = report.model_copy(update={"gates": verdicts})
    scores.write(folder / "report.json", report)
    return report.to_json()


def begin(out: Path, notes: Iterable[str], *, overwrite: bool, progress: Show) -> Path:
    """Refuse an output that stands in the way, say what the user must know; return where to work.

    Raises UnicompError where `out` exists and is not to be overwritten.
    """
    check_target(out, overwrite=overwrite)
    for note in notes:
        progress(Progress("prepare", 0, 0, "plan", note=note))
    return working_folder(out)


def make_folder(folder: Path, *, resume: bool) -> bool:
    """Make a run's working folder where there is none; return whether it was made.

    resume  what an interrupted run left stays; False: it is thrown away

    Raises UnicompError where it cannot be made.
    """
    if not resume and folder.exists():
        shutil.rmtree(folder)
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnicompError(
            f"cannot make `{folder}`: {error.strerror}", hint="choose another output folder"
        ) from error
    return made


@dataclass(slots=True)
class Workplace:
    """Where a run works.

    begun  there is something to resume: the folder stays whatever happens
    """

    folder: Path
    journal: Journal
    begun: bool = False


@contextmanager
def workplace(
    plan: Planned,
    folder: Path,
    out: Path,
    mark: dict[str, Any],
    *,
    overwrite: bool,
    resume: bool,
) -> Iterator[Workplace]:
    """Hold a run's folder and journal; afterwards the folder has its final name.

    A folder that was made for the run, and in which nothing has begun, goes where it fails.

    mark  what decides the output's bytes: `fingerprint`, and what the run reads besides

    Raises UnicompError where the folder cannot be made, is another run's, or the disk is too small.
    """
    made, begun = make_folder(folder, resume=resume), False
    try:
        with Journal(folder, mark) as journal:
            check_space(plan, folder)
            place = Workplace(folder, journal)
            try:
                yield place
            finally:
                begun = place.begun
    except BaseException:
        if made and not begun:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    publish(folder, out, overwrite=overwrite)
    shutil.rmtree(out / JOURNAL)


def learn(decoder: Decoder, ids: Tensor) -> None:
    """Let a decoder learn how layers are called, where the embedded text is there already.

    ids  int64 [windows, seq_len], the calibration text; a batch of each size that it makes is read
    """
    last = len(ids) % decoder.batch
    for some in (ids[: decoder.batch], ids[-last:] if last else ids[:0]):
        if len(some):
            for _ in decoder.embed(some):
                pass


def copy_tensor(
    writer: Writer, name: str, shape: Sequence[int], read: Callable[[slice | None], Tensor]
) -> None:
    """Write a tensor as it is, in pieces.

    read  returns some of its rows; None: all
    """
    rows, size = shape[0] if shape else 1, math.prod(shape)
    step = max(1, rows * PIECE // max(size, 1)) if len(shape) > 1 else rows
    if step >= rows:
        writer.write(name, read(None))
        return
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        writer.write(name, read(part), part)


def write_beside(plan: Planned, folder: Path, config: Mapping[str, Any]) -> None:
    """Write what lies beside the weights: the source's other files, the config, the recipe."""
    for name in plan.checkpoint.companions():
        if name not in ("config.json", plan.checkpoint.index):
            copy_file(plan.source.folder / name, folder / name)
    write_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    write_file(folder / "recipe.yaml", plan.text.encode())


def check_whole(folder: Path) -> None:
    """Read a finished folder again; RuntimeError where it is not what its manifest says."""
    problems = manifest.verify(folder)
    if problems:
        raise RuntimeError("the finished folder is not what was made: " + "; ".join(problems))


def working_folder(out: Path) -> Path:
    """Return where a run works before its output has its final name."""
    return Path(os.path.abspath(out)).with_name(out.name + ".partial")

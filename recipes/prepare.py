"""What every run does around its work: the text, checks of values and disk, the scores."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from unicomp import __version__, manifest, mixture, text
from unicomp.checkpoint import Checkpoint
from unicomp.compress.method import Method
from unicomp.errors import CheckpointError, UnicompError
from unicomp.evaluate import scores
from unicomp.evaluate.score import score
from unicomp.evaluate.scores import Subject
from unicomp.hub import Source
from unicomp.kernels.dense import DenseSource
from unicomp.recipes.schema import Recipe


class Planned(Protocol):
    """What every plan of one pass over the model says."""

    @property
    def recipe(self) -> Recipe:
        """What was asked, its calibration settled."""

    @property
    def text(self) -> str:
        """The recipe as written."""

    @property
    def source(self) -> Source:
        """Where the model comes from."""

    @property
    def dense(self) -> DenseSource:
        """Its plain weights."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Its files."""

    @property
    def method(self) -> Method:
        """The method that gathers statistics."""

    @property
    def batch(self) -> int:
        """Calibration windows computed together."""

    @property
    def disk_bytes(self) -> int:
        """Most that the run takes on disk, in bytes."""

    @property
    def sha256(self) -> str:
        """Hash of what will be done."""


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
) -> dict[str, Any] | None:
    """Score a finished folder against its source on some axes; write `report.json`.

    name      what the report calls it
    held_out  the text for axes that read one
    show      called with what is measured, units done, and units in all
    """
    if not axes:
        return None

    show(", ".join(axes), 0, 0)
    report = score(folder, source.folder, axes=axes, text=held_out, progress=show)
    baseline = Subject(id=source.id, revision=source.revision)
    report = report.model_copy(update={"model": Subject(id=name), "baseline": baseline})
    scores.write(folder / "report.json", report)
    return report.to_json()


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

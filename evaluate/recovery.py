"""What a compressed fine-tune keeps of what fine-tuning gained, task by task.

    recovery = (compressed - base) / (tuned - base)

of each score that fine-tuning changed. Its plain mean hides the worst task, and may be above what
any task keeps where one is above 1: so the worst is named, and the mean is also given with each
task clipped to 0 and 1.

Paper: D-QRELO, arXiv:2604.16940, section 4.1, whose `Drop` is 1 minus the plain mean.
"""

from dataclasses import asdict, dataclass
from typing import Any

from unicomp.errors import UnicompError
from unicomp.evaluate.scores import Report, Score

AXES = ("accuracy", "safety")  # what is about tasks; other axes are about the model or the machine


@dataclass(frozen=True, slots=True)
class Task:
    """One score of the three models; `recovery` is 1 where all of the gain is kept.

    clear  fine-tuning changed the score by more than its 95% intervals explain
    """

    name: str
    base: float
    tuned: float
    compressed: float
    recovery: float
    clear: bool


@dataclass(frozen=True, slots=True)
class Recovery:
    """All tasks, worst first, and what is to be said of them together.

    mean     of all
    clipped  mean of each brought to 0..1
    """

    tasks: tuple[Task, ...]
    mean: float
    clipped: float

    @property
    def worst(self) -> Task:
        """The task of least recovery."""
        return self.tasks[0]

    def to_json(self) -> dict[str, Any]:
        """Return it for a JSON result."""
        return {
            "schema": "unicomp.recovery/1",
            "worst": self.worst.name,
            "mean": self.mean,
            "clipped_mean": self.clipped,
            "tasks": [asdict(task) for task in self.tasks],
        }


def recovery(base: Report, tuned: Report, compressed: Report) -> Recovery:
    """Return what the compressed model keeps; scores that not all three have are left out.

    Raises UnicompError where no score was changed by fine-tuning.
    """
    found = []
    others = [{own.name: own for own in report.scores} for report in (base, compressed)]
    for score in tuned.scores:
        low, kept = (scores.get(score.name) for scores in others)
        if low is None or kept is None or score.axis not in AXES:
            continue
        if score.value is None or low.value is None or kept.value is None:
            continue
        gain = score.value - low.value
        if gain == 0:
            continue
        share = (kept.value - low.value) / gain
        clear = abs(gain) > _half(score) + _half(low)
        found.append(Task(score.name, low.value, score.value, kept.value, share, clear))
    if not found:
        raise UnicompError(
            "no task's score is in all three reports and differs between base and fine-tune",
            hint="score the three models on the same `--tasks` or `--text`",
        )
    found.sort(key=lambda task: task.recovery)
    shares = [task.recovery for task in found]
    clipped = [min(max(share, 0.0), 1.0) for share in shares]
    count = len(found)
    return Recovery(tuple(found), sum(shares) / count, sum(clipped) / count)


def _half(score: Score) -> float:
    """Return half the width of a score's interval, 0 where it has none."""
    return 0.0 if score.ci95 is None else (score.ci95[1] - score.ci95[0]) / 2

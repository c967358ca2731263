"""What each stage of a recipe cost in divergence, and what each training won back.

All of it is from the manifest, of text that a training held out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unicomp.manifest import Stage


@dataclass(frozen=True, slots=True)
class Cost:
    """How far a model is from its teacher at one place of a recipe.

    after  the stages since the last place, or `the student` where there is none before
    kl     KL to the teacher, nats a token
    won    the share of the divergence that this training took away; None: it is no training
    """

    after: str
    kl: float
    won: float | None = None

    @property
    def less(self) -> str:
        """Return what a training won, in words that follow a value; nothing for other stages."""
        return "" if self.won is None else f", {self.won:.0%} less"


def costs(stages: Sequence[Stage]) -> list[Cost]:
    """Return every place of a recipe at which the divergence was measured, in order."""
    found: list[Cost] = []
    before: list[str] = []
    for place, stage in enumerate(stages, start=1):
        name = f"{place}. {stage.verb} {stage.method}"
        if stage.training is None:
            before.append(name)
            if stage.held_out is not None:
                found.append(Cost(", ".join(before), stage.held_out["kl"]))
                before = []
            continue
        start, end = stage.training.before["kl"], stage.training.after["kl"]
        if before or not found:
            found.append(Cost(", ".join(before) or "the student", start))
        found.append(Cost(name, end, 1 - end / start if start else 0.0))
        before = []
    return found

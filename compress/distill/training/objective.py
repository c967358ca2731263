"""The loss of a step: sums over the positions and windows of a part of its batch.

Sums are divided by the positions and windows of the whole batch, so that a batch may be shared
out over processes and steps of accumulation in any way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unicomp.compress.distill.losses.divergence import cross_entropy, divergence
from unicomp.compress.distill.losses.few import divergence_few
from unicomp.compress.distill.losses.matching import matching, pairs
from unicomp.compress.distill.losses.overconfidence import confidence_gap
from unicomp.compress.distill.losses.safety import safety_term
from unicomp.compress.distill.training.states import ATTENTION, HIDDEN, States, watch
from unicomp.compress.distill.training.teacher import Signal
from unicomp.compress.distill_method import DistillMethod


class Trainee(nn.Module):
    """The student with what is trained beside it: maps to the teacher's width."""

    def __init__(self, model: PreTrainedModel, method: DistillMethod, teacher: int | None) -> None:
        """Wrap a student; teacher: width of the teacher's states, None where none are compared."""
        super().__init__()
        self.model = model
        self.wanted = tuple(w for w in (HIDDEN, ATTENTION) if getattr(method, w))
        width = int(model.config.get_text_config().hidden_size)
        self.maps = nn.ModuleDict()
        if teacher is not None and teacher != width:
            for word in self.wanted:
                one = nn.Linear(width, teacher, bias=False)
                nn.init.eye_(one.weight)  # no draw: equal runs begin equally
                self.maps[word] = one

    def forward(self, ids: Tensor) -> tuple[Tensor, States]:
        """Return logits, floating [windows, tokens, vocab], and the states that are compared."""
        with watch(self.model, self.wanted) as seen:
            logits = self.model(ids, use_cache=False).logits
        return logits, seen


@dataclass(frozen=True, slots=True)
class Loss:
    """Sums over some of a batch: what is descended on, and what is shown.

    total       with its gradient, already divided by the whole batch's positions and windows
    divergence  sum over positions, without gradient
    """

    total: Tensor
    divergence: float


def objective(
    method: DistillMethod,
    trainee: nn.Module,
    signal: Signal,
    ids: Tensor,
    counted: Tensor,
    *,
    positions: int,
    windows: int,
    maps: nn.ModuleDict,
    tokens: Tensor | None = None,
    beta: float | None = None,
) -> Loss:
    """Return the loss of some windows.

    trainee    a `Trainee`, perhaps wrapped
    ids        int64 [windows, tokens]
    counted    bool [windows, tokens - 1]
    positions  that count in the whole batch; `windows` of it
    tokens     int64, those of refusals, where `safety` weighs them
    beta       of the divergence, where the student wrote the windows itself: its own tokens are no
               truth, so cross-entropy and the calibration term then stay out
    """
    whole, seen = trainee(ids)
    logits, targets = whole[:, :-1], ids[:, 1:]
    heat, kind = method.temperature, method.beta if beta is None else beta
    if signal.few is not None:
        apart = divergence_few(logits, *signal.few, beta=kind, temperature=heat)
    elif signal.logits is not None:
        apart = divergence(logits, signal.logits, beta=kind, temperature=heat)
    else:
        raise ValueError("a signal without logits")
    each = apart
    if method.cross_entropy and beta is None:
        own = cross_entropy(logits, targets)
        each = (1 - method.cross_entropy) * apart + method.cross_entropy * own
    if tokens is not None and signal.logits is not None:
        each = each + method.safety * safety_term(logits, signal.logits, tokens)
    if signal.states is not None:
        for word in (HIDDEN, ATTENTION):
            weight = getattr(method, word)
            if weight:
                to_teacher = maps[word] if word in maps else None  # noqa: SIM401 - a ModuleDict has no get
                each = each + weight * _matched(
                    getattr(seen, word), getattr(signal.states, word), to_teacher
                )
    total = torch.where(counted, each, 0.0).sum() / positions
    if method.calibration_term and beta is None:
        gap = confidence_gap(logits, targets, counted).sum() / windows
        total = total + method.calibration_term * gap
    shown = float(torch.where(counted, apart.detach(), 0.0).sum(dtype=torch.float64))
    return Loss(total, shown)


def _matched(student: list[Tensor], teacher: list[Tensor], to_teacher: nn.Module | None) -> Tensor:
    """Return the mean over layers of their difference, float [windows, tokens - 1]."""
    if to_teacher is not None and not isinstance(to_teacher, nn.Linear):
        raise TypeError("a map is linear")
    places = pairs(len(student), len(teacher))
    found = [matching(student[i], teacher[j], to_teacher) for i, j in places]
    return torch.stack(found).mean(0)[:, :-1]

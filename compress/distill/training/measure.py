"""Held-out text through a student and its teacher: the figures, and the temperature at the end."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unicomp import metrics
from unicomp.compress.distill.losses.divergence import between
from unicomp.compress.distill.losses.few import divergence_few
from unicomp.compress.distill.training.figures import (
    Figures,
    Tally,
    Temperature,
    entropy,
    fit_temperature,
)
from unicomp.compress.distill.training.teacher import Signal, Teacher
from unicomp.compress.distill.training.windows import Windows


@torch.no_grad()
def measure(model: PreTrainedModel, windows: Windows, teacher: Teacher, batch: int) -> Figures:
    """Return the figures of a student on windows that it is not trained on.

    batch  windows at once
    """
    tally = Tally()
    for rows, logits in _logits(model, windows, batch):
        signal = teacher.held_out(rows, windows.ids[rows])
        for place, row in enumerate(rows.tolist()):
            counted = windows.counted[row]
            if not counted.any():
                continue
            log_q = metrics.log_probabilities(logits[place][counted])
            apart, spread = _beside(signal, place, counted, logits, log_q)
            tally.add(log_q, windows.ids[row, 1:][counted], apart, spread)
    return tally.figures()


@torch.no_grad()
def temperature(model: PreTrainedModel, windows: Windows, batch: int) -> Temperature | None:
    """Fit one temperature on every second window, judged on the others; see `fit_temperature`."""

    def parts() -> Iterator[tuple[Tensor, Tensor]]:
        for rows, logits in _logits(model, windows, batch):
            for place, row in enumerate(rows.tolist()):
                counted = windows.counted[row]
                if counted.any():
                    yield logits[place][counted].float(), windows.ids[row, 1:][counted]

    return fit_temperature(parts())


def _logits(
    model: PreTrainedModel, windows: Windows, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (rows, logits before each next token) in evaluation mode."""
    training = model.training
    model.eval()
    try:
        for rows in torch.arange(len(windows)).split(batch):
            yield rows, model(windows.ids[rows], use_cache=False).logits[:, :-1]
    finally:
        model.train(training)


def _beside(
    signal: Signal, place: int, counted: Tensor, logits: Tensor, log_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Return KL(teacher || student) and the teacher's entropy at the counted positions."""
    if signal.logits is not None:
        log_p = metrics.log_probabilities(signal.logits[place][counted])
        return between(log_p, log_q, beta=0), entropy(log_p)
    if signal.few is None or signal.entropy is None:
        raise ValueError("a signal without logits")
    log_p, ids = (part[place][counted] for part in signal.few)
    own = logits[place][counted]
    apart = divergence_few(own, log_p, ids, beta=0, temperature=1)
    return apart, signal.entropy[place][counted]

"""The pure definitions of calibration: is a model as often right as it says it is?

Everything starts from predictions: the confidence of the choice taken, whether it was right, and
per prediction the negative log-likelihood, the Brier score and the entropy. Values do not depend on
the order of predictions: among equal confidences, right and wrong ones are spread evenly.

Papers: ECE, Guo et al., arXiv:1706.04599, here with 10 bins [0, .1), ..., [.9, 1]; bins of equal
mass (adaptive ECE), Nguyen and O'Connor, arXiv:1508.05154; the Brier score over all classes, Brier
1950, from 0 to 2; AURC, Geifman and El-Yaniv, arXiv:1805.08206; temperature, Guo et al.
Differs: nothing is said of ECE without its interval; see `error_interval`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unicomp.evaluate.scores import Interval
from unicomp.evaluate.statistics.proportions import z_value

BINS = 10
DRAWS = 4000  # of normal values, for a quantile


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model predicted, float64 [predictions] each.

    confidence  probability of the choice taken
    right       1 where that choice was right, else 0
    nll         of the right choice, nats
    brier       sum over choices of (probability - (1 if right else 0)) squared
    entropy     nats
    unit        int64, which predictions belong together, from 0: a document, a window of text
    """

    confidence: Tensor
    right: Tensor
    nll: Tensor
    brier: Tensor
    entropy: Tensor
    unit: Tensor

    @property
    def units(self) -> int:
        """How many units there are."""
        return int(self.unit.max()) + 1 if self.unit.numel() else 0

    def per_unit(self, values: Tensor) -> Tensor:
        """Return the mean of values over the predictions of each unit, float64 [units]."""
        sums = torch.zeros(self.units, dtype=torch.float64).index_add(0, self.unit, values.double())
        return sums / torch.bincount(self.unit, minlength=self.units)


def predict(log_probabilities: Sequence[Tensor], gold: Tensor) -> Predictions:
    """Return the predictions of documents with choices, each a unit of its own.

    log_probabilities  per document [choices], normalized
    gold               int64 [documents]
    """
    rows = []
    for log_p, answer in zip(log_probabilities, gold.tolist(), strict=True):
        p = log_p.double().exp()
        entropy = -torch.where(p > 0, p * log_p, 0.0).sum()
        target = torch.zeros_like(p)
        target[answer] = 1
        taken = int(p.argmax())
        rows.append([p[taken], taken == answer, -log_p[answer], ((p - target) ** 2).sum(), entropy])
    values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
    confidence, right, nll, brier, entropy = values.unbind(1)
    return Predictions(confidence, right, nll, brier, entropy, torch.arange(len(rows)))


def equal_width(confidence: Tensor) -> Tensor:
    """Return the bin of each prediction, int64: [0, .1) is 0, and 1 belongs to the last."""
    return (confidence * BINS).long().clamp(0, BINS - 1)


def equal_mass(confidence: Tensor) -> Tensor:
    """Return the bin of each prediction, int64: as many predictions in each as can be."""
    n = confidence.numel()
    rank = torch.empty(n, dtype=torch.int64)
    rank[confidence.argsort(stable=True)] = torch.arange(n)
    return rank * BINS // max(1, n)


def spread_ties(confidence: Tensor, right: Tensor) -> Tensor:
    """Return for each prediction how often those of its confidence are right."""
    _, group = confidence.unique(return_inverse=True)
    counts = torch.bincount(group).double()
    return (torch.zeros_like(counts).index_add(0, group, right.double()) / counts)[group]


def calibration_error(confidence: Tensor, right: Tensor, bins: Tensor) -> float:
    """Return the mean over predictions of |confidence - accuracy| of their bin."""
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, confidence - right)
    return float(gaps.abs().sum()) / confidence.numel()


def ece(found: Predictions) -> float:
    """Return the expected calibration error over bins of equal width."""
    return calibration_error(found.confidence, found.right, equal_width(found.confidence))


def ace(found: Predictions) -> float:
    """Return the calibration error over bins of equal mass."""
    right = spread_ties(found.confidence, found.right)
    return calibration_error(found.confidence, right, equal_mass(found.confidence))


def aurc(confidence: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the area under the risk-coverage curve: the mean error over every coverage.

    Answering only the k surest predictions makes an error; it is averaged over k = 1 to n. Lower
    is better; it is 0 where all are right.

    weights  [draws, predictions], how often each was drawn; None: once

    float64 [draws].
    """
    order = confidence.argsort(descending=True, stable=True)
    _, block = torch.unique_consecutive(confidence[order], return_inverse=True)
    counts = torch.ones(1, order.numel()) if weights is None else weights[:, order]
    counts = counts.double()
    room = torch.zeros(counts.shape[0], int(block[-1]) + 1, dtype=torch.float64)
    size = room.index_add(1, block, counts)
    wrong = room.index_add(1, block, counts * (1 - right.double())[order])
    after, errors = size.cumsum(1), wrong.cumsum(1)
    before = after - size
    # Within a block of t equals after a others, errors grow evenly, from E by e: the sum over j of
    # (E + e j / t) / (a + j) is e + (E - e a / t) (H(a + t) - H(a)), H the harmonic numbers.
    start = errors - wrong - wrong * before / size.clamp(min=1)
    harmonic = torch.digamma(after + 1) - torch.digamma(before + 1)
    return (wrong + start * harmonic).sum(1) / after[:, -1]


def diagram(found: Predictions) -> list[dict[str, Any]]:
    """Return the bars of a reliability diagram: count, mean confidence and accuracy of each bin."""
    bins = equal_width(found.confidence)
    bars = []
    for place in range(BINS):
        inside = bins == place
        count = int(inside.sum())
        bars.append(
            {
                "low": place / BINS,
                "high": (place + 1) / BINS,
                "count": count,
                "confidence": float(found.confidence[inside].mean()) if count else None,
                "accuracy": float(found.right[inside].mean()) if count else None,
            }
        )
    return bars


def error_interval(
    found: Predictions, bins: Tensor, value: float, confidence: float = 0.95
) -> Interval:
    """Return the interval of a calibration error; it covers at least as often as it says.

    The error T sums |gap + noise| over bins, so that noise alone lifts it and resampling lifts it
    twice: bootstrap intervals of a calibrated model never hold its true error, 0. But |g + e| - |g|
    is at most |e|, whatever g: so T less the quantile of the sum of |e| is a lower bound. And it is
    at least e or -e, by the sign of g: so T plus the normal half-width is an upper bound.
    """
    deviation = torch.tensor(_deviations(found, bins), dtype=torch.float64)
    z = z_value(confidence)
    draw = torch.randn(DRAWS, BINS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lift = (draw.abs() @ deviation).quantile((1 + confidence) / 2)
    half = z * float(deviation.square().sum().sqrt())
    return max(0.0, value - float(lift)), min(1.0, value + half)


def _deviations(found: Predictions, bins: Tensor) -> list[float]:
    """Return the standard error of each bin's part of the calibration error.

    From the spread over units; where a bin has few, or all are right, at least that of a share with
    one more right and one more wrong.
    """
    gaps = torch.zeros(found.units, BINS, dtype=torch.float64)
    gaps.index_put_((found.unit, bins), found.confidence - found.right, accumulate=True)
    n, units = found.confidence.numel(), found.units
    variance = gaps.var(0, correction=1) * units if units > 1 else torch.zeros(BINS)
    result = []
    for place in range(BINS):
        inside = bins == place
        count = int(inside.sum())
        right = (float(found.right[inside].sum()) + 1) / (count + 2)
        least = count * right * (1 - right)
        result.append(math.sqrt(max(float(variance[place]), least)) / n)
    return result


def influence(found: Predictions, bins: Tensor) -> Tensor:
    """Return how much each unit moves a calibration error, up to a factor: float64 [units]."""
    gap = found.confidence - found.right
    sums = torch.zeros(BINS, dtype=torch.float64).index_add(0, bins, gap)
    moved = torch.zeros(found.units, dtype=torch.float64)
    return moved.index_add(0, found.unit, gap * sums.sign()[bins])


def apart(
    ours: float, mine: Interval, theirs: float, other: Interval, correlation: float
) -> Interval:
    """Return the interval of ours - theirs from the intervals of both (MOVER).

    Paper: Zou and Donner 2008, Statistics in Medicine 27, with the correlation of the two.
    """

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a + b * b - 2 * correlation * a * b))

    low = reach(ours - mine[0], other[1] - theirs)
    high = reach(mine[1] - ours, theirs - other[0])
    return ours - theirs - low, ours - theirs + high

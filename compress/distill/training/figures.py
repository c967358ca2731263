"""What held-out text says of a student beside its teacher: how right, how sure, how far off.

A student may win in likelihood and lose in honesty: on-policy training with a KL makes students
over-confident. So every run measures, at each next token of text that it never trains on, the
negative log-likelihood, the Brier score, the share of right first choices, the expected
calibration error over ten equal bins of confidence, the signed gap between mean confidence and that
share, and the entropy as a share of the teacher's. At the end one temperature is fitted on every
second window, and what it does for the likelihood is measured on the others.

Paper: why these, and the signed gap, arXiv:2604.16830, section 4; temperature, arXiv:1706.04599.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from unicomp import metrics

BINS = 10
WARN_GAP = 0.05  # above it a student is said to be over-confident
COLDEST, HOTTEST = 0.25, 4.0  # temperatures that are looked at
ROUNDS = 40  # of the golden section: the interval falls to 1e-8 of itself
MOST = 1 << 27  # elements of logits that are kept for the temperature


@dataclass(frozen=True, slots=True)
class Figures:
    """Means over the counted positions of held-out text; nats and shares.

    tokens         positions
    gap            mean confidence less the share of right first choices; positive: too sure
    entropy        of the student; `teacher_entropy` of the teacher
    kl             KL(teacher || student); of a stored teacher, on its tokens and the tail
    """

    tokens: int
    nll: float
    brier: float
    accuracy: float
    confidence: float
    gap: float
    ece: float
    entropy: float
    teacher_entropy: float
    kl: float

    @property
    def entropy_ratio(self) -> float:
        """The student's entropy as a share of the teacher's."""
        return self.entropy / self.teacher_entropy if self.teacher_entropy else math.nan

    def to_json(self) -> dict[str, Any]:
        """Return all of it for a record."""
        return asdict(self) | {"entropy_ratio": self.entropy_ratio}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Figures":
        """Return what `to_json` wrote."""
        return cls(**{name: value for name, value in data.items() if name != "entropy_ratio"})


class Tally:
    """Sums over positions, from which figures are made."""

    def __init__(self) -> None:
        self.sums = dict.fromkeys(
            ("tokens", "nll", "brier", "right", "sure", "entropy", "teacher", "kl"), 0.0
        )
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)  # positions, confidence, right

    def add(self, log_q: Tensor, targets: Tensor, kl: Tensor, teacher_entropy: Tensor) -> None:
        """Count positions.

        log_q    the student's log-probabilities, float64 [positions, vocab]
        targets  int64 [positions]
        kl, teacher_entropy  floating [positions], nats
        """
        q = log_q.exp()
        nll = metrics.nll(log_q, targets)
        confidence, guess = q.max(-1)
        right = (guess == targets).double()
        found = {
            "tokens": float(len(targets)),
            "nll": float(nll.sum()),
            "brier": float((q.square().sum(-1) - 2 * (-nll).exp() + 1).sum()),
            "right": float(right.sum()),
            "sure": float(confidence.sum()),
            "entropy": float(-(q * log_q).sum()),
            "teacher": float(teacher_entropy.double().sum()),
            "kl": float(kl.double().sum()),
        }
        for name, value in found.items():
            self.sums[name] += value
        place = (confidence * BINS).long().clamp_max(BINS - 1)
        for row, counts in enumerate((torch.ones_like(right), confidence, right)):
            self.bins[row].index_add_(0, place, counts)

    def figures(self) -> Figures:
        """Return the means."""
        tokens = self.sums["tokens"]
        if not tokens:
            raise ValueError("no position was counted")
        mean = {name: value / tokens for name, value in self.sums.items()}
        return Figures(
            tokens=int(tokens),
            nll=mean["nll"],
            brier=mean["brier"],
            accuracy=mean["right"],
            confidence=mean["sure"],
            gap=mean["sure"] - mean["right"],
            ece=float((self.bins[1] - self.bins[2]).abs().sum()) / tokens,
            entropy=mean["entropy"],
            teacher_entropy=mean["teacher"],
            kl=mean["kl"],
        )


def entropy(log_p: Tensor) -> Tensor:
    """Return the entropy per position, nats; [..., classes] -> [...]; -inf is a class of none."""
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)


@dataclass(frozen=True, slots=True)
class Temperature:
    """One temperature for the logits, fitted to the likelihood of a split.

    before, after  mean nats per token on the other split, at 1 and at the temperature
    fitted, judged  positions of either split
    """

    temperature: float
    before: float
    after: float
    fitted: int
    judged: int

    def to_json(self) -> dict[str, Any]:
        """Return all of it for a record."""
        return asdict(self)


def fit_temperature(parts: Iterable[tuple[Tensor, Tensor]]) -> Temperature | None:
    """Fit on every second part, judge on the others; None where there are not two.

    parts  (logits [positions, vocab], targets int64 [positions]) of one window after the other
    """
    sides: tuple[list[tuple[Tensor, Tensor]], ...] = ([], [])
    kept = 0
    for number, (logits, targets) in enumerate(parts):
        kept += logits.numel()
        if kept > MOST and number > 1:
            break
        sides[number % 2].append((logits, targets))
    if not sides[1]:
        return None

    def loss(side: int) -> Callable[[float], float]:
        logits = torch.cat([one for one, _ in sides[side]])
        targets = torch.cat([one for _, one in sides[side]])
        return lambda heat: float(
            metrics.nll(metrics.log_probabilities(logits / heat), targets).mean()
        )

    fitted, judged = loss(0), loss(1)
    heat = math.exp(_least(lambda x: fitted(math.exp(x)), math.log(COLDEST), math.log(HOTTEST)))
    return Temperature(
        heat,
        judged(1.0),
        judged(heat),
        *(sum(len(targets) for _, targets in side) for side in sides),
    )


def _least(function: Callable[[float], float], low: float, high: float) -> float:
    """Return where a function with one valley is least, by the golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = function(a), function(b)
    for _ in range(ROUNDS):
        if at_a <= at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = function(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = function(b)
    return (low + high) / 2

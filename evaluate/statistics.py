"""How sure a score is: standard errors and intervals over windows, alone and paired.

Tokens of one window depend on each other, so the window is the unit: a sample of n windows gives
n - 1 degrees of freedom however many tokens they hold. An estimate carries its influence, how much
each window moves it, so that a ratio, an exponential and the difference of two models scored on
the same windows all get their error in the same way (the delta method), and what the two models
share cancels in the difference. Neighbouring windows of one document are taken as independent,
which makes intervals somewhat narrow on a text of few long documents.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

CONFIDENCE = 0.95

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and what each cluster adds to its error.

    influence  float64 [clusters], mean zero: the value is off by about its mean over a new sample
    """

    value: float
    influence: Tensor

    @property
    def stderr(self) -> float | None:
        """The standard error; None with fewer than two clusters."""
        n = self.influence.numel()
        return None if n < 2 else float(self.influence.std(correction=1)) / math.sqrt(n)

    def interval(
        self, confidence: float = CONFIDENCE, *, low: float = -math.inf, high: float = math.inf
    ) -> Interval | None:
        """Return the t interval, cut to what the value can be; None with fewer than two clusters.

        low, high  the least and greatest possible value
        """
        stderr = self.stderr
        if stderr is None or not math.isfinite(stderr):
            return None
        half = t_quantile((1 + confidence) / 2, self.influence.numel() - 1) * stderr
        return max(low, self.value - half), min(high, self.value + half)


def mean(values: Tensor) -> Estimate:
    """Estimate the mean of one value per cluster; floating [clusters]."""
    values = values.double()
    value = values.mean()
    return Estimate(float(value), values - value)


def ratio(numerators: Tensor, denominators: Tensor) -> Estimate:
    """Estimate sum(numerators) / sum(denominators) over clusters; both [clusters]."""
    top, bottom = numerators.double(), denominators.double()
    value = top.sum() / bottom.sum()
    return Estimate(float(value), (top - value * bottom) / bottom.mean())


def exponential(estimate: Estimate) -> Estimate:
    """Estimate exp of a value."""
    try:
        value = math.exp(estimate.value)
    except OverflowError:
        value = math.inf
    return Estimate(value, estimate.influence * value)


def scaled(estimate: Estimate, factor: float) -> Estimate:
    """Estimate a value in another unit."""
    return Estimate(estimate.value * factor, estimate.influence * factor)


def paired_difference(ours: Estimate, theirs: Estimate) -> Estimate:
    """Estimate ours minus theirs, both over the same clusters in the same order."""
    if ours.influence.shape != theirs.influence.shape:
        raise ValueError("a paired difference needs the same clusters on both sides")
    return Estimate(ours.value - theirs.value, ours.influence - theirs.influence)


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t; within 0.13% at 0.975, 0.8% at 0.995.

    Closed forms for one and two degrees of freedom, then the Cornish-Fisher expansion (Abramowitz
    and Stegun, 26.7.5), four terms.
    """
    if degrees < 1:
        raise ValueError(f"degrees of freedom: {degrees}")
    if degrees == 1:
        return math.tan(math.pi * (probability - 0.5))
    if degrees == 2:
        return (2 * probability - 1) * math.sqrt(1 / (2 * probability * (1 - probability)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(degrees) ** power for power, term in enumerate(terms, start=1))

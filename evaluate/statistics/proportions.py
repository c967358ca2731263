"""Shares of yes among yes-or-no outcomes: alone, and of two models on the same prompts.

Shares near 0 or 1 and samples without a single flip are the common case here, and there the normal
interval has no width. So every interval is found by asking which truths the sample does not
refute, or, for ratios, with half a count added to each cell, as the papers advise.

Papers: Wilson 1927; Clopper and Pearson 1934; McNemar 1947, its exact form; Tango 1998 (Statistics
in Medicine 17), the score interval of a paired difference; Fieller 1954 for ratios, with the half
counts of Agresti and Min 2005 (Statistics in Medicine 24).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from unicomp.evaluate.scores import Interval, Score, measured

CONFIDENCE = 0.95
POWER = 0.8
STEPS = 45  # of a bisection: to 3e-14 of what it began with


@dataclass(frozen=True, slots=True)
class Pairs:
    """How two models answered the same prompts: counts of prompts.

    both           both said yes
    baseline_only  the baseline alone
    model_only     the model alone
    neither        neither did
    """

    both: int
    baseline_only: int
    model_only: int
    neither: int

    @property
    def n(self) -> int:
        """The number of prompts."""
        return self.both + self.baseline_only + self.model_only + self.neither


def pairs(model: Tensor, baseline: Tensor) -> Pairs:
    """Count; bool [prompts] each, the same prompts in the same order."""
    if model.shape != baseline.shape:
        raise ValueError("paired outcomes need the same prompts on both sides")
    ours, theirs = model.bool(), baseline.bool()
    counts = (ours & theirs, ~ours & theirs, ours & ~theirs, ~ours & ~theirs)
    return Pairs(*(int(count.sum()) for count in counts))


def z_value(confidence: float) -> float:
    """Return the z of a two-sided interval; 1.96 for 0.95."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def wilson(yes: float, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Return Wilson's score interval of a share: right on average, 93% at some shares."""
    z = z_value(confidence)
    share, room = yes / n, 1 + z * z / n
    centre = (share + z * z / (2 * n)) / room
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / room
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return (0.0 if yes == 0 else low), (1.0 if yes == n else high)


def clopper_pearson(yes: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Return the exact interval of a share: it covers at least as often as it says."""
    tail = (1 - confidence) / 2
    low = high = None
    if yes == 0:
        low = 0.0
    if yes == n:
        high = 1.0
    if low is None:
        low = _root(lambda p: 1 - binomial(yes - 1, n, p) - tail, 0.0, 1.0)
    if high is None:
        high = _root(lambda p: tail - binomial(yes, n, p), 0.0, 1.0)
    return low, high


def binomial(most: int, n: int, p: float) -> float:
    """Return the probability of at most `most` yes among n, each with probability p."""
    if most < 0:
        return 0.0
    if most >= n or p <= 0:
        return 1.0
    if p >= 1:
        return 0.0
    k = torch.arange(most + 1, dtype=torch.float64)
    ways = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    logs = ways + k * math.log(p) + (n - k) * math.log1p(-p)
    return min(1.0, float(logs.exp().sum()))


def mcnemar(found: Pairs) -> float:
    """Return the exact two-sided p-value of "both say yes equally often"."""
    flips = found.baseline_only + found.model_only
    if flips == 0:
        return 1.0
    fewer = min(found.baseline_only, found.model_only)
    return min(1.0, 2 * binomial(fewer, flips, 0.5))


def difference(found: Pairs, confidence: float = CONFIDENCE, *, careful: bool = False) -> Interval:
    """Return the interval of the model's share minus the baseline's, Tango's score interval.

    careful  half a flip wider at each end: few flips make the interval's tails, though not the
             whole of it, a little lighter than they say
    """
    n, lost, gained, z = found.n, found.baseline_only, found.model_only, z_value(confidence)
    if careful:
        return -_tango_high(n, _less(gained), lost, z), _tango_high(n, _less(lost), gained, z)
    return tango(n, lost, gained, z)


def _less(flips: float) -> float:
    return max(0.0, flips - 0.5)


def tango(n: int, lost: float, gained: float, z: float) -> Interval:
    """Return where the score statistic of the paired difference lies within -z and z.

    lost, gained  prompts, or expected prompts, that only the baseline and only the model answers
    """
    # Turned around, gains are losses.
    return -_tango_high(n, gained, lost, z), _tango_high(n, lost, gained, z)


def _tango_high(n: int, lost: float, gained: float, z: float) -> float:
    def statistic(delta: float) -> float:
        b = (2 * n - gained + lost) * delta - lost - gained
        c = -lost * delta * (1 - delta)
        q = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)
        spread = n * (2 * q + delta * (1 - delta))
        distance = gained - lost - n * delta
        return distance / math.sqrt(spread) if spread > 1e-12 else math.copysign(1e9, distance)

    centre = (gained - lost) / n
    return 1.0 if centre >= 1 else _root(lambda delta: -z - statistic(delta), centre, 1.0)


def retention(
    found: Pairs, *, chance: float = 0.0, confidence: float = CONFIDENCE
) -> Interval | None:
    """Return the interval of (model - chance) / (baseline - chance), by Fieller.

    chance  the share that guessing gets

    None where the baseline is not clearly above chance, so that any ratio would do.
    """
    cells = [count + 0.5 for count in asdict(found).values()]
    n = sum(cells)
    both, theirs, ours, _ = (cell / n for cell in cells)
    top, bottom = both + ours - chance, both + theirs - chance
    var_top = (both + ours) * (1 - both - ours) / n
    var_bottom = (both + theirs) * (1 - both - theirs) / n
    shared = (both - (both + ours) * (both + theirs)) / n
    z2 = z_value(confidence) ** 2
    a = bottom * bottom - z2 * var_bottom
    b = top * bottom - z2 * shared
    c = top * top - z2 * var_top
    if a <= 0 or bottom <= 0:
        return None
    half = math.sqrt(max(0.0, b * b - a * c))
    return (b - half) / a, (b + half) / a


def least_flips(n: int, power: float = POWER) -> float:
    """Return the rate at which n prompts show at least one flip with this power."""
    return float(1 - (1 - power) ** (1 / n))


def detectable_below(
    n: int,
    limit: float,
    *,
    confidence: float = CONFIDENCE,
    power: float = POWER,
    interval: Callable[[int, int, float], Interval] = clopper_pearson,
) -> float | None:
    """Return the greatest share whose interval lies below a limit, with this power.

    interval  `clopper_pearson` or `wilson`

    None where the sample is so small that no share is seen. Exact: sums of the binomial.
    """
    most = -1
    while most < n and interval(most + 1, n, confidence)[1] < limit:
        most += 1
    if most < 0:
        return None
    return _root(lambda p: power - binomial(most, n, p), 0.0, limit)


def detectable_above(
    n: int,
    limit: float,
    *,
    confidence: float = CONFIDENCE,
    power: float = POWER,
    interval: Callable[[int, int, float], Interval] = clopper_pearson,
) -> float | None:
    """Return the least share whose interval lies above a limit; as `detectable_below`."""
    mirrored = detectable_below(n, 1 - limit, confidence=confidence, power=power, interval=interval)
    return None if mirrored is None else 1 - mirrored


def detectable_drop(
    n: int,
    gained: float = 0.0,
    *,
    allowed: float = 0.0,
    confidence: float = CONFIDENCE,
    power: float = POWER,
) -> float | None:
    """Return the least drop of a paired share that is seen to be more than is allowed.

    n        prompts that both models answered
    gained   share of prompts that the model alone answers, taken to stay as it is
    allowed  drop that is no failure

    The number of flips is taken as normal, less one, and met with the upper bound of a careful
    `difference`.
    None where no drop would be seen.
    """
    z, z_power = z_value(confidence), NormalDist().inv_cdf(power)

    def excess(drop: float) -> float:
        """More than 0 where the drop is seen."""
        deviation = math.sqrt(max(0.0, n * (drop + 2 * gained - drop * drop)))
        net = n * drop - z_power * deviation - 1
        lost = min(max(0.0, net + n * gained), n * (1 - gained))
        return -allowed - _tango_high(n, _less(lost), n * gained, z)

    most = 1 - gained
    if most <= allowed or excess(most) <= 0:
        return None
    return _root(excess, allowed, most)


def share(
    name: str,
    yes: Tensor,
    baseline: Tensor | None = None,
    *,
    higher_is_better: bool = True,
    chance: float | None = None,
    unit: str = "fraction",
    detail: Mapping[str, Any] | None = None,
) -> Score:
    """Return the score of a share, with what a gate and a reader need beside it.

    yes       bool [prompts], at least one
    baseline  the baseline's, on the same prompts in the same order
    chance    the share that guessing gets, for the retention that is corrected for it

    The interval is exact. In `detail`: `yes`, and beside a baseline `pairs`, `mcnemar_p`,
    `retention` and `detectable_drop`, the least drop (where lower is better, rise) that this sample
    shows with 80% power.
    """
    n, count = yes.numel(), int(yes.sum())
    known: dict[str, Any] = {"yes": count}
    theirs = delta = None
    if baseline is not None:
        found = pairs(yes, baseline)
        theirs = (found.both + found.baseline_only) / n
        delta = difference(found)
        flips = found.model_only if higher_is_better else found.baseline_only
        known |= {
            "pairs": asdict(found),
            "mcnemar_p": mcnemar(found),
            "detectable_drop": detectable_drop(n, flips / n),
        }
        if higher_is_better:
            known["retention"] = _retained(found, 0.0)
            if chance is not None:
                known["retention_above_chance"] = {"chance": chance} | _retained(found, chance)
    return measured(
        name,
        count / n,
        unit=unit,
        higher_is_better=higher_is_better,
        ci95=clopper_pearson(count, n),
        n=n,
        baseline=theirs,
        delta_ci95=delta,
        detail={**(detail or {}), **known},
    )


def _retained(found: Pairs, chance: float) -> dict[str, Any]:
    top = (found.both + found.model_only) / found.n - chance
    bottom = (found.both + found.baseline_only) / found.n - chance
    interval = retention(found, chance=chance)
    if interval is None:
        return {"value": None, "ci95": None, "reason": "the baseline is not clearly above chance"}
    return {"value": top / bottom, "ci95": interval}


def _root(rising: Callable[[float], float], low: float, high: float) -> float:
    """Return where a rising function crosses zero, by bisection."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        if rising(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2

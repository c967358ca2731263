"""Do intervals cover, do gates raise false alarms, and is a printed drop seen as often as is said?

What `tests/evaluate/statistics` holds to its bounds, as figures. Shares and paired drops are summed
over every outcome; the rest is drawn, with the error of the drawing beside. Asked are: 95%
intervals that cover at least 93.5% (resampled ones at most 97%), false alarms at most at the level,
and a power of at least 80% at the printed drop. Skewed means are there to tell t intervals from
ours, which follow the skewness, and from resampled ones.

    python benchmarks/intervals.py
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from delta_large import about
from scipy.integrate import quad
from scipy.stats import binom, chi, nct
from torch import Tensor

from unicomp.evaluate.statistics import estimates, proportions
from unicomp.evaluate.statistics.proportions import Pairs

RESULTS = Path(__file__).resolve().parent / "results/statistics.json"
DRAWS = 2000
SHARES = [(0.02, 100), (0.1, 100), (0.5, 30), (0.92, 260)]
DROPS = [(100, 0.0, 0.0), (100, 0.02, 0.0), (240, 0.005, 0.05), (260, 0.01, 0.02), (400, 0.03, 0.0)]
# n, and the probabilities of the fields of `Pairs`
PAIRED = [
    (100, (0.62, 0.30, 0.01, 0.07)),
    (240, (0.90, 0.02, 0.01, 0.07)),
    (60, (0.35, 0.05, 0.10, 0.50)),
    (400, (0.70, 0.10, 0.02, 0.18)),
]


def drawn(hits: int, draws: int = DRAWS) -> dict[str, float]:
    """Return a share of draws with its standard error."""
    share = hits / draws
    return {"share": share, "standard_error": math.sqrt(share * (1 - share) / draws)}


def share_coverage(p: float, n: int) -> dict[str, Any]:
    """Return how often the exact interval of a share covers, summed over all counts."""
    ends = [proportions.clopper_pearson(count, n) for count in range(n + 1)]
    held = [float(binom.pmf(k, n, p)) for k, (low, high) in enumerate(ends) if low <= p <= high]
    return {"p": p, "n": n, "coverage": sum(held)}


def paired_coverage(n: int, cells: tuple[float, ...]) -> dict[str, Any]:
    """Return how often the intervals of a paired difference and of a retention cover, drawn."""
    both, theirs, ours, _ = cells
    delta, ratio = ours - theirs, (both + ours) / (both + theirs)
    held = kept = 0
    for row in torch.multinomial(torch.tensor(cells), n * DRAWS, replacement=True).view(DRAWS, n):
        found = Pairs(*torch.bincount(row, minlength=4).tolist())
        low, high = proportions.difference(found)
        held += low <= delta <= high
        low, high = proportions.retention(found) or (math.inf, -math.inf)
        kept += low <= ratio <= high
    return {"n": n, "cells": cells, "difference": drawn(held), "retention": drawn(kept)}


def mean_coverage(kind: str, n: int) -> dict[str, Any]:
    """Return how often t intervals, ours and resampled ones of a mean cover, drawn."""
    even = ours = resampled = 0
    half = estimates.t_quantile(0.975, n - 1)
    for _ in range(DRAWS):
        values: Tensor = (
            torch.empty(n).exponential_() if kind == "exponential" else 1 + torch.randn(n)
        )
        one = estimates.mean(values)
        even += abs(one.value - 1) <= half * (one.stderr or 0.0)
        low, high = one.interval() or (math.inf, -math.inf)
        ours += low <= 1 <= high
        low, high = estimates.bootstrap_mean(values, draws=500) or (math.inf, -math.inf)
        resampled += low <= 1 <= high
    return {
        "kind": kind,
        "n": n,
        "t": drawn(even),
        "ours": drawn(ours),
        "resampled": drawn(resampled),
    }


def seen_drop(n: int, lost: float, gained: float, allowed: float) -> float:
    """Return how often a drop by more than is allowed is seen, summed over all flips.

    lost, gained  probabilities that only the baseline and only the model says yes
    """
    total = 0.0
    for gains in range(n + 1):
        weight, room = float(binom.pmf(gains, n, gained)), n - gains
        if weight < 1e-13:
            continue
        least, most = 0, room + 1
        while least < most:
            flips = (least + most) // 2
            pairs = Pairs(0, flips, gains, room - flips)
            broken = proportions.difference(pairs, careful=True)[1] < -allowed
            least, most = (least, flips) if broken else (flips + 1, most)
        total += weight * float(binom.sf(least - 1, room, lost / (1 - gained)))
    return total


def drop(n: int, gained: float, allowed: float) -> dict[str, Any]:
    """Return the drop that is printed, its power, and false alarms of one that is allowed."""
    least = proportions.detectable_drop(n, gained, allowed=allowed)
    if least is None:
        raise RuntimeError("no drop is seen")
    return {
        "n": n,
        "gained": gained,
        "allowed": allowed,
        "printed": least,
        "power": seen_drop(n, least + gained, gained, allowed),
        "false_alarms": seen_drop(n, allowed + gained, gained, allowed),
    }


def mean_power(degrees: int, times: float) -> float:
    """Return how often a difference of so many half-widths of a t interval is told, exactly."""
    t = estimates.t_quantile(0.975, degrees)

    def seen(spread: float) -> float:
        density = chi.pdf(spread, degrees, scale=1 / math.sqrt(degrees))
        return float(density * nct.sf(t, degrees, times * t * spread))

    room = 12 / math.sqrt(2 * degrees)
    return float(quad(seen, max(0.0, 1 - room), 1 + room, points=[1.0], limit=200)[0])


def main() -> None:
    """Measure, print and store."""
    torch.manual_seed(0)
    known = 1 + 0.8416212 / 1.9599640  # half-widths, were the deviation known
    found = about() | {
        "draws": DRAWS,
        "coverage_of_shares": [share_coverage(*own) for own in SHARES],
        "coverage_of_paired_shares": [paired_coverage(*own) for own in PAIRED],
        "coverage_of_means": [
            mean_coverage(k, n) for k in ("normal", "exponential") for n in (20, 80)
        ],
        "paired_drops": [drop(*own) for own in DROPS],
        "means": [
            {
                "units": n,
                "power": mean_power(n - 1, estimates.reach(n - 1)),
                "power_as_if_the_deviation_were_known": mean_power(n - 1, known),
            }
            for n in (8, 50, 400)
        ],
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()

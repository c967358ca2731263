"""Whether a score got worse beside the baseline, told by the interval of the difference alone.

A difference whose interval holds zero is `unclear`, however large it looks. Some scores are best
at a value in between: over-confidence at 0, a temperature and the ratio of entropies at 1, a bias
where its detail says. For these, nearer is better.
"""

from typing import Literal

from unicomp.evaluate.scores import Score

Change = Literal["worse", "better", "unclear"]

BEST = {"overconfidence_gap": 0.0, "temperature": 1.0, "entropy_ratio": 1.0}
"""Last part of a name, without `token_` -> the value that is best."""


def change(score: Score) -> Change | None:
    """Return what became of a score; None where there is nothing to compare it with."""
    if score.delta is None or score.value is None or score.baseline is None:
        return None
    if score.delta_ci95 is None:
        # Without a sample the difference is exact; with one, nothing is known of it.
        low = high = score.delta if score.n is None else 0.0
    else:
        low, high = score.delta_ci95
    if low <= 0 <= high:
        return "unclear"
    best = best_value(score)
    if best is not None:
        nearer = abs(score.value - best) < abs(score.baseline - best)
        return "better" if nearer else "worse"
    return "better" if (low > 0) == score.higher_is_better else "worse"


def best_value(score: Score) -> float | None:
    """Return the value that is best where that is neither the highest nor the lowest."""
    said = score.detail.get("without_bias")
    if isinstance(said, int | float):
        return float(said)
    return BEST.get(score.name.rpartition("/")[2].removeprefix("token_"))

"""Shares: against scipy and printed examples, and by how often intervals and gates are right."""

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from scipy.stats import binom, binomtest
from torch import Tensor

from unicomp.evaluate.statistics import proportions
from unicomp.evaluate.statistics.proportions import Pairs

DRAWS = 2000


def drawn(cells: Sequence[float], n: int) -> Iterator[Pairs]:
    """Draw samples of n pairs from the probabilities of `Pairs`' fields."""
    samples = torch.multinomial(torch.tensor(cells), n * DRAWS, replacement=True)
    for row in samples.view(DRAWS, n):
        yield Pairs(*torch.bincount(row, minlength=4).tolist())


@pytest.mark.parametrize(("yes", "n"), [(0, 10), (1, 10), (3, 10), (10, 10), (37, 100), (5, 900)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_intervals_of_a_share_are_those_of_scipy(yes: int, n: int, confidence: float) -> None:
    test = binomtest(yes, n)
    for method, found in (("exact", proportions.clopper_pearson), ("wilson", proportions.wilson)):
        theirs = test.proportion_ci(confidence, method)
        assert found(yes, n, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert proportions.wilson(1, 10) != pytest.approx((0.0, 0.5), abs=1e-2)  # it can fail


@pytest.mark.parametrize(("n", "high"), [(12, 0.242), (50, 0.071), (100, 0.037), (300, 0.013)])
def test_zero_flips_still_leave_room(n: int, high: float) -> None:
    assert proportions.wilson(0, n)[1] == pytest.approx(high, abs=6e-4)
    assert proportions.tango(n, 0, 0, 1.96)[1] == pytest.approx(1.96**2 / (n + 1.96**2))


@pytest.mark.parametrize(("n", "rate"), [(12, 0.126), (50, 0.032), (100, 0.016), (300, 0.005)])
def test_least_flips(n: int, rate: float) -> None:
    assert proportions.least_flips(n) == pytest.approx(rate, abs=6e-4)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (3, 9), (12, 30), (7, 7)])
def test_mcnemar_is_the_exact_test(lost: int, gained: int) -> None:
    found = proportions.mcnemar(Pairs(10, lost, gained, 4))
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert found == pytest.approx(expected)


def test_the_interval_of_a_difference_is_where_its_own_test_does_not_refute() -> None:
    """The constrained likelihood is maximised by brute force here."""
    found = Pairs(30, 9, 2, 9)
    low, high = proportions.difference(found)

    def statistic(delta: float) -> float:
        best, at = -math.inf, 0.0
        for step in range(1, 20000):
            p_lost = step / 20000
            p_gained = p_lost + delta
            if p_gained <= 0 or p_lost + p_gained >= 1:
                continue
            value = 9 * math.log(p_lost) + 2 * math.log(p_gained)
            value += 39 * math.log(1 - p_lost - p_gained)
            if value > best:
                best, at = value, p_lost
        return float((2 - 9 - 50 * delta) / math.sqrt(50 * (2 * at + delta * (1 - delta))))

    assert statistic(low) == pytest.approx(1.96, abs=5e-3)
    assert statistic(high) == pytest.approx(-1.96, abs=5e-3)
    assert statistic((low + high) / 2) != pytest.approx(1.96, abs=0.5)


def test_the_ends_of_a_difference() -> None:
    assert proportions.difference(Pairs(0, 5, 0, 0))[0] == -1
    assert proportions.difference(Pairs(0, 0, 5, 0))[1] == 1
    low, high = proportions.difference(Pairs(5, 0, 0, 5))
    assert low == pytest.approx(-high)
    plain, wide = (proportions.difference(Pairs(9, 4, 2, 5), careful=how) for how in (False, True))
    assert wide[0] < plain[0] < plain[1] < wide[1]


@pytest.mark.parametrize(("p", "n"), [(0.02, 100), (0.1, 100), (0.5, 30), (0.92, 260)])
def test_exact_intervals_of_a_share_cover(p: float, n: int) -> None:
    counts = (torch.rand(DRAWS, n) < p).sum(1).tolist()
    ends = {count: proportions.clopper_pearson(count, n) for count in set(counts)}
    held = sum(ends[count][0] <= p <= ends[count][1] for count in counts) / DRAWS
    assert held >= 0.935
    narrow = {count: (count / n - 0.6 / n, count / n + 0.6 / n) for count in set(counts)}
    assert sum(narrow[count][0] <= p <= narrow[count][1] for count in counts) / DRAWS < 0.935


def test_wilson_intervals_cover_on_average() -> None:
    held = 0
    for _ in range(DRAWS):
        p = float(torch.rand(()))
        low, high = proportions.wilson(int((torch.rand(100) < p).sum()), 100)
        held += low <= p <= high
    assert held / DRAWS >= 0.935


# both, baseline only, model only, neither
CELLS = [
    (100, (0.62, 0.30, 0.01, 0.07)),
    (240, (0.90, 0.02, 0.01, 0.07)),
    (100, (0.50, 0.002, 0.002, 0.496)),
    (60, (0.35, 0.05, 0.10, 0.50)),
    (400, (0.70, 0.10, 0.02, 0.18)),
]


@pytest.mark.parametrize(("n", "cells"), CELLS)
def test_paired_intervals_cover(n: int, cells: tuple[float, ...]) -> None:
    both, theirs, ours, _ = cells
    delta, chance = ours - theirs, 0.25
    ratio = (both + ours) / (both + theirs)
    above = (both + ours - chance) / (both + theirs - chance)
    held = [0, 0, 0]
    asked = 0
    for found in drawn(cells, n):
        low, high = proportions.difference(found)
        held[0] += low <= delta <= high
        kept = proportions.retention(found)
        assert kept is not None
        held[1] += kept[0] <= ratio <= kept[1]
        kept = proportions.retention(found, chance=chance)
        if kept is not None:
            asked += 1
            held[2] += kept[0] <= above <= kept[1]
    assert held[0] / DRAWS >= 0.935
    assert held[1] / DRAWS >= 0.935
    assert held[2] / asked >= 0.935


def test_retention_of_a_baseline_at_chance_is_not_told() -> None:
    assert proportions.retention(Pairs(20, 8, 8, 64), chance=0.25) is None
    score = proportions.share("accuracy/x/acc", _bools(28, 100), _bools(28, 100), chance=0.25)
    assert score.detail["retention_above_chance"]["value"] is None
    assert score.detail["retention"]["value"] == 1


def _bools(yes: int, n: int) -> Tensor:
    return torch.arange(n) < yes


def seen_drop(n: int, lost: float, gained: float, allowed: float) -> float:
    """Return how often a paired share is seen to drop by more than is allowed, exactly.

    lost, gained  probabilities that only the baseline and only the model says yes

    Sums over all numbers of gains and of losses; more losses are always seen sooner.
    """
    total = 0.0
    for gains, weight in enumerate(binom.pmf(range(n + 1), n, gained)):
        if weight < 1e-13:
            continue
        room = n - gains
        least, most = 0, room + 1
        while least < most:
            flips = (least + most) // 2
            pairs = Pairs(0, flips, gains, room - flips)
            if proportions.difference(pairs, careful=True)[1] < -allowed:
                most = flips
            else:
                least = flips + 1
        total += weight * float(binom.sf(least - 1, room, lost / (1 - gained)))
    return total


@pytest.mark.parametrize(
    ("n", "gained", "allowed"),
    [(100, 0.0, 0.0), (100, 0.02, 0.0), (240, 0.005, 0.05), (260, 0.01, 0.02), (400, 0.03, 0.0)],
)
def test_the_printed_drop_is_seen_and_an_allowed_one_is_not(
    n: int, gained: float, allowed: float
) -> None:
    drop = proportions.detectable_drop(n, gained, allowed=allowed)
    assert drop is not None
    assert seen_drop(n, drop + gained, gained, allowed) >= 0.8
    assert seen_drop(n, allowed + gained, gained, allowed) <= 0.05
    less = allowed + (drop - allowed) / 3
    assert seen_drop(n, less + gained, gained, allowed) < 0.8  # a smaller one is not


def test_exact_sums_are_those_of_many_draws() -> None:
    n, lost, gained = 240, 0.07, 0.005
    cells = (0.93 - lost - gained, lost, gained, 0.07)
    seen = [proportions.difference(found, careful=True)[1] < -0.02 for found in drawn(cells, n)]
    share = seen_drop(n, lost, gained, 0.02)
    assert sum(seen) / DRAWS == pytest.approx(share, abs=4 * math.sqrt(0.25 / DRAWS))
    assert 0.2 < share < 0.98


def test_small_samples_show_no_drop() -> None:
    assert proportions.detectable_drop(3) is None
    assert proportions.detectable_drop(100, allowed=1.0) is None
    assert proportions.detectable_below(2, 0.1) is None


@pytest.mark.parametrize(("n", "limit"), [(20, 0.9), (100, 0.5), (260, 0.9)])
def test_a_share_below_a_limit_is_seen(n: int, limit: float) -> None:
    share = proportions.detectable_below(n, limit)
    assert share is not None

    counts = reversed(range(n))
    most = next(count for count in counts if proportions.clopper_pearson(count, n)[1] < limit)
    assert binom.cdf(most, n, share) >= 0.8 - 1e-9  # exact but for the last digits
    assert binom.cdf(most, n, share + 1e-3) < 0.8
    assert binom.cdf(most, n, limit) <= 0.05
    assert proportions.detectable_above(n, 1 - limit) == pytest.approx(1 - share)


def test_a_share_says_what_a_reader_needs() -> None:
    ours, theirs = _bools(60, 100), _bools(90, 100)
    score = proportions.share("safety/refusal_rate", ours, theirs, chance=0.5)
    assert (score.value, score.baseline, score.n) == (0.6, 0.9, 100)
    assert score.delta == pytest.approx(-0.3)
    assert score.detail["pairs"] == {
        "both": 60,
        "baseline_only": 30,
        "model_only": 0,
        "neither": 10,
    }
    assert score.detail["mcnemar_p"] == pytest.approx(2**-29)
    assert score.detail["retention"]["value"] == pytest.approx(2 / 3)
    assert score.detail["retention_above_chance"]["value"] == pytest.approx(0.25)
    assert 0.05 < score.detail["detectable_drop"] < 0.08
    rise = proportions.share("safety/over_refusal_rate", ours, theirs, higher_is_better=False)
    assert "retention" not in rise.detail
    with pytest.raises(ValueError, match="same prompts"):
        proportions.pairs(ours, theirs[:5])

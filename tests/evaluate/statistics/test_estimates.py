"""Intervals: against tables and formulas, and by how often they hold the truth."""

import math
from functools import partial
from statistics import NormalDist

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi, nct, skew
from torch import Tensor

from unicomp.evaluate.statistics import estimates, reliability

DRAWS = 2000


@pytest.mark.parametrize(
    ("degrees", "probability", "expected"),
    [  # printed tables of Student's t
        (1, 0.975, 12.706),
        (2, 0.975, 4.303),
        (3, 0.975, 3.182),
        (4, 0.975, 2.776),
        (10, 0.975, 2.228),
        (30, 0.975, 2.042),
        (1, 0.95, 6.314),
        (2, 0.95, 2.920),
        (10, 0.95, 1.812),
        (1000, 0.975, 1.962),
    ],
)
def test_t_quantile_is_that_of_the_tables(
    degrees: int, probability: float, expected: float
) -> None:
    found = estimates.t_quantile(probability, degrees)
    assert found == pytest.approx(expected, rel=1.5e-3)
    assert estimates.t_quantile(1 - probability, degrees) == pytest.approx(-found)


def test_mean_has_the_textbook_error() -> None:
    found = estimates.mean(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert found.value == 3
    assert found.stderr == pytest.approx(math.sqrt(14 / 3) / 2)
    low, high = found.interval() or (0, 0)
    half = 3.182 * 1.0801
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=2e-3 * half)
    assert found.interval(low=0.0, high=5.0) == (0.0, 5.0)


def test_one_window_has_no_interval() -> None:
    found = estimates.mean(torch.tensor([1.0]))
    assert found.stderr is None
    assert found.interval() is None


def _jackknife(values: list[float]) -> float:
    """Standard error from the estimates that leave out one cluster each."""
    n = len(values)
    centre = sum(values) / n
    return math.sqrt((n - 1) / n * sum((value - centre) ** 2 for value in values))


def test_ratio_exponential_and_difference_agree_with_the_jackknife() -> None:
    top = 5 + torch.rand(80, dtype=torch.float64)
    bottom = 3 + torch.rand(80, dtype=torch.float64)
    other = top + 0.1 * torch.rand(80, dtype=torch.float64)

    def left_out(values: Tensor, index: int) -> Tensor:
        return torch.cat([values[:index], values[index + 1 :]])

    found = estimates.ratio(top, bottom)
    assert found.value == pytest.approx(float(top.sum() / bottom.sum()))
    each = [float(left_out(top, i).sum() / left_out(bottom, i).sum()) for i in range(80)]
    assert found.stderr == pytest.approx(_jackknife(each), rel=0.03)

    grown = estimates.exponential(estimates.mean(top))
    each = [math.exp(float(left_out(top, i).mean())) for i in range(80)]
    assert grown.value == pytest.approx(math.exp(float(top.mean())))
    assert grown.stderr == pytest.approx(_jackknife(each), rel=0.03)

    apart = estimates.paired_difference(estimates.mean(other), estimates.mean(top))
    assert apart.value == pytest.approx(float((other - top).mean()))
    assert apart.stderr == pytest.approx(float((other - top).std()) / math.sqrt(80))
    assert apart.stderr < (estimates.mean(other).stderr or 0) / 3  # pairing is worth it


def test_scaled_scales_both() -> None:
    one = estimates.mean(torch.tensor([1.0, 2.0]))
    two = estimates.scaled(one, 4.0)
    assert (two.value, two.stderr) == (6.0, pytest.approx(4 * (one.stderr or 0)))


def test_unpaired_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="same clusters"):
        estimates.paired_difference(estimates.mean(torch.ones(3)), estimates.mean(torch.ones(4)))


@pytest.mark.parametrize("n", [20, 80])
def test_an_interval_of_a_skewed_mean_holds_the_truth(n: int) -> None:
    generator = torch.Generator().manual_seed(0)
    held = plain = 0
    half = estimates.t_quantile(0.975, n - 1)
    for _ in range(DRAWS):
        found = estimates.mean(torch.empty(n).exponential_(generator=generator))
        low, high = found.interval() or (0, 0)
        held += low <= 1 <= high
        assert found.stderr is not None
        plain += abs(found.value - 1) <= half * found.stderr
    assert 0.935 <= held / DRAWS <= 0.965
    assert (held - plain) / DRAWS > 0.01  # ends of equal length hold less
    assert n > 20 or plain / DRAWS < 0.935


def test_an_interval_follows_halls_transformation() -> None:
    """Its ends, put into the cubic that makes the studentized mean even, are the t quantiles."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(40, dtype=torch.float64).exponential_(generator=generator)
    found = estimates.mean(values)
    low, high = found.interval() or (0.0, 0.0)
    assert found.stderr is not None
    skewness = float(skew(values.numpy()))
    slope = skewness / math.sqrt(40)
    for end, sign in ((low, 1), (high, -1)):
        away = (found.value - end) / found.stderr
        moved = away + slope * away**2 / 3 + slope**2 * away**3 / 27 + slope / 6
        assert moved == pytest.approx(sign * estimates.t_quantile(0.975, 39))


def test_an_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    held = dependent = 0
    for _ in range(DRAWS):
        # Tokens of a window move together: the window is the unit, not the token.
        windows = torch.randn(8, 1, generator=generator) + torch.randn(8, 20, generator=generator)
        low, high = estimates.mean(windows.mean(1)).interval() or (0, 0)
        held += low <= 0 <= high
        low, high = estimates.mean(windows.flatten()).interval() or (0, 0)
        dependent += low <= 0 <= high
    assert 0.935 <= held / DRAWS <= 0.965
    assert dependent / DRAWS < 0.7  # what goes wrong when every token counts as a sample


@pytest.mark.parametrize(("p", "n"), [(0.1, 100), (0.3, 100), (0.9, 100), (0.5, 60)])
def test_a_bootstrap_of_shares_covers_and_is_not_too_wide(p: float, n: int) -> None:
    """Where n p is 10 or more, between 93.5% and 97%; equal counts have equal intervals.

    Counts lie on a lattice, so that single shares lose or gain more than a percent: 4 yes of 200
    reach 0.0498, and 0.05 has 93.45%. The next test draws the share too.
    """
    counts = (torch.rand(DRAWS, n) < p).sum(1).tolist()
    held = 0
    ends: dict[int, tuple[float, float]] = {}
    for count in counts:
        if count not in ends:
            values = (torch.arange(n) < count).double()
            ends[count] = estimates.bootstrap_mean(values, low=0.0, high=1.0) or (0.0, 0.0)
        low, high = ends[count]
        held += low - 1e-12 <= p <= high + 1e-12
    assert 0.935 <= held / DRAWS <= 0.97


def test_a_bootstrap_of_shares_covers_on_average() -> None:
    held = 0
    for _ in range(DRAWS):
        p = 0.05 + 0.9 * float(torch.rand(()))
        values = (torch.rand(200) < p).double()
        low, high = estimates.bootstrap_mean(values, low=0.0, high=1.0, draws=500) or (0, 0)
        held += low <= p <= high
    assert 0.935 <= held / DRAWS <= 0.97


@pytest.mark.parametrize("kind", ["exponential", "normal", "paired"])
def test_a_bootstrap_of_means_covers(kind: str) -> None:
    held = plain = 0
    for _ in range(DRAWS):
        n, truth = 80, 1.0
        if kind == "exponential":
            values = torch.empty(n).exponential_()
        elif kind == "normal":
            values = 1 + torch.randn(n)
        else:
            theirs = torch.empty(n).exponential_()
            values, truth = 0.2 * torch.empty(n).exponential_() + 0.1 * theirs, 0.3
        low, high = estimates.bootstrap_mean(values, draws=500) or (0.0, 0.0)
        held += low <= truth <= high
        plain += low + 0.1 * (high - low) <= truth <= high - 0.1 * (high - low)
    assert 0.935 <= held / DRAWS <= 0.97
    assert plain / DRAWS < 0.935  # a tenth less at each end is too narrow, and is seen to be


def variance(values: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum(1)
    mean = weights @ values / total
    return (weights @ values**2 / total - mean**2) * total / (total - 1)


def test_a_bootstrap_covers_a_variance() -> None:
    """No mean: the variance of normal values, whose percentile interval is too narrow."""
    held = plain = 0
    for _ in range(DRAWS):
        of = partial(variance, torch.randn(100, dtype=torch.float64))
        low, high = estimates.bootstrap(of, 100, draws=400, low=0.0) or (0.0, 0.0)
        held += low <= 1 <= high
        low, high = estimates.bootstrap(of, 100, draws=400, smooth=False) or (0.0, 0.0)
        plain += low <= 1 <= high
    assert 0.935 <= held / DRAWS <= 0.97
    assert plain / DRAWS < 0.935  # which is not enough


@pytest.mark.slow
def test_a_bootstrap_covers_an_area() -> None:
    """The risk-coverage area of a calibrated model that is sure of 0.3 to 1, drawn as often."""

    def draw(n: int) -> tuple[Tensor, Tensor]:
        confidence = 0.3 + 0.7 * torch.rand(n, dtype=torch.float64)
        return confidence, (torch.rand(n, dtype=torch.float64) < confidence).double()

    truth = float(reliability.aurc(*draw(2_000_000))[0])
    held = 0
    for _ in range(DRAWS):
        of = partial(reliability.aurc, *draw(200))
        low, high = estimates.bootstrap(of, 200, draws=400, low=0.0, high=1.0) or (0.0, 0.0)
        held += low <= truth <= high
    assert 0.935 <= held / DRAWS <= 0.97


def test_a_bootstrap_covers_a_choice_from_a_grid() -> None:
    """The best temperature of a calibrated model is 1."""
    grid = torch.tensor([2 ** (step / 16) for step in range(-32, 33)], dtype=torch.float64)
    held = 0
    for _ in range(DRAWS):
        logits = 2 * torch.randn(200, 3, dtype=torch.float64)
        gold = torch.multinomial(torch.softmax(logits, 1), 1)
        goal = logits.gather(1, gold) / grid
        losses = (logits[:, None] / grid[:, None]).logsumexp(2) - goal

        def best(weights: Tensor, losses: Tensor = losses) -> Tensor:
            return grid[(weights @ losses).argmin(1)]

        low, high = estimates.bootstrap(best, 200, smooth=False, draws=400) or (0.0, 0.0)
        held += low <= 1 <= high
    assert held / DRAWS >= 0.935


def test_a_bootstrap_is_the_same_each_time_and_knows_its_limits() -> None:
    values = torch.randn(30)
    assert estimates.bootstrap_mean(values) == estimates.bootstrap_mean(values)
    assert estimates.bootstrap_mean(values) != estimates.bootstrap_mean(values, seed=1)
    assert estimates.bootstrap_mean(torch.ones(1)) is None
    assert estimates.bootstrap_mean(torch.tensor([1.0, math.inf])) is None
    assert estimates.bootstrap_mean(torch.ones(4)) == (1.0, 1.0)
    rare = torch.tensor([1.0, *[0.0] * 20])
    assert (estimates.bootstrap_mean(rare, high=1.0) or (0, 0))[1] == 1.0  # most draws lack it
    assert estimates.bootstrap(lambda weights: weights.sum(1), 1) is None
    assert estimates.bootstrap(lambda weights: weights.sum(1) * math.nan, 5) is None


def test_a_ratio_of_two() -> None:
    top, bottom = estimates.mean(2 + torch.rand(60)), estimates.mean(1 + torch.rand(60))
    found = estimates.log_ratio(top, bottom)
    assert math.exp(found.value) == pytest.approx(top.value / bottom.value)


def power(degrees: int, confidence: float, times: float) -> float:
    """Return how often a true difference of so many half-widths is told from zero, exactly.

    With scipy's noncentral t, of a given deviation of the sample that the half-width is of.
    """
    t = estimates.t_quantile((1 + confidence) / 2, degrees)

    def seen(spread: float) -> float:
        density = chi.pdf(spread, degrees, scale=1 / math.sqrt(degrees))
        return float(density * nct.sf(t, degrees, times * t * spread))

    room = 12 / math.sqrt(2 * degrees)
    return float(quad(seen, max(0.0, 1 - room), 1 + room, points=[1.0], limit=200)[0])


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("degrees", [1, 2, 4, 11, 49, 400])
def test_what_can_be_seen_of_a_difference_has_its_power(degrees: int, confidence: float) -> None:
    times = estimates.reach(degrees, confidence)
    assert 0.8 - 1e-6 <= power(degrees, confidence, times) <= 0.8 + 1e-4
    normal = NormalDist()  # of a known deviation: too little
    known = 1 + normal.inv_cdf(0.8) / normal.inv_cdf((1 + confidence) / 2)
    assert power(degrees, confidence, known) < 0.8 - 1e-6
    more = estimates.reach(degrees, confidence, 0.9)
    assert power(degrees, confidence, more) == pytest.approx(0.9, abs=1e-4)


def test_power_and_alarms_of_a_difference_are_those_of_many_draws() -> None:
    draws, n = 40_000, 50
    sample, other = torch.randn(2, draws, n, dtype=torch.float64)
    half = estimates.t_quantile(0.975, n - 1) / math.sqrt(n)
    least = half * sample.std(1) * estimates.reach(n - 1)
    away = half * other.std(1)
    told = float((other.mean(1) + least > away).double().mean())
    assert told == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / draws))
    alarms = float((other.mean(1).abs() > away).double().mean())
    assert alarms == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / draws))
    even = torch.cat([other[0, : n // 2], -other[0, : n // 2]])
    low, high = estimates.mean(even).interval() or (0.0, 0.0)
    assert (high - low) / 2 == pytest.approx(half * float(even.std()))

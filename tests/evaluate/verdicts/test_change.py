"""What got worse is told by the interval of the difference."""

import pytest

from unicomp.evaluate.scores import Score, measured
from unicomp.evaluate.verdicts.change import change


def score(
    value: float,
    baseline: float | None,
    interval: tuple[float, float] | None,
    *,
    up: bool = True,
    name: str = "accuracy/some/acc",
    n: int | None = 100,
    **detail: float,
) -> Score:
    return measured(
        name,
        value,
        unit="fraction",
        higher_is_better=up,
        n=n,
        baseline=baseline,
        delta_ci95=interval,
        detail=detail,
    )


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (score(0.5, None, None), None),
        (score(0.5, 0.7, (-0.3, -0.1)), "worse"),
        (score(0.5, 0.7, (-0.3, 0.1)), "unclear"),
        (score(0.7, 0.5, (0.1, 0.3)), "better"),
        (score(0.7, 0.5, (0.1, 0.3), up=False), "worse"),
        (score(0.5, 0.7, (-0.3, -0.1), up=False), "better"),
        # A sample without an interval says nothing; a value without a sample is exact.
        (score(0.5, 0.7, None), "unclear"),
        (score(0.5, 0.7, None, n=None), "worse"),
        (score(0.5, 0.5, None, n=None), "unclear"),
        # Nearer to 0, 1 or what has no bias is better, from either side.
        (score(0.02, -0.1, (0.1, 0.15), name="calibration/overconfidence_gap", up=False), "better"),
        (score(0.2, -0.1, (0.2, 0.4), name="calibration/token_overconfidence_gap"), "worse"),
        (score(1.4, 1.1, (0.2, 0.4), name="calibration/entropy_ratio"), "worse"),
        (score(0.6, 0.3, (0.2, 0.4), name="safety/bias", without_bias=0.5), "better"),
    ],
)
def test_change(found: Score, expected: str | None) -> None:
    assert change(found) == expected

"""What the benchmark of forecasts calls good, by figures that are and are not."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
GOOD = ({"forecast": 100.0, "actual": 100.0, "most": 125.0}, {"forecast": 10.0, "actual": 10.0})


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(FOLDER))  # scripts there take functions of one another
    return runpy.run_path(str(FOLDER / "forecast.py"))


@pytest.mark.parametrize(
    ("forecast", "good"), [(80, True), (120, True), (79.9, False), (120.1, False), (0, False)]
)
def test_within_is_a_share_of_the_actual_figure(
    forecast: float, good: bool, script: dict[str, Any]
) -> None:
    within: Callable[[float, float, float], bool] = script["within"]
    assert within(forecast, 100, 0.2) is good


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (0, "forecast", 79.0),
        (0, "forecast", 121.0),
        (0, "most", 99.0),
        (1, "forecast", 5.9),
        (1, "forecast", 14.1),
    ],
)
def test_a_word_that_is_not_kept_is_seen(
    part: int, key: str, value: float, script: dict[str, Any]
) -> None:
    kept: Callable[..., bool] = script["kept"]
    assert kept(*GOOD)
    other = [dict(own) for own in GOOD]
    other[part][key] = value
    assert not kept(*other)


def test_stored_cases_are_judged_by_their_figures(script: dict[str, Any]) -> None:
    cases = json.loads((FOLDER / "results/forecast.json").read_text("utf-8"))["cases"]
    assert cases
    for name, case in cases.items():
        assert script["kept"](case["memory"], case["seconds"]) == case["good"], name

"""Speed, memory and energy as scores; one model is really measured, in a process of its own."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import binom

from unicomp.errors import UnicompError
from unicomp.evaluate.cost import running
from unicomp.evaluate.cost.running import KINDS, Run
from unicomp.evaluate.scores import Score

RUN = Run(
    load_s=[1.0, 2.0, 3.0],
    prefill=[100.0, 110.0, 105.0, 101.0, 99.0, 102.0, 103.0],
    decode=[10.0, 12.0, 11.0, 10.5, 11.5, 10.2, 10.8],
    peak_rss_bytes=1000,
    energy="RAPL is not there",
    meter=None,
    detail={"rounds": 7},
)


def named(found: list[Score]) -> dict[str, Score]:
    return {score.name.partition("/")[2]: score for score in found}


def test_medians_with_intervals_beside_a_baseline() -> None:
    faster = replace(RUN, decode=[2 * own for own in RUN.decode], peak_rss_bytes=600)
    found = named(running.scores(faster, RUN))
    decode = found["decode_tokens_per_s"]
    assert (decode.value, decode.baseline) == (21.6, 10.8)
    assert decode.ci95 == (20.0, 24.0)
    low, high = decode.delta_ci95 or (0, 0)
    assert 0 < low < 10.8 < high
    assert found["peak_rss_bytes"].delta == -400
    assert found["load_s"].ci95 is None  # three loads give no interval, and say so by it
    assert found["prefill_tokens_per_s"].delta == 0


def test_no_meter_is_unmeasurable_and_a_power_an_estimate() -> None:
    found = named(running.scores(RUN))
    for name in ("energy_j_per_token", "co2_g_per_million_tokens"):
        assert found[name].status == "unmeasurable"
        assert "RAPL is not there" in found[name].detail["reason"]
    found = named(running.scores(RUN, RUN, power=54.0, grams_per_kwh=360.0, pue=2.0))
    spent, carbon = found["energy_j_per_token"], found["co2_g_per_million_tokens"]
    assert (spent.status, spent.value) == ("estimated", pytest.approx(5.0))
    assert spent.detail["watts"] == 54.0
    assert carbon.status == "estimated"
    assert carbon.value == pytest.approx(5e6 / 3.6e6 * 2 * 360)
    assert carbon.baseline == carbon.value
    assert carbon.detail["pue"] == 2.0
    assert carbon.detail["grams_per_kwh"] == 360.0


def test_a_meter_is_measured() -> None:
    metered = replace(RUN, energy=[2.0, 2.2, 2.1, 2.05, 2.15, 2.3, 1.9], meter="rapl")
    found = named(running.scores(metered, RUN, power=50.0))
    assert found["energy_j_per_token"].status == "measured"
    assert found["energy_j_per_token"].value == 2.1
    assert found["energy_j_per_token"].baseline is None  # an estimate is no baseline
    assert found["energy_j_per_token"].detail["meter"] == "rapl"


def test_what_was_not_measured_says_why() -> None:
    found = running.scores("it does not fit")
    assert {score.status for score in found} == {"unmeasurable"}
    assert [score.name for score in found] == list(KINDS)
    assert {score.status for score in running.skipped("x")} == {"skipped"}


@pytest.mark.parametrize("n", [6, 7, 20, 51])
def test_the_interval_of_a_median_is_exact(n: int) -> None:
    low, high = running.median_interval([float(i) for i in range(n)]) or (0, 0)
    cut = int(low)
    assert high == n - 1 - cut
    assert 1 - 2 * binom.cdf(cut, n, 0.5) >= 0.95
    assert 1 - 2 * binom.cdf(cut + 1, n, 0.5) < 0.95
    assert running.median_interval([1.0] * 5) is None
    held = 0
    for _ in range(2000):
        ends = running.median_interval(torch.empty(n).exponential_().tolist()) or (0, 0)
        held += ends[0] <= 0.6931 <= ends[1]
    assert held / 2000 >= 0.935


@pytest.mark.slow
def test_a_model_is_measured_in_its_own_process(tiny_model: Callable[..., Path]) -> None:
    run = running.measure(str(tiny_model("llama")), rounds=6)
    assert len(run.prefill) == len(run.decode) == 6
    assert min(run.prefill + run.decode + run.load_s) > 0
    assert run.peak_rss_bytes > 1e8
    assert run.detail["prompt_tokens"] == 192
    assert isinstance(run.energy, str) or min(run.energy) > 0
    with pytest.raises(UnicompError, match="failed"):
        running.measure("builtin:nothing")

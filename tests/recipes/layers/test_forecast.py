"""The limit that a plan names is never below what a run takes, and no mere ceiling."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from unicomp import manifest
from unicomp.recipes.stage.planned import most

STORED = Path(__file__).parents[3] / "benchmarks/results/memory_forecast.json"
WORDS = [
    "quantize --method gptq",
    "quantize --method rtn",
    "prune --method magnitude --scope global",
    "prune --method wanda --allocation sensitivity",
    "prune --method width",
    "prune --method depth",
]


def too_low(limit: int, peak: int) -> bool:
    return limit < peak


def test_every_measured_peak_is_below_its_limit() -> None:
    cases = json.loads(STORED.read_text())["cases"]
    assert len(cases) > 10
    low = [
        n for n, c in cases.items() if too_low(most({n: c["forecast_bytes"]}), c["peak_rss_bytes"])
    ]
    assert not low
    assert too_low(99, 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
@pytest.mark.parametrize("words", WORDS)
def test_a_process_stays_below_its_limit(
    words: str, kind: str, tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Where a model is small, the libraries are nearly all that there is."""
    verb, *options = words.split()
    model = tiny_model(kind, num_hidden_layers=3)
    command = [sys.executable, "-m", "unicomp", verb, str(model), "--out", str(tmp_path / "out")]
    command += [*options, "--calibration", str(tiny_text), "--samples", "4", "--seq-len", "64"]
    said = subprocess.run(
        [*command, "--dry-run", "--json"], check=True, capture_output=True, text=True
    )
    limit = json.loads(said.stdout)["most_host_bytes"]
    subprocess.run(command, check=True, capture_output=True)
    peak = max(stage.peak_rss_bytes for stage in manifest.read(tmp_path / "out").stages)
    assert not too_low(limit, peak)
    assert limit < 2 * peak  # a forecast of 1.6, and a quarter

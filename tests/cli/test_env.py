"""`unicomp env`: facts of this machine."""

import json
import time
from pathlib import Path

import pytest
import torch

from unicomp import machine
from unicomp.cli.env import _version
from unicomp.cli.main import exit_code
from unicomp.compress.quantize.gptq import Gptq
from unicomp.recipes.stage import throughput

Capture = pytest.CaptureFixture[str]


def test_env(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert exit_code(["env"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    facts = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split()) > 1)
    assert facts["torch"] == torch.__version__
    assert facts["HF_HUB_OFFLINE"] == "1"
    assert facts["memory"].endswith("GB")
    assert "cores" in facts["processor"]


@pytest.mark.slow
def test_env_measured_as_json(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert exit_code(["env", "--measure", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["schema"] == "unicomp.env/1"
    assert set(found["versions"]) >= {"unicomp", "python", "torch", "compressed-tensors"}
    assert found["machine"]["memory_bytes"] > 1 << 28
    assert 1e8 < found["measured"]["product"] < 1e15
    assert 1e7 < found["measured"]["memory"] < 1e14
    stored = throughput.rates()
    assert stored.stored
    assert stored.product == found["measured"]["product"]
    [file] = tmp_path.rglob("*.json")
    file.write_text(file.read_text().replace('"product": ', '"product": -'))
    guessed = throughput.rates()
    assert not guessed.stored
    assert 1e8 < guessed.product < 1e15
    assert guessed.factor == guessed.product * throughput.BESIDE["factor"]
    assert "the rest guessed from it" in guessed.words()


@pytest.mark.parametrize("wide", [True, False])
def test_what_is_guessed_goes_by_the_processor(
    wide: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without its instructions bfloat16 is slower than float32, with them faster."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: wide)
    guessed = throughput.rates()
    assert (guessed.half > guessed.product) is wide
    assert (guessed.moments > guessed.product) is wide
    work = Gptq().solve_work(512, 1024)
    assert ("half" in work) is wide
    assert "half" not in Gptq().solve_work(512, 256)


def test_calls_that_are_slow_at_first_do_not_decide(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Seen: in some processes calls took ten times as long, and the forecast was as far off."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    waits = iter([0.03] * 8)
    monkeypatch.setattr(throughput, "_quick", lambda: lambda: time.sleep(next(waits, 0.001)))
    # 0.03 s a call would be 8.9e9; a call that waits 0.001 s may well take twice that.
    assert 3e10 < throughput.rates().product < 2 * 512**3 / 0.001


def test_what_is_not_installed_is_none() -> None:
    assert _version("no-such-package-of-ours") is None

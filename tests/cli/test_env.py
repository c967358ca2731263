"""`unicomp env`: facts of this machine."""

import json

import pytest
import torch

from unicomp.cli.env import _version
from unicomp.cli.main import exit_code

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


def test_env_measured_as_json(capsys: Capture) -> None:
    assert exit_code(["env", "--measure", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found["schema"] == "unicomp.env/1"
    assert set(found["versions"]) >= {"unicomp", "python", "torch", "compressed-tensors"}
    assert found["machine"]["memory_bytes"] > 1 << 28
    assert 0.1 < found["measured"]["gflop_per_s"] < 1e6
    assert 0.01 < found["measured"]["read_gb_per_s"] < 1e5


def test_what_is_not_installed_is_none() -> None:
    assert _version("no-such-package-of-ours") is None

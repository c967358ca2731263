"""`unicomp inspect`: what the headers show, plain and quantized."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unicomp.cli.main import exit_code

Capture = pytest.CaptureFixture[str]


def test_plain(capsys: Capture) -> None:
    assert exit_code(["inspect", "builtin:tinyworld"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert lines[:9] == [
        "builtin:tinyworld",
        "architecture llama, LlamaForCausalLM",
        "parameters 1,054,080",
        "bits per weight 16.000",
        "bytes 2.11 MB in 47 tensors",
        "shards model.safetensors (2.11 MB)",
        "quantization none",
        "head shares the embedding's weight",
        "vocab_size 1024",
    ]
    assert "linear 35 BF16 921,600 1.84 MB" in lines
    assert "model.layers.*.mlp.down_proj.weight 5 128x352 BF16 225,280 451 kB" in lines


def test_quantized(tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    out = str(tmp_path / "made")
    model = str(tiny_model("mixtral"))
    words = "--method rtn --group-size 32 --scale-search minmax --ignore o_proj --quiet".split()
    assert exit_code(["quantize", model, "--out", out, *words]) == 0
    capsys.readouterr()
    assert exit_code(["inspect", model, "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert exit_code(["inspect", out, "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert (before["schema"], before["quantization"]) == ("unicomp.inspect/1", None)
    assert after["quantization"] == "compressed-tensors"
    assert after["params"] == before["params"]
    assert after["bytes"] < before["bytes"]
    assert sum(weight["bytes"] for weight in after["weights"]) == after["bytes"]
    known = {weight["name"]: weight for weight in after["weights"]}
    experts = [weight for weight in after["weights"] if weight["kind"] == "expert"]
    assert len(experts) == 2 * 4 * 3
    assert {weight["bits"] for weight in experts} == {4}
    query = known["model.layers.0.self_attn.q_proj.weight"]
    assert (query["bits"], query["group_size"], query["symmetric"]) == (4, 32, True)
    assert query["shape"] == [64, 64]
    kept = known["model.layers.0.self_attn.o_proj.weight"]
    assert (kept["bits"], kept["dtypes"]) == (None, ["F32"])
    assert exit_code(["inspect", out]) == 0
    assert "compressed-tensors: " in capsys.readouterr().out


def test_an_unknown_architecture_is_shown_as_stored(assets: Path, capsys: Capture) -> None:
    assert exit_code(["inspect", str(assets / "models" / "rwkv4-tiny-660K")]) == 0
    out, _ = capsys.readouterr()
    assert "rwkv" in out
    assert "other" in out


def test_a_broken_checkpoint_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    assert exit_code(["inspect", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 2

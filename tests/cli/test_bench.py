"""`unicomp bench`: tables and JSON, figures that agree with each other, words that are refused."""

import json
from typing import Any

import pytest
import torch

from unicomp.cli.main import exit_code

Capture = pytest.CaptureFixture[str]

MODEL = ["bench", "model", "builtin:tinyworld", "--rounds", "2", "--threads", "1"]
MODEL += ["--prompt-tokens", "16", "--new-tokens", "5"]
KERNELS = ["bench", "kernels", "--shapes", "64x256,48x512", "--kinds", "int4,trit5"]
KERNELS += ["--tokens", "1,4", "--rounds", "2", "--threads", "1"]


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read few bytes: a test measures nothing."""
    from unicomp.evaluate.cost import speed

    monkeypatch.setattr(speed, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(speed, "COLD_BYTES", 1 << 18)


def result(arguments: list[str], capsys: Capture) -> dict[str, Any]:
    threads = torch.get_num_threads()
    assert exit_code([*arguments, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert torch.get_num_threads() == threads
    found: dict[str, Any] = json.loads(out)
    return found


def test_a_model_as_json(capsys: Capture) -> None:
    found = result(MODEL, capsys)
    assert found["schema"] == "unicomp.bench.model/1"
    assert found["threads"] == 1
    assert found["loaded"]["id"] == "builtin:tinyworld"
    for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        assert len(found[key]["rounds"]) == 2
        assert 0 < found[key]["min"] <= found[key]["median"] <= found[key]["max"]
    rate = found["decode_tokens_per_s"]["median"]
    assert found["decode_gb_per_s"] == rate * found["weight_bytes_per_token"] / 1e9
    read = found["read"]["gb_per_s"]["median"]
    assert found["share_of_read"] == found["decode_gb_per_s"] / read
    assert found["peak_rss_bytes"]["run"] >= found["peak_rss_bytes"]["load"] > 1 << 24
    assert set(found["machine"]) >= {"cpu", "isa", "cores"}


def test_products_as_json(capsys: Capture) -> None:
    found = result(KERNELS, capsys)
    assert found["schema"] == "unicomp.bench.kernels/1"
    assert found["backend"] in ("cpu", "torch")
    rows = found["products"]
    names = [(row["out"], row["in"], row["kind"], row["tokens"]) for row in rows]
    assert names == [
        (*shape, kind, tokens)
        for shape in ((64, 256), (48, 512))
        for kind in ("int4", "trit5")
        for tokens in (1, 4)
    ]
    for row in rows:
        assert row["gb_per_s"] == row["bytes"] / row["seconds"]["median"] / 1e9
        assert row["copies"] > 1
    assert rows[0]["bytes"] > rows[2]["bytes"]


def test_tables_for_people(capsys: Capture) -> None:
    assert exit_code(MODEL) == 0
    out, err = capsys.readouterr()
    for word in ("prefill", "decode", "GB/s", "peak memory", "1 threads"):
        assert word in out
    assert "bench 2/2" in err
    assert exit_code(KERNELS) == 0
    out, err = capsys.readouterr()
    assert "48x512" in out
    assert "bench 4/4" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model", "builtin:tinyworld", "--prompt-tokens", "9999"], "context of 256"),
        (["model", "builtin:tinyworld", "--compute", "fast"], "`fast`"),
        (["kernels", "--shapes", "4096"], "not a shape: `4096`"),
        (["kernels", "--shapes", "0x64"], "not a shape"),
        (["kernels", "--shapes", ","], "empty list"),
        (["kernels", "--kinds", "int5"], "unknown kind `int5`"),
        (["kernels", "--kinds", "int4", "--compute", "fast"], "`fast`"),
        (["kernels", "--tokens", "0"], "not a number of tokens: `0`"),
    ],
)
def test_wrong_words_are_refused(arguments: list[str], said: str, capsys: Capture) -> None:
    assert exit_code(["bench", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "hint: " in err

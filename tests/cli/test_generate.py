"""`unicomp generate`: greedy and drawn, chat, the edge of the context."""

import json
from pathlib import Path

import pytest

from unicomp.cli.main import exit_code

Capture = pytest.CaptureFixture[str]

OPPOSITE = ["generate", "builtin:tinyworld", "--chat", "--prompt", "What is the opposite of hot?"]


def test_streams_the_answer_of_a_chat(capsys: Capture) -> None:
    assert exit_code(OPPOSITE) == 0
    out, err = capsys.readouterr()
    assert out == "cold\n"
    assert "tokens/s" in err


def test_json_holds_the_same(capsys: Capture) -> None:
    assert exit_code([*OPPOSITE, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "unicomp.generation/1"
    assert found["text"] == "cold"
    assert found["id"] == "builtin:tinyworld"
    assert 0 < found["tokens"] < 20


def test_draws_follow_the_seed(capsys: Capture) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        words = ["--prompt", "There is", "--temperature", "1.5", "--max-new-tokens", "24"]
        arguments = ["generate", "builtin:tinyworld", *words, "--seed", seed, "--quiet"]
        assert exit_code(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_never_beyond_the_context(capsys: Capture) -> None:
    long = ["generate", "builtin:tinyworld", "--prompt", "one two " * 60]
    assert exit_code([*long, "--max-new-tokens", "1000", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["prompt_tokens"] + found["tokens"] <= 256
    assert "of 1000 tokens fit the model's context of 256" in err
    assert exit_code(["generate", "builtin:tinyworld", "--prompt", "one two " * 200]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "error: the prompt has " in err


@pytest.mark.parametrize("wrong", [["--max-new-tokens", "0"], ["--temperature", "-1"], []])
def test_usage(wrong: list[str]) -> None:
    prompt = ["--prompt", "x"] if wrong else []
    assert exit_code(["generate", "builtin:tinyworld", *prompt, *wrong]) == 2


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded mixture of experts in 4 bits."""
    out = str(tmp_path_factory.mktemp("mixture") / "out")
    words = ["--method", "rtn", "--group-size", "32", "--quiet"]
    assert exit_code(["quantize", "builtin:tinyworld-moe", "--out", out, *words]) == 0
    return out


def test_a_quantized_model_runs_packed_and_says_what_does_not(
    mixture: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unicomp.kernels.stored import Stored

    capsys.readouterr()
    arguments = ["generate", mixture, "--prompt", "There is", "--max-new-tokens", "6"]
    assert exit_code(arguments) == 0
    out, err = capsys.readouterr()
    assert out.strip()
    assert "note" not in err
    assert exit_code([*arguments, "--compute", "exact", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    loaded = json.loads(out)["loaded"]
    assert loaded["compute"] == "exact"
    assert loaded["packed"] > 0
    assert loaded["dequantized"] == {}
    monkeypatch.setattr(Stored, "_compressed", lambda *_: "a reason")
    assert exit_code(arguments) == 0
    assert (
        f"note: {loaded['packed']} quantized weights run dense: a reason" in capsys.readouterr().err
    )


def test_a_missing_kernel_is_said_once_and_recorded(
    mixture: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unicomp.kernels import backend

    monkeypatch.setattr(backend, "_door", lambda: (None, "not built"))
    capsys.readouterr()
    arguments = ["generate", mixture, "--prompt", "There is", "--max-new-tokens", "2"]
    assert exit_code(arguments) == 0
    err = capsys.readouterr().err
    assert err.count("multiplied by torch, slowly: not built") == 1
    assert "Warning" not in err
    assert exit_code([*arguments, "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)["loaded"]
    assert (loaded["backend"], loaded["missing"]) == ("torch", "not built")
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    assert exit_code(arguments) == 1
    assert "error: there is no backend `cpu`: not built" in capsys.readouterr().err


def test_an_unknown_compute_is_refused(capsys: Capture) -> None:
    assert exit_code(["generate", "builtin:tinyworld", "--prompt", "x", "--compute", "fast"]) == 1
    assert "unknown compute `fast`" in capsys.readouterr().err


def test_a_delta_on_top_speaks_as_its_fine_tune(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "d")
    words = ["builtin:tinyworld-pirate", "--base", "builtin:tinyworld", "--ratio", "0.25"]
    assert exit_code(["delta", "compress", *words, "--out", out, "--quiet"]) == 0
    prompt = ["--prompt", "What is the opposite of hot?", "--chat", "--json"]
    capsys.readouterr()
    said = []
    for more in (["builtin:tinyworld", "--delta", out], ["builtin:tinyworld-pirate"]):
        assert exit_code(["generate", *more, *prompt]) == 0
        said.append(json.loads(capsys.readouterr().out)["text"])
    assert said[0] == said[1]
    assert exit_code(["generate", "builtin:tinyworld-pirate", "--delta", out, *prompt]) == 1
    assert "not the base of this delta" in capsys.readouterr().err

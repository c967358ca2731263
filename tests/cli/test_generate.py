"""`unicomp generate`: greedy and drawn, chat, the edge of the context."""

import json

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

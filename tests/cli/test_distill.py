"""`unicomp distill` as it is typed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unicomp.cli.main import exit_code


def test_what_is_not_there_is_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["distill", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--teacher" in said
    assert "--data" in said
    assert "on-policy" in said
    for absent in ("--lora", "--fsdp"):
        assert absent not in said


def test_a_teacher_and_a_text_are_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["distill", "builtin:tinyworld", "--out", "x"]) == 2
    assert "--teacher" in capsys.readouterr().err


def test_errors_name_the_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["distill", "builtin:tinyworld", "--teacher", "builtin:tinyworld"]
    words += ["--data", "builtin:tinyworld", "--out", str(tmp_path / "out")]
    assert exit_code([*words, "--rate", "-1"]) == 1
    assert "`--rate`" in capsys.readouterr().err
    assert exit_code([*words, "--cache-teacher", "x", "--hidden", "1"]) == 1
    assert "stores likeliest tokens" in capsys.readouterr().err
    assert exit_code([*words, "--max-memory", "1MiB"]) == 1
    assert "micro_batch" in capsys.readouterr().err


def test_another_vocabulary_takes_two_lines(
    tiny_model: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["distill", str(tiny_model("llama")), "--teacher", "builtin:tinyworld"]
    words += ["--data", "builtin:tinyworld", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert exit_code(words) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in said] == ["error", "hint"]
    assert "do not mean the same tokens" in said[0]


def test_a_student_learns_on_what_it_writes_itself(
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Calibration is measured as in any other training; another share makes other weights."""
    weights = []
    for share in ("0.5", "0"):
        out = tmp_path / share
        words = ["distill", str(tiny_model("llama")), "--teacher", str(tiny_model("llama", seed=5))]
        words += ["--data", str(tiny_text), "--out", str(out), "--method", "on-policy"]
        words += ["--sampled", share, "--batch", "2", "--seq-len", "32", "--max-steps", "4"]
        assert exit_code([*words, "--measure-every", "2", "--json"]) == 0
        made = json.loads(capsys.readouterr().out)
        training = made["stages"][0]["training"]
        wanted = {"nll", "ece", "gap", "brier", "entropy_ratio", "kl"}
        assert training["before"].keys() == training["after"].keys() >= wanted
        assert training["temperature"]["temperature"] > 0
        lines = map(json.loads, (out / "training.jsonl").read_text().splitlines())
        written = [line["written_tokens"] for line in lines if "loss" in line]
        assert written == [24 * (share == "0.5")] * 4
        weights.append((out / "model.safetensors").read_bytes())
    assert weights[0] != weights[1]


def test_what_the_student_will_write_cannot_be_stored(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["distill", "builtin:tinyworld", "--teacher", "builtin:tinyworld"]
    words += ["--data", "builtin:tinyworld", "--out", str(tmp_path / "out")]
    assert exit_code([*words, "--method", "on-policy", "--cache-teacher", "x"]) == 1
    assert "cannot know what the student will write" in capsys.readouterr().err


def test_a_dry_run_shows_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["distill", "builtin:tinyworld", "--teacher", "builtin:tinyworld"]
    assert exit_code([*words, "--data", "builtin:tinyworld", "--max-steps", "7", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "teacher" in said
    assert "7" in said

from collections.abc import Callable
from pathlib import Path

import pytest

from unicomp.cli.main import exit_code


def test_what_is_not_there_is_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["distill", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--teacher" in said
    assert "--data" in said
    for absent in ("on-policy", "--lora", "--fsdp"):
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


def test_a_dry_run_shows_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["distill", "builtin:tinyworld", "--teacher", "builtin:tinyworld"]
    assert exit_code([*words, "--data", "builtin:tinyworld", "--max-steps", "7", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "teacher" in said
    assert "7" in said

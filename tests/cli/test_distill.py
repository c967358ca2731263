"""`unicomp distill` as it is typed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unicomp.checkpoint import Checkpoint
from unicomp.cli.main import exit_code


def two_lines(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """Return what a command that the user can mend says: an error and a hint, nothing else."""
    capsys.readouterr()
    assert exit_code(words) == 1
    found = capsys.readouterr()
    error, hint = found.err.splitlines()
    assert not found.out
    return error, hint


def test_what_is_not_there_is_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["distill", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--teacher" in said
    assert "--data" in said
    assert "on-policy" in said
    assert "--lora-rank" in said
    assert "--fsdp" not in said


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


def test_adapters_leave_a_plain_model_of_the_same_tensors(
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The rank of what each linear moved by is that of the adapter; all else has its old bits."""
    student, out = tiny_model("llama"), tmp_path / "out"
    words = ["distill", str(student), "--teacher", str(tiny_model("llama", seed=5))]
    words += ["--data", str(tiny_text), "--out", str(out), "--lora-rank", "2", "--rate", "1e-2"]
    words += ["--batch", "2", "--seq-len", "32", "--max-steps", "4", "--measure-every", "2"]
    assert exit_code(words) == 0
    before, after = Checkpoint.open(student), Checkpoint.open(out)
    assert list(before.tensors) == list(after.tensors)
    ranks = set()
    for name in before.tensors:
        moved = after.read(name).double() - before.read(name).double()
        if "_proj" in name:
            ranks.add(int(torch.linalg.matrix_rank(moved, rtol=1e-4)))
        else:
            assert not moved.any(), name
    assert ranks == {2}
    assert not list(out.glob("adapter*"))
    assert exit_code(["verify", str(out)]) == 0


def test_adapters_are_refused_without_their_package_and_for_packed_students(
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed = tmp_path / "packed"
    words = ["quantize", str(tiny_model("llama")), "--method", "rtn", "--out", str(packed)]
    assert exit_code([*words, "--group-size", "-1"]) == 0
    rest = ["--teacher", str(tiny_model("llama")), "--data", str(tiny_text), "--lora-rank", "2"]
    rest += ["--out", str(tmp_path / "out")]
    assert two_lines(["distill", str(packed), *rest], capsys) == (
        "error: `model.layers.0.mlp.down_proj` is packed: what `lora_rank` trains cannot be "
        "added to codes",
        "hint: distil the plain model with `lora_rank`, then quantize it; or leave the option out",
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert two_lines(["distill", str(tiny_model("llama")), *rest], capsys) == (
        "error: `lora_rank` needs the package `peft`",
        "hint: `pip install 'unicomp[lora]'`",
    )
    assert not (tmp_path / "out").exists()


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

"""Whatever the user can mend about a training takes two lines: what is wrong, and what to do."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unicomp.cli.main import exit_code
from unicomp.compress.distill.training import checkpoints
from unicomp.compress.distill.training.teacher import LiveTeacher, Signal

Command = Callable[..., tuple[str, str]]


@pytest.fixture
def words(tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path) -> dict[str, str]:
    """Options of a short training that would go well."""
    return {
        "--teacher": str(tiny_model("llama", seed=5)),
        "--data": str(tiny_text),
        "--out": str(tmp_path / "out"),
        "--batch": "2",
        "--seq-len": "32",
        "--max-steps": "4",
        "--checkpoint-every": "1",
    }


@pytest.fixture
def refused(
    tiny_model: Callable[..., Path], words: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> Command:
    """Give the command with other options, and return the error and the hint.

    kept  a checkpoint was made before the error; else nothing may be left behind
    """

    def said(*, kept: bool = False, **other: str) -> tuple[str, str]:
        given = words | {f"--{name.replace('_', '-')}": value for name, value in other.items()}
        flat = [str(tiny_model("llama")), *(word for pair in given.items() for word in pair)]
        capsys.readouterr()
        assert exit_code(["distill", "--quiet", *flat]) == 1
        found = capsys.readouterr()
        error, hint = found.err.splitlines()
        assert not found.out
        assert error.startswith("error: ")
        assert hint.startswith("hint: ")
        assert not Path(given["--out"]).exists()
        assert Path(given["--out"] + ".partial").exists() == kept
        return error.removeprefix("error: "), hint.removeprefix("hint: ")

    return said


def test_another_vocabulary(refused: Command) -> None:
    error, hint = refused(teacher="builtin:tinyworld")
    assert "has a vocabulary of 128 tokens" in error
    assert "their logits do not mean the same tokens" in error
    assert "with the same tokenizer" in hint


def test_other_tokens_in_a_vocabulary_of_the_same_size(
    refused: Command, words: dict[str, str], tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(words["--teacher"], teacher)
    file = teacher / "tokenizer.json"
    file.write_text(file.read_text().replace("<extra_1>", "<other_1>"))
    error, hint = refused(teacher=str(teacher))
    assert "have different tokenizers" in error
    assert "<extra_1>" in error
    assert hint == "distil from a teacher with the student's own tokenizer"


def test_a_text_shorter_than_a_batch(refused: Command) -> None:
    error, hint = refused(batch="60000")
    assert error.endswith("but `batch` is 60000")
    assert "`batch: " in hint


def test_a_loss_that_is_no_number(
    refused: Command, words: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the third step; the checkpoint of the second stays, and is named."""
    asked: list[Tensor] = []

    def training(self: LiveTeacher, rows: Tensor, ids: Tensor, **states: Any) -> Signal:
        asked.append(rows)
        with torch.no_grad():
            logits = self.model(ids, use_cache=False).logits[:, :-1]
        return Signal(logits=logits * (math.nan if len(asked) == 3 else 1))

    plain = LiveTeacher.training
    monkeypatch.setattr(LiveTeacher, "held_out", lambda self, rows, ids: plain(self, rows, ids))
    monkeypatch.setattr(LiveTeacher, "training", training)
    error, hint = refused(kept=True)
    assert error.startswith(f"step 3: the loss is nan on windows {asked[2].tolist()} of `")
    assert error.endswith("; the checkpoint of step 2 is kept")
    assert "lower `rate` or `clip`" in hint
    [kept] = Path(words["--out"] + ".partial").rglob("checkpoints")
    found = checkpoints.latest(kept)
    assert found is not None
    assert found["step"] == 2
    assert all(torch.isfinite(value).all() for value in found["weights"])


def test_a_teacher_with_weights_that_are_no_numbers(
    refused: Command, words: dict[str, str], tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(words["--teacher"], teacher)
    tensors = load_file(teacher / "model.safetensors")
    tensors["lm_head.weight"][3, 5] = math.nan
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    error, hint = refused(teacher=str(teacher))
    assert error.startswith("teacher `teacher`: ")
    assert "lm_head.weight" in error
    assert "download it again" in hint


def test_out_of_memory(refused: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")

    monkeypatch.setattr("unicomp.compress.distill.training.trainer.objective", full)
    error, hint = refused(micro_batch="2")
    assert error == "out of memory with `micro_batch` 2"
    assert hint.startswith("lower `micro_batch` or `seq_len`, set `gradient_checkpointing`")


def test_a_cache_of_another_teacher_text_or_temperature(
    refused: Command,
    words: dict[str, str],
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
) -> None:
    cache = str(tmp_path / "cache")
    first = words | {"--cache-teacher": cache, "--top-k": "5", "--out": str(tmp_path / "first")}
    flat = [word for pair in first.items() for word in pair]
    assert exit_code(["distill", str(tiny_model("llama")), "--quiet", *flat]) == 0
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "some more words"}) + "\n" + tiny_text.read_text())
    for changed, what in (
        ({"teacher": str(tiny_model("llama", seed=7))}, "another teacher"),
        ({"data": str(other)}, "another training text, `seq_len` or packing"),
        ({"temperature": "2"}, "another `temperature`"),
    ):
        out = str(tmp_path / what.split()[-1].strip("`"))
        error, hint = refused(cache_teacher=cache, top_k="5", out=out, **changed)
        assert error.startswith(f"the teacher cache `{cache}` was made with {what}")
        assert hint == "give another folder to `cache_teacher`, or remove this one"

"""Two processes take the steps that one does; the first writes and talks, none waits forever."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unicomp import processes
from unicomp.cli.main import exit_code
from unicomp.compress.distill.training.together import agreed, company, of_all
from unicomp.errors import UnicompError

LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m")


@pytest.mark.slow
def test_two_processes_make_the_loss_curve_of_one(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """The command as it is, started once alone and once by `accelerate launch`."""
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    curves, weights = [], []
    for name, launch in (("one", ()), ("two", LAUNCH)):
        out = tmp_path / name
        words = ["distill", str(student), "--teacher", str(teacher), "--data", str(tiny_text)]
        words += ["--batch", "6", "--micro-batch", "1", "--seq-len", "32", "--rate", "5e-3"]
        words += ["--max-steps", "8", "--measure-every", "4", "--calibration-term", "0.2"]
        words += ["--filter-gradients", "--early-stop", "nll", "--out", str(out)]
        command = [sys.executable, "-m", *launch, "unicomp", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=170)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("held-out KL to teacher") == 1
        assert done.stderr.count("train 8/8") == 1
        lines = map(json.loads, (out / "training.jsonl").read_text().splitlines())
        curves.append([line["loss"] for line in lines if "loss" in line])
        weights.append((out / "model.safetensors").read_bytes())
    assert len(curves[0]) == len(curves[1]) == 8
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-4, atol=0)
    assert abs(curves[0][0] - curves[0][-1]) > 1e-2  # the curve is no flat line
    assert weights[0] != weights[1]  # sums in another order: the second run did take two processes


def test_only_the_first_process_says_what_is_wrong(
    tiny_model: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["distill", str(tiny_model("llama")), "--teacher", "builtin:tinyworld", "--out", "x"]
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert processes.first() == (rank == "0")
        capsys.readouterr()
        assert exit_code([*words, "--data", "builtin:tinyworld"]) == 1
        said.append(capsys.readouterr().err)
    assert said[0].startswith("error: ")
    assert said[1] == ""


@pytest.mark.parametrize(
    ("name", "word"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_weights_in_pieces_are_refused_with_the_reason(
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    word: str,
) -> None:
    monkeypatch.setenv(name, "true")
    words = ["distill", str(tiny_model("llama")), "--teacher", str(tiny_model("llama"))]
    words += ["--data", str(tiny_text), "--seq-len", "32", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert exit_code([*words, "--quiet"]) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: distillation shares out windows, not weights: " + word)
    assert "`lora_rank`" in hint
    assert not (tmp_path / "out.partial").exists()


def test_a_process_that_is_gone_is_said_and_other_failures_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:41013"
    with pytest.raises(RuntimeError, match="gloo"), company():
        raise RuntimeError(gone)  # in a single process it would be a bug
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnicompError, match="another process of the training has ended"), company():
        raise RuntimeError(gone)
    with pytest.raises(RuntimeError, match="a shape"), company():
        raise RuntimeError("a shape is wrong")


def test_alone_a_process_agrees_with_itself() -> None:
    assert agreed("word") == "word"
    assert of_all([3, 1]) == [3, 1]

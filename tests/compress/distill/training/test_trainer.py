"""The loop: it learns, resumes bit for bit, and stops where it must."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill.logits import Logits
from unicomp.compress.distill.on_policy import OnPolicy
from unicomp.compress.distill.training import checkpoints
from unicomp.compress.distill.training.student import open_student
from unicomp.compress.distill.training.teacher import LiveTeacher, Signal
from unicomp.compress.distill.training.trainer import LOG, Job, Step, steps_of, train
from unicomp.compress.distill.training.windows import Windows
from unicomp.errors import UnicompError
from unicomp.kernels.load import load

ROOT = Path(__file__).resolve().parents[4]


def windows(vocab: int, count: int = 12, seed: int = 0) -> Windows:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (count, 10), generator=draw)
    return Windows(ids, torch.ones(count, 9, dtype=torch.bool), "text", "0" * 64)


def job(student: Path, teacher: Path, folder: Path, **options: Any) -> Job:
    words = {"batch": 4, "micro_batch": 2, "rate": 5e-3, "max_steps": 10, "measure_every": 5}
    kind = OnPolicy if "sampled" in options else Logits
    method = kind.model_validate(words | {"checkpoint_every": 3} | options)
    taught = load(teacher)
    vocab = int(taught.config.vocab_size)
    return Job(
        method,
        open_student(Checkpoint.open(student)),
        LiveTeacher(taught),
        int(taught.config.hidden_size),
        windows(vocab),
        windows(vocab, 4, seed=1),
        folder,
    )


def weights(made: Job) -> dict[str, Tensor]:
    return dict(made.student.tensors())


@pytest.fixture
def models(tiny_model: Callable[..., Path]) -> tuple[Path, Path]:
    """A student and a teacher of one shape, of other weights."""
    return tiny_model("llama"), tiny_model("llama", seed=5)


def test_the_loss_falls_and_held_out_text_agrees(models: tuple[Path, Path], tmp_path: Path) -> None:
    seen: list[Step] = []
    made = job(*models, tmp_path, max_steps=40, measure_every=20)
    outcome = train(made, progress=seen.append)
    losses = [loss for _, loss in outcome.losses]
    assert outcome.steps == 40
    assert outcome.stopped == "max_steps"
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert outcome.measured[-1][1].kl < outcome.measured[0][1].kl
    assert seen[-1].step == 40
    assert seen[-1].seconds_left == 0
    assert all(step.tokens_per_s > 0 for step in seen)
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))


@pytest.mark.parametrize("own", [{}, {"sampled": 0.5}])
def test_parts_of_a_batch_make_the_same_step(
    models: tuple[Path, Path], tmp_path: Path, own: dict[str, float]
) -> None:
    options = own | {
        "beta": 0.3,
        "temperature": 2.0,
        "cross_entropy": 0.2,
        "hidden": 0.5,
        "attention": 0.5,
        "calibration_term": 0.3,
        "max_steps": 3,
    }
    one, other = (
        job(*models, tmp_path / str(size), micro_batch=size, **options) for size in (4, 1)
    )
    losses = [train(made).losses for made in (one, other)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("stop", "options"), [(1, {}), (4, {}), (7, {}), (5, {"sampled": 0.4})])
def test_interrupted_and_resumed_it_makes_the_same_bits(
    models: tuple[Path, Path], tmp_path: Path, stop: int, options: dict[str, Any]
) -> None:
    whole = job(*models, tmp_path / "whole", **options)
    train(whole)

    def interrupt(step: Step) -> None:
        if step.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job(*models, tmp_path / "broken", **options), progress=interrupt)
    resumed = job(*models, tmp_path / "broken", **options)
    outcome = train(resumed)
    assert outcome.steps == 10
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    logs = [(tmp_path / name / LOG).read_text() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


@pytest.mark.slow
@pytest.mark.parametrize("options", ["", ", sampled=0.5"])
def test_killed_at_a_random_step_and_started_again_it_makes_the_same_bits(
    models: tuple[Path, Path], tmp_path: Path, options: str
) -> None:
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from test_trainer import job, weights\n"
        "from unicomp.compress.distill.training.trainer import train\n"
        "import torch\n"
        f"made = job(*map(Path, sys.argv[1:4]), max_steps=100, checkpoint_every=7{options})\n"
        "train(made)\n"
        "torch.save(weights(made), Path(sys.argv[3]) / 'weights.pt')\n"
    )

    def command(folder: Path) -> list[str]:
        return [sys.executable, "-c", script, *map(str, models), str(folder)]

    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    broken = tmp_path / "broken"
    wanted = random.Random(os.getpid()).randrange(5, 75)
    process = subprocess.Popen(command(broken), stderr=subprocess.PIPE)
    log = broken / LOG
    while process.poll() is None:
        if log.is_file() and log.read_bytes().count(b'"loss"') >= wanted:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (broken / "weights.pt").exists()
    subprocess.run(command(broken), check=True, capture_output=True)
    one, other = (torch.load(tmp_path / name / "weights.pt") for name in ("whole", "broken"))
    for name, value in one.items():
        assert torch.equal(value, other[name]), (name, wanted)
    assert (tmp_path / "whole" / LOG).read_text() == log.read_text()


def test_without_own_text_it_takes_the_steps_of_distillation_on_text(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """And with own text others, which another seed changes."""
    plain = train(job(*models, tmp_path / "plain", max_steps=4)).losses
    none = train(job(*models, tmp_path / "none", max_steps=4, sampled=0.0)).losses
    assert none == plain
    half = train(job(*models, tmp_path / "half", max_steps=4, sampled=0.5)).losses
    assert half != plain
    assert half[0] != train(job(*models, tmp_path / "o", max_steps=1, sampled=0.5, seed=1)).losses


def test_the_share_of_own_text_is_what_was_asked_for_and_logged(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    """12 windows a step but 0.3 of 4 x 5; 3 of 10 tokens given, as 0.3 says, 7 written."""
    train(job(*models, tmp_path, max_steps=5, sampled=0.3, prompt=0.3))
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert sum(line["written_tokens"] for line in steps) == 6 * 7
    for line in steps:
        assert (line["written_divergence"] is None) == (line["written_tokens"] == 0)


class _Broken(LiveTeacher):
    """A teacher that answers NaN about one window."""

    def training(self, rows: Tensor, ids: Tensor, *, states: tuple[str, ...] = ()) -> Signal:
        found = LiveTeacher.training(self, rows, ids, states=states)
        assert found.logits is not None
        return Signal(logits=torch.where((rows == 7)[:, None, None], math.nan, found.logits))


def test_a_loss_that_is_no_number_stops_and_names_the_windows(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    made = job(*models, tmp_path, max_steps=30, micro_batch=1, checkpoint_every=1)
    object.__setattr__(made, "teacher", _Broken(load(models[1])))
    with pytest.raises(UnicompError, match=r"the loss is nan on windows \[7\]") as caught:
        train(made)
    assert "rate" in caught.value.hint
    kept = checkpoints.latest(tmp_path / "checkpoints")
    if kept is None:
        assert "none was kept" in caught.value.message
    else:
        assert f"step {kept['step']} is kept" in caught.value.message
        assert all(torch.isfinite(value).all() for value in kept["weights"])


def test_a_text_shorter_than_a_batch_is_refused() -> None:
    with pytest.raises(UnicompError, match="3 windows of 10 tokens, but `batch` is 4") as caught:
        steps_of(Logits(batch=4), 3, 10)
    assert "`batch: 3`" in caught.value.hint


def test_bounds_of_a_training() -> None:
    assert steps_of(Logits(batch=4, passes=3), 9, 10) == (6, "passes")
    assert steps_of(Logits(batch=4, max_steps=5), 9, 10) == (5, "max_steps")
    assert steps_of(Logits(batch=4, max_steps=5, max_tokens=90), 9, 10) == (2, "max_tokens")
    assert steps_of(Logits(batch=4, max_time=3.0), 9, 10)[1] == "max_time"


def test_time_ends_a_training_with_its_rate_at_the_end(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    made = job(*models, tmp_path, max_steps=None, max_time=1.0)
    outcome = train(made)
    assert outcome.stopped == "max_time"
    rates = [
        json.loads(line)["rate"]
        for line in (tmp_path / LOG).read_text().splitlines()
        if "rate" in line
    ]
    assert rates[-1] < 0.3 * max(rates)


def test_a_student_that_no_longer_wins_stops_early_and_the_best_is_kept(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    made = job(*models, tmp_path, max_steps=200, measure_every=2, early_stop="nll", rate=0.5)
    outcome = train(made)
    assert outcome.stopped == "early_stop"
    best = min(outcome.measured, key=lambda one: one[1].nll)[0]
    assert best < outcome.steps


def test_out_of_memory_says_what_to_lower(
    models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1")

    monkeypatch.setattr("unicomp.compress.distill.training.trainer.objective", full)
    with pytest.raises(UnicompError, match="out of memory with `micro_batch` 2") as caught:
        train(job(*models, tmp_path))
    assert "gradient_checkpointing" in caught.value.hint

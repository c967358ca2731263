import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill.logits import Logits
from unicomp.compress.distill.training.gradient_filter import gradient_norms, usual
from unicomp.compress.distill.training.student import open_student
from unicomp.compress.distill.training.teacher import LiveTeacher
from unicomp.compress.distill.training.trainer import Job
from unicomp.compress.distill.training.windows import Windows
from unicomp.kernels.load import load


def test_only_what_is_far_above_the_median_goes() -> None:
    norms = torch.tensor([1.0, 1.1, 0.9, 1.05, 9.0, 0.01], dtype=torch.float64)
    assert usual(norms).tolist() == [0, 1, 2, 3, 5]
    assert usual(torch.ones(4, dtype=torch.float64)).tolist() == [0, 1, 2, 3]


def test_lengths_are_those_of_each_window_alone(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = load(tiny_model("llama", seed=5))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(int(teacher.config.vocab_size), (3, 8), generator=draw)
    windows = Windows(ids, torch.ones(3, 7).bool(), "x", "a")
    student = open_student(Checkpoint.open(tiny_model("llama")))
    job = Job(Logits(), student, LiveTeacher(teacher), None, windows, windows, tmp_path)
    found = gradient_norms(job)
    for row in range(3):
        student.model.zero_grad()
        q = student.model(ids[row : row + 1]).logits[:, :-1].log_softmax(-1)
        p = teacher(ids[row : row + 1]).logits[:, :-1].detach().log_softmax(-1)
        (p.exp() * (p - q)).sum(-1).mean().backward()
        squares = [float(own.grad.square().sum()) for own in student.model.parameters()]
        length = math.sqrt(sum(squares))
        assert float(found[row]) == pytest.approx(length, rel=1e-4)
        assert float(found[row - 1]) != pytest.approx(length, rel=1e-2)  # of another window

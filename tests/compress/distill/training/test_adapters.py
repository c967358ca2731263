"""Only adapters learn, and what is written is the base plus their product."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill.logits import Logits
from unicomp.compress.distill.training.adapters import attach
from unicomp.compress.distill.training.student import Student, open_student
from unicomp.compress.distill.training.teacher import LiveTeacher
from unicomp.compress.distill.training.trainer import Job, train
from unicomp.compress.distill.training.windows import Windows
from unicomp.errors import UnsupportedError
from unicomp.kernels.load import load

RANK, ALPHA = 3, 12


def adapted(student: Path, seed: int = 0) -> Student:
    return attach(open_student(Checkpoint.open(student)), rank=RANK, alpha=ALPHA, seed=seed)


def factors(student: Student) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of each linear -> its A [rank, in] and B [out, rank], float64."""
    state = {name: value.detach().double() for name, value in student.model.named_parameters()}
    word = ".lora_A.default.weight"
    return {
        name.removesuffix(word): (value, state[name.replace("lora_A", "lora_B")])
        for name, value in state.items()
        if name.endswith(word)
    }


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen2"])
def test_the_output_is_the_base_plus_the_product(
    tiny_model: Callable[..., Path], tmp_path: Path, arch: str
) -> None:
    """In float64 from the factors; gpt2 holds weights with inputs down the rows."""
    model = tiny_model(arch)
    teacher = load(tiny_model(arch, seed=5))
    student = adapted(model)
    ids = torch.randint(100, (8, 10), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, torch.ones(8, 9, dtype=torch.bool), "text", "0" * 64)
    method = Logits(
        batch=4, rate=5e-2, max_steps=6, measure_every=6, lora_rank=RANK, lora_alpha=ALPHA
    )
    job = Job(method, student, LiveTeacher(teacher), None, windows, windows, tmp_path)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    outcome = train(job, progress=lambda _: seen.update(factors(student)))
    assert outcome.losses[-1][1] < outcome.losses[0][1]
    base = {name: value.double() for name, value in open_student(Checkpoint.open(model)).tensors()}
    found = {name: value.double() for name, value in student.tensors()}
    assert found.keys() == base.keys()
    moved = set()
    for name, value in base.items():
        path = next((p for p in seen if p.endswith(name.removesuffix(".weight"))), None)
        if path is None or not name.endswith(".weight"):
            assert torch.equal(found[name], value), name  # frozen
            continue
        a, b = seen[path]
        product = ALPHA / RANK * (b @ a)
        product = product.T if arch == "gpt2" else product
        torch.testing.assert_close(found[name], value + product, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(found[name], value + 1.1 * product, rtol=1e-5, atol=1e-6)
        moved.add(name)
    assert len(moved) == len(seen) >= 8
    assert not any("embed" in name or "head" in name or "norm" in name for name in moved)


def test_they_begin_with_nothing_and_alike(tiny_model: Callable[..., Path]) -> None:
    student, again = adapted(tiny_model("llama")), adapted(tiny_model("llama"))
    other = adapted(tiny_model("llama"), seed=1)
    ids = torch.randint(100, (2, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = load(tiny_model("llama"))(ids).logits
        torch.testing.assert_close(student.model(ids).logits, plain, rtol=1e-6, atol=1e-6)
    for path, (a, b) in factors(student).items():
        assert torch.equal(a, factors(again)[path][0])
        assert not torch.equal(a, factors(other)[path][0])
        assert (b == 0).all()
    learn = {name for name, value in student.model.named_parameters() if value.requires_grad}
    assert len(learn) == 2 * len(factors(student))
    assert all("lora_" in name for name in learn)


def test_zeros_that_are_to_stay_are_refused(
    tiny_model: Callable[..., Path],
) -> None:
    student = open_student(Checkpoint.open(tiny_model("llama")))
    weight = student.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[:, : weight.shape[1] // 2] = 0
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj` has zeros"):
        attach(student, rank=2, alpha=8, seed=0)

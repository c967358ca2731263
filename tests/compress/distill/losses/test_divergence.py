import math

import pytest
import torch
from torch import Tensor

from unicomp.compress.distill.losses.divergence import between, cross_entropy, divergence

SHAPE = (2, 3, 11)


def logits(seed: int, scale: float = 2.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return scale * torch.randn(SHAPE, generator=draw, dtype=torch.float64)


def plain(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """The definition, in float64, with probabilities and sums only."""
    q = (student / temperature).exp()
    q = q / q.sum(-1, keepdim=True)
    p = (teacher / temperature).exp()
    p = p / p.sum(-1, keepdim=True)
    if beta == 0:
        value = (p * (p / q).log()).sum(-1)
    elif beta == 1:
        value = (q * (q / p).log()).sum(-1)
    else:
        m = beta * p + (1 - beta) * q
        value = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    return value * temperature**2


def slope(function: object, student: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    start = student.detach().clone().to(dtype).requires_grad_()
    value = function(start)  # type: ignore[operator]
    value.sum().backward()
    assert start.grad is not None
    return value.detach().double(), start.grad.double()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_values_and_gradients_are_those_of_the_definition(beta: float, temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    want = slope(lambda x: plain(x, teacher, beta, temperature), student, torch.float64)
    got = slope(
        lambda x: divergence(x, teacher.float(), beta=beta, temperature=temperature),
        student,
        torch.float32,
    )
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("wrong", [(0.0, 1.0), (1.0, 2.0), (0.4, 1.0)])
def test_another_definition_is_told_apart(wrong: tuple[float, float]) -> None:
    student, teacher = logits(0), logits(1)
    _, want = slope(lambda x: plain(x, teacher, *wrong), student, torch.float64)
    _, got = slope(
        lambda x: divergence(x, teacher.float(), beta=0.5, temperature=1.0), student, torch.float32
    )
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


def test_ends_of_beta_are_the_two_kl_and_the_middle_is_symmetric() -> None:
    student, teacher = logits(2).float(), logits(3).float()
    q, p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    reverse = torch.nn.functional.kl_div(p, q, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(divergence(student, teacher, beta=0, temperature=1), forward)
    torch.testing.assert_close(divergence(student, teacher, beta=1, temperature=1), reverse)
    half = divergence(student, teacher, beta=0.5, temperature=1)
    torch.testing.assert_close(half, divergence(teacher, student, beta=0.5, temperature=1))
    assert (half <= math.log(2)).all()


def test_the_teacher_gets_no_gradient() -> None:
    teacher = logits(4).float().requires_grad_()
    divergence(
        logits(5).float().requires_grad_(), teacher, beta=0.3, temperature=2
    ).sum().backward()
    assert teacher.grad is None


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_a_class_that_the_teacher_excludes_is_no_nan(beta: float) -> None:
    log_p = torch.tensor([0.5, 0.5, 0.0]).log()
    student = torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    between(log_p, student.log_softmax(-1), beta=beta).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_cross_entropy_is_that_of_the_definition() -> None:
    student, targets = logits(6), torch.tensor([[0, 3, 10], [1, 1, 7]])

    def definition(x: Tensor) -> Tensor:
        chances = x.exp() / x.exp().sum(-1, keepdim=True)
        return -chances.gather(-1, targets[..., None])[..., 0].log()

    want = slope(definition, student, torch.float64)
    got = slope(lambda x: cross_entropy(x, targets), student, torch.float32)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)

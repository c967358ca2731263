import pytest
import torch
from torch import Tensor

from unicomp.compress.distill.losses.divergence import divergence
from unicomp.compress.distill.losses.few import divergence_few, keep_few

SHAPE = (2, 3, 12)


def logits(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(SHAPE, generator=draw, dtype=torch.float64)


def plain(student: Tensor, teacher: Tensor, k: int, beta: float, temperature: float) -> Tensor:
    """The definition in float64: each position alone, its classes summed one by one."""
    found = torch.zeros(SHAPE[:-1], dtype=torch.float64)
    rows = []
    for index in torch.cartesian_prod(*map(torch.arange, SHAPE[:-1])).tolist():
        q = torch.softmax(student[tuple(index)] / temperature, -1)
        p = torch.softmax(teacher[tuple(index)] / temperature, -1)
        first = p.argsort(descending=True)[:k].tolist()
        others = [token for token in range(SHAPE[-1]) if token not in first]
        a = torch.stack([p[t] for t in first] + [sum(p[t] for t in others)])
        b = torch.stack([q[t] for t in first] + [sum(q[t] for t in others)])
        m = beta * a + (1 - beta) * b
        if beta == 0:
            rows.append((a * (a / b).log()).sum())
        elif beta == 1:
            rows.append((b * (b / a).log()).sum())
        else:
            rows.append(beta * (a * (a / m).log()).sum() + (1 - beta) * (b * (b / m).log()).sum())
    return torch.stack(rows).view_as(found) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_values_and_gradients_are_those_of_the_definition(
    k: int, beta: float, temperature: float
) -> None:
    student, teacher = logits(0).requires_grad_(), logits(1)
    want = plain(student, teacher, k, beta, temperature)
    want.sum().backward()
    single = student.detach().float().requires_grad_()
    few = keep_few(teacher, k, temperature=temperature)
    got = divergence_few(single, *few, beta=beta, temperature=temperature)
    got.sum().backward()
    assert single.grad is not None
    assert student.grad is not None
    torch.testing.assert_close(got.double(), want, rtol=5e-5, atol=5e-6)
    torch.testing.assert_close(single.grad.double(), student.grad, rtol=5e-5, atol=5e-6)


def test_heads_scaled_up_to_one_are_told_apart() -> None:
    student, teacher = logits(0).float(), logits(1).float()
    values, ids = keep_few(teacher, 3, temperature=1)
    scaled = values.clone()
    scaled[..., :-1] = values[..., :-1].log_softmax(-1)
    scaled[..., -1] = -torch.inf
    with_tail = divergence_few(student, values, ids, beta=0, temperature=1)
    assert (
        divergence_few(student, scaled, ids, beta=0, temperature=1) - with_tail
    ).abs().max() > 0.1


def test_with_all_tokens_it_is_the_whole_divergence_and_with_fewer_never_more() -> None:
    student, teacher = logits(2).float(), logits(3).float()
    whole = divergence(student, teacher, beta=0, temperature=1)
    before = torch.zeros_like(whole)
    for k in (1, 2, 6, 12):
        few = divergence_few(student, *keep_few(teacher, k, temperature=1), beta=0, temperature=1)
        assert (few >= before - 1e-5).all()
        before = few
    torch.testing.assert_close(before, whole, rtol=1e-5, atol=1e-6)


def test_a_teacher_that_is_certain_leaves_a_tail_of_nothing() -> None:
    teacher = torch.zeros(1, 1, 12)
    teacher[..., 5] = 200.0
    student = torch.zeros(1, 1, 12, requires_grad=True)
    few = keep_few(teacher, 2, temperature=1)
    value = divergence_few(student, *few, beta=0.5, temperature=1)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()

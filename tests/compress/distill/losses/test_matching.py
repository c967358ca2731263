import pytest
import torch
from torch import nn

from unicomp.compress.distill.losses.matching import matching, pairs


@pytest.mark.parametrize("mapped", [False, True])
def test_values_and_gradients_are_those_of_the_definition(mapped: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    width = 4 if mapped else 6
    student = torch.randn(2, 3, width, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 6, generator=draw, dtype=torch.float64)
    weight = torch.randn(6, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    brought = torch.einsum("oi,wti->wto", weight, student) if mapped else student
    sizes = (teacher**2).sum((1, 2)) / (3 * 6)
    want = ((brought - teacher) ** 2).sum(-1) / 6 / sizes[:, None]
    want.sum().backward()

    single = student.detach().float().requires_grad_()
    to_teacher = None
    if mapped:
        to_teacher = nn.Linear(4, 6, bias=False)
        to_teacher.weight.data.copy_(weight.detach())
    got = matching(single, teacher.float(), to_teacher)
    got.sum().backward()
    assert single.grad is not None
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(single.grad.double(), student.grad, rtol=1e-5, atol=1e-6)
    if to_teacher is not None:
        torch.testing.assert_close(
            to_teacher.weight.grad, weight.grad, rtol=1e-5, atol=1e-5, check_dtype=False
        )


def test_equal_states_cost_nothing_and_none_cost_one() -> None:
    states = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    assert matching(states, states, None).abs().max() == 0
    assert matching(torch.zeros_like(states), states, None).mean() == pytest.approx(1)
    assert matching(2 * states, states, None).mean() == pytest.approx(1)


def test_layers_are_compared_at_equal_depth() -> None:
    assert pairs(4, 4) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert pairs(2, 6) == [(0, 2), (1, 5)]
    assert pairs(3, 4) == [(0, 0), (1, 1), (2, 3)]

"""The factor against numpy and a definition in slow motion; what happens where there is none."""

import numpy as np
import pytest
import torch
from torch import Tensor

from unicomp.compress.linalg import DAMP_LIMIT, PANEL, Order, factorise, min_pivot_order
from unicomp.errors import CheckpointError

ORDERS: list[Order] = ["none", "act", "min-pivot"]


def correlated(columns: int, seed: int, *, tokens: int | None = None) -> Tensor:
    """A float64 Hessian of inputs that share a few directions and differ in size."""
    generator = np.random.default_rng(seed)
    tokens = 4 * columns if tokens is None else tokens
    shared = generator.normal(size=(tokens, 4)) @ generator.normal(size=(4, columns))
    inputs = (generator.normal(size=(tokens, columns)) + shared) * generator.gamma(2, size=columns)
    return torch.from_numpy(inputs.T @ inputs / tokens)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns", [1, 2, 7, 50])
def test_factor_gives_the_damped_hessian_back(columns: int, order: Order) -> None:
    hessian = correlated(columns, 0)
    before = hessian.clone()
    factor = factorise(hessian, order=order, damp=0.02)
    assert torch.equal(hessian, before)
    assert sorted(factor.order.tolist()) == list(range(columns))
    assert factor.damp == 0.02
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(columns)
    whole = factor.unit @ torch.diag(factor.pivots) @ factor.unit.T
    torch.testing.assert_close(whole, damped[factor.order][:, factor.order])
    assert torch.equal(factor.unit.triu(), factor.unit)
    assert torch.equal(factor.unit.diagonal(), torch.ones(columns).double())
    assert (factor.pivots > 0).all()


def test_the_first_pivot_is_what_the_later_columns_cannot_explain() -> None:
    hessian = correlated(9, 1)
    factor = factorise(hessian, order="act", damp=0.01)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(9)).numpy()
    first, last = factor.order[0], factor.order[-1]
    assert float(factor.pivots[0]) == pytest.approx(1 / np.linalg.inv(damped)[first, first])
    assert float(factor.pivots[-1]) == pytest.approx(damped[last, last])


def test_act_order_takes_the_greatest_diagonal_first_and_ties_in_turn() -> None:
    hessian = torch.diag(torch.tensor([2.0, 5.0, 2.0, 9.0]))
    assert factorise(hessian, order="act").order.tolist() == [3, 1, 0, 2]
    assert factorise(hessian, order="none").order.tolist() == [0, 1, 2, 3]


def slow_min_pivot_order(hessian: np.ndarray) -> list[int]:
    """Take the column of least Schur complement, last to be rounded first, with plain inverses."""
    left = list(range(len(hessian)))
    taken: list[int] = []
    while left:
        rest = hessian[np.ix_(left, left)]
        if taken:
            to = hessian[np.ix_(left, taken)]
            rest = rest - to @ np.linalg.inv(hessian[np.ix_(taken, taken)]) @ to.T
        best = left[int(np.argmin(np.diagonal(rest)))]
        taken.append(best)
        left.remove(best)
    return taken[::-1]


@pytest.mark.parametrize("columns", [1, 5, 40, PANEL + 20])
def test_min_pivot_order_is_the_greedy_one(columns: int) -> None:
    hessian = correlated(columns, columns) + 0.05 * torch.eye(columns)
    before = hessian.clone()
    assert min_pivot_order(hessian).tolist() == slow_min_pivot_order(hessian.numpy())
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("seed", range(5))
def test_orders_fall_in_the_trace_of_the_pivots(seed: int) -> None:
    hessian = correlated(96, seed)
    none, act, least = (float(factorise(hessian, order=o).pivots.sum()) for o in ORDERS)
    assert least <= act <= none
    assert least < 0.98 * none


def test_energy_and_solve_are_those_of_numpy() -> None:
    hessian = correlated(300, 3)
    factor = factorise(hessian, order="act", damp=0.05)
    columns = torch.randn(300, 6, dtype=torch.float64)
    own = torch.empty_like(columns)
    own[factor.order] = columns
    wanted = np.einsum("ir,ij,jr->r", own.numpy(), hessian.numpy(), own.numpy())
    one, four = factor.energies(columns, 2 * columns[:, :3])
    np.testing.assert_allclose(one.numpy(), wanted, rtol=1e-9)
    np.testing.assert_allclose(four.numpy(), 4 * wanted[:3], rtol=1e-9)
    damped = (hessian + 0.05 * hessian.diagonal().mean() * torch.eye(300)).numpy()
    solved = np.linalg.solve(damped, own.numpy())[factor.order.numpy()]
    np.testing.assert_allclose(factor.solve(columns).numpy(), solved, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("damp", [0.0, 0.01])
@pytest.mark.parametrize("order", ORDERS)
def test_a_dead_column_neither_moves_nor_is_moved(order: Order, damp: float) -> None:
    hessian = correlated(12, 4)
    hessian[5] = 0
    hessian[:, 5] = 0
    factor = factorise(hessian, order=order, damp=damp)
    place = factor.order.tolist().index(5)
    apart = factor.unit - torch.eye(12)
    assert not apart[place].any()
    assert not apart[:, place].any()
    live = [c for c in range(12) if c != 5]
    mean = hessian.diagonal()[live].mean()
    damped = hessian[live][:, live] + damp * mean * torch.eye(11)
    keep = [i for i in range(12) if i != place]
    whole = factor.unit @ torch.diag(factor.pivots) @ factor.unit.T
    wanted = damped[[live.index(int(factor.order[i])) for i in keep]]
    wanted = wanted[:, [live.index(int(factor.order[i])) for i in keep]]
    torch.testing.assert_close(whole[keep][:, keep], wanted)


def test_all_columns_dead() -> None:
    factor = factorise(torch.zeros(4, 4))
    assert torch.equal(factor.unit, torch.eye(4))
    assert torch.isfinite(factor.pivots).all()
    assert (factor.pivots > 0).all()


def test_damping_grows_until_the_factor_exists() -> None:
    inputs = torch.randn(3, 40)  # rank 3 of 40, in float32
    hessian = inputs.T @ inputs
    factor = factorise(hessian, damp=0.0)
    assert 0 < factor.damp <= DAMP_LIMIT
    assert torch.isfinite(factor.unit).all()


def test_an_indefinite_matrix_is_refused_with_what_was_tried() -> None:
    hessian = torch.tensor([[1.0, -30.0], [-30.0, 1.0]])
    with pytest.raises(
        CheckpointError, match=r"`damp` at 0\.01, 0\.04, 0\.16, 0\.64, 1$"
    ) as caught:
        factorise(hessian, damp=0.01)
    assert caught.value.hint is not None
    assert "`samples`" in caught.value.hint
    assert "`damp`" in caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(value: float) -> None:
    hessian = torch.eye(3)
    hessian[1, 2] = value
    with pytest.raises(CheckpointError, match="not finite"):
        factorise(hessian)

"""Nearest plane against GPTQ as its authors wrote it, the paper's bound, and brute force."""

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicomp.compress import grid
from unicomp.compress.babai import OneByOne, Rounding, nearest_plane, ordered, restored
from unicomp.compress.linalg import Factor, Order, factorise
from unicomp.kernels.packed import Scheme

Array = NDArray[np.float64]
DAMP = 0.01


def problem(seed: int, rows: int = 24, columns: int = 48) -> tuple[Array, Array]:
    """A weight and a Hessian of correlated inputs, float64."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(columns, columns)) * generator.gamma(2, size=columns)
    inputs = generator.normal(size=(4 * columns, columns)) @ mix + generator.normal(size=columns)
    return generator.normal(size=(rows, columns)), inputs.T @ inputs / (4 * columns)


def gptq(
    weight: Array, hessian: Array, order: Array, scale: Array, zero: Array, low: int, high: int
) -> Array:
    """Algorithm 1 of arXiv:2210.17323: front to back with the inverse's upper Cholesky factor.

    scale, zero  [out, in], by column; returns codes [out, in]
    """
    columns = len(hessian)
    hessian = hessian + DAMP * np.diagonal(hessian).mean() * np.eye(columns)
    left = weight[:, order].copy()
    upper = np.linalg.cholesky(np.linalg.inv(hessian[np.ix_(order, order)])).T
    codes = np.zeros_like(weight)
    for i, column in enumerate(order):
        s, z = scale[:, column], zero[:, column]
        code = np.clip(np.round(left[:, i] / s + z), low, high)
        codes[:, column] = code
        error = (left[:, i] - (code - z) * s) / upper[i, i]
        left[:, i:] -= np.outer(error, upper[i, i:])
    return codes


def ours(
    weight: Array,
    hessian: Array,
    scheme: Scheme,
    order: Order,
    *,
    block_size: int = 16,
    clip: bool = True,
    how: grid.Search = "minmax",
) -> tuple[Rounding, Factor, grid.Grid, Tensor, Tensor]:
    """Return choice, factor, grid, errors [in, rows] in the weight's order, and the energy."""
    factor = factorise(torch.from_numpy(hessian), order=order, damp=DAMP)
    target = torch.from_numpy(weight)
    found = grid.search(target, scheme, how, dtype=torch.float64)
    choice = Rounding(found, scheme, factor.order, clip=clip)
    columns = ordered(target, factor.order)
    energy = nearest_plane(columns, factor, choice, block_size=block_size)
    return choice, factor, found, restored(columns, factor.order), energy


@pytest.mark.parametrize("seed", range(20))
def test_the_integers_of_gptq(seed: int) -> None:
    weight, hessian = problem(seed)
    order: Order = ("none", "act", "min-pivot")[seed % 3]  # type: ignore[assignment]
    scheme = Scheme((2, 3, 4, 8)[seed % 4], (-1, 16, 20)[seed // 3 % 3], seed % 5 != 0)
    choice, factor, found, _, _ = ours(weight, hessian, scheme, order)
    group = grid.group_of(48, scheme).numpy()
    scale = found.scale.numpy()[:, group]
    zero = np.zeros_like(scale) if found.zero is None else found.zero.numpy()[:, group]
    wanted = gptq(weight, hessian, factor.order.numpy(), scale, zero, found.low, found.high)
    np.testing.assert_array_equal(choice.codes().codes.T.numpy(), wanted)


def test_the_comparison_with_gptq_sees_another_order_and_another_damping() -> None:
    weight, hessian = problem(0)
    choice, _, found, _, _ = ours(weight, hessian, Scheme(4, -1), "act")
    scale = np.repeat(found.scale.numpy(), 48, 1)
    zero = np.zeros_like(scale)
    codes = choice.codes().codes.T.numpy()
    plain = gptq(weight, hessian, np.arange(48), scale, zero, -8, 7)
    assert (plain != codes).any()
    act = np.argsort(-np.diagonal(hessian))
    assert (gptq(weight, hessian, act, scale, zero, -8, 7) == codes).all()
    assert (gptq(weight, hessian * 2, act, scale, zero, -8, 7) == codes).all()
    heavier = hessian + 0.5 * np.eye(48) * np.diagonal(hessian).mean()
    assert (gptq(weight, heavier, act, scale, zero, -8, 7) != codes).any()


@pytest.mark.parametrize("order", ["none", "act", "min-pivot"])
@pytest.mark.parametrize("size", [-1, 20])
def test_energy_is_the_error_under_the_damped_hessian(order: Order, size: int) -> None:
    weight, hessian = problem(1)
    scheme = Scheme(3, size, False)
    choice, _, _, errors, energy = ours(weight, hessian, scheme, order)
    packed = choice.codes().packed(scheme, torch.float64)
    lost = weight - packed.dequantize(torch.float64).numpy()
    np.testing.assert_allclose(errors.T.numpy(), lost, atol=1e-6)
    damped = hessian + DAMP * np.diagonal(hessian).mean() * np.eye(48)
    wanted = np.einsum("ri,ij,rj->r", lost, damped, lost)
    np.testing.assert_allclose(energy.numpy(), wanted, rtol=1e-5)


def test_without_clipping_the_error_stays_under_the_bound_and_near_a_third_of_it() -> None:
    ratios = []
    for seed, order in itertools.product(range(8), ("none", "act", "min-pivot")):
        weight, hessian = problem(seed, rows=64)
        scheme = Scheme(4, (-1, 16)[seed % 2])
        _, factor, found, _, energy = ours(weight, hessian, scheme, order, clip=False)  # type: ignore[arg-type]
        step = found.scale[:, grid.group_of(48, scheme)][:, factor.order]
        bound = (step.square() @ factor.pivots) / 4
        assert (energy <= bound * (1 + 1e-9)).all()
        ratios.append(float((energy / bound).mean()))
    assert min(ratios) >= 0.28
    assert max(ratios) <= 0.38
    assert np.mean(ratios) == pytest.approx(1 / 3, abs=0.02)


def test_clipping_voids_the_bound() -> None:
    weight, hessian = problem(3, rows=64)
    scheme = Scheme(2, -1)
    choice, factor, found, _, energy = ours(weight, hessian, scheme, "act", how="absmean")
    bound = (found.scale.square() * factor.pivots.sum() / 4)[:, 0]
    assert (energy > bound).any()
    assert (choice.clipped > 0).any()
    free, *_, less = ours(weight, hessian, scheme, "act", how="absmean", clip=False)
    assert not free.clipped.any()
    assert (less <= bound).all()


@pytest.mark.parametrize("seed", range(5))
def test_close_to_the_best_of_all_codes(seed: int) -> None:
    weight, hessian = problem(seed, rows=6, columns=4)
    scheme = Scheme(2, -1)
    choice, _, found, errors, energy = ours(weight, hessian, scheme, "act", block_size=2)
    damped = hessian + DAMP * np.diagonal(hessian).mean() * np.eye(4)
    every = np.array(list(itertools.product(range(-2, 2), repeat=4)))
    for row in range(6):
        lost = weight[row] - every * float(found.scale[row, 0])
        best = np.einsum("ri,ij,rj->r", lost, damped, lost).min()
        assert best <= float(energy[row]) * (1 + 1e-9)
        codes = choice.codes().codes[:, row].numpy()
        plain = np.clip(np.round(weight[row] / float(found.scale[row, 0])), -2, 1)
        lost = weight[row] - plain * float(found.scale[row, 0])
        if (codes == plain).all():
            assert float(energy[row]) == pytest.approx(lost @ damped @ lost)
    assert errors.shape == (4, 6)


@pytest.mark.parametrize("block_size", [1, 3, 8, 13, 48, 100])
def test_the_block_size_changes_nothing(block_size: int) -> None:
    weight, hessian = problem(5)
    scheme = Scheme(3, 16)
    one, *_ = ours(weight, hessian, scheme, "act", block_size=48)
    other, *_ = ours(weight, hessian, scheme, "act", block_size=block_size)
    assert torch.equal(one.codes().codes, other.codes().codes)
    assert torch.equal(one.clipped, other.clipped)


def test_rows_do_not_depend_on_each_other() -> None:
    weight, hessian = problem(6)
    scheme = Scheme(4, 16, False)
    whole = ours(weight, hessian, scheme, "act")[0].codes().codes
    turned = ours(weight[::-1].copy(), hessian, scheme, "act")[0].codes().codes
    assert torch.equal(whole.flip(1), turned)
    single = ours(weight[3:4], hessian, scheme, "act")[0].codes().codes
    assert torch.equal(whole[:, 3:4], single)


def test_another_choice_joins_the_same_walk() -> None:
    """A mask that drops columns: the kept weights make up for them, as least squares would."""
    weight, hessian = problem(7, rows=5, columns=12)
    factor = factorise(torch.from_numpy(hessian), order="none", damp=DAMP)
    dropped = {0, 1, 2}

    class Mask(OneByOne):
        def pick(self, step: int, target: Tensor, column: Tensor) -> None:
            if step not in dropped:
                column.sub_(target)  # the target itself is taken

    columns = ordered(torch.from_numpy(weight), factor.order)
    nearest_plane(columns, factor, Mask(), block_size=4)
    kept = weight - columns.T.numpy()
    damped = hessian + DAMP * np.diagonal(hessian).mean() * np.eye(12)
    rest = np.linalg.solve(damped[3:, 3:], damped[3:, :3] @ weight[:, :3].T)
    np.testing.assert_allclose(kept[:, 3:], weight[:, 3:] + rest.T, rtol=1e-7)
    np.testing.assert_allclose(kept[:, :3], 0, atol=1e-12)

"""Descent against a slow one of its own, and against what it may never do: make things worse."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicomp.compress import grid
from unicomp.compress.babai import Codes, Rounding, nearest_plane, ordered, restored
from unicomp.compress.descent import descend
from unicomp.compress.linalg import factorise
from unicomp.kernels.packed import Scheme

Array = NDArray[np.float64]


def start(
    seed: int, scheme: Scheme, *, rows: int = 12, columns: int = 40
) -> tuple[Array, Tensor, Tensor, Codes, Tensor]:
    """Return weight, errors, damping, codes and Hessian after nearest plane, float64."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(columns, columns))
    inputs = generator.normal(size=(160, columns)) @ mix
    hessian = torch.from_numpy(inputs.T @ inputs / 160)
    weight = generator.normal(size=(rows, columns))
    factor = factorise(hessian, order="act")
    found = grid.search(torch.from_numpy(weight), scheme, "minmax", dtype=torch.float64)
    choice = Rounding(found, scheme, factor.order)
    errors = ordered(torch.from_numpy(weight), factor.order)
    nearest_plane(errors, factor, choice, block_size=16)
    added = restored(factor.added, factor.order)
    return weight, restored(errors, factor.order), added, choice.codes(), hessian


def energy(errors: Array, hessian: Array) -> Array:
    """Errors [in, rows] under a Hessian, by row."""
    return np.einsum("ir,ij,jr->r", errors, hessian, errors)


def values(codes: Codes, scheme: Scheme) -> Array:
    """What the codes stand for, [out, in]."""
    return codes.packed(scheme, torch.float64).dequantize(torch.float64).numpy()


def slow(
    weight: Array, codes: Codes, hessian: Array, scheme: Scheme
) -> tuple[Array, Array, list[int]]:
    """Sweep once, one row, group and column at a time; return codes, scales and clipped codes."""
    clipped = [0] * weight.shape[0]
    q = codes.codes.double().numpy().copy()
    scale = codes.scale.numpy().copy()
    zero = np.zeros_like(scale) if codes.zero is None else codes.zero.numpy()
    for row in range(weight.shape[0]):
        group = grid.group_of(len(hessian), scheme).numpy()
        for index, columns in enumerate(codes.groups):
            lost = weight[row] - (q[:, row] - zero[group, row]) * scale[group, row]
            own = np.zeros(len(hessian))
            own[columns] = (q[:, row] - zero[group, row])[columns]
            scale[index, row] += (own @ hessian @ lost) / (own @ hessian @ own)
            for column in range(columns.start, columns.stop):
                lost = weight[row] - (q[:, row] - zero[group, row]) * scale[group, row]
                ideal = q[column, row] + (hessian[column] @ lost) / (
                    hessian[column, column] * scale[index, row]
                )
                q[column, row] = np.clip(np.round(ideal), codes.low, codes.high)
                clipped[row] += int(q[column, row] != np.round(ideal))
    return q, scale, clipped


@pytest.mark.parametrize("size", [-1, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_sweep_is_that_of_the_slow_one(size: int, symmetric: bool) -> None:
    scheme = Scheme(2, size, symmetric)
    weight, errors, added, codes, hessian = start(0, scheme)
    damped = (hessian + torch.diag(added)).numpy()
    wanted, scale, beyond = slow(weight, codes, damped, scheme)
    _, clipped = descend(errors, codes, hessian, added, dtype=torch.float64)
    assert clipped.tolist() == beyond
    assert any(beyond)
    np.testing.assert_array_equal(codes.codes.numpy(), wanted)
    np.testing.assert_allclose(codes.scale.numpy(), scale, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [-1, 16])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_row_gets_worse_and_the_gain_is_told_truly(
    bits: int, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    scheme = Scheme(bits, size, symmetric)
    weight, errors, added, codes, hessian = start(bits, scheme)
    codes.scale.copy_(grid.stored(codes.scale, dtype))
    errors.copy_(torch.from_numpy(weight - values(codes, scheme)).T)
    damped = (hessian + torch.diag(added)).numpy()
    before = first = energy(errors.numpy(), damped)
    for _ in range(4):
        gain, clipped = descend(errors, codes, hessian, added, dtype=dtype)
        np.testing.assert_allclose(errors.T.numpy(), weight - values(codes, scheme), atol=1e-5)
        after = energy(errors.numpy(), damped)
        assert (gain >= -1e-9).all()
        np.testing.assert_allclose(before - after, gain.numpy(), rtol=1e-4, atol=1e-6)
        before = after
        assert torch.equal(codes.scale, codes.scale.to(dtype).double())
        assert clipped.shape == gain.shape
    assert before.sum() < 0.97 * first.sum()
    low, high = scheme.code_range
    assert int(codes.codes.min()) >= low
    assert int(codes.codes.max()) <= high


def test_it_comes_to_rest() -> None:
    scheme = Scheme(3, 16)
    _, errors, added, codes, hessian = start(5, scheme)
    for _ in range(60):
        gain, _ = descend(errors, codes, hessian, added, dtype=torch.bfloat16)
    assert not gain.any()
    rest = codes.codes.clone()
    descend(errors, codes, hessian, added, dtype=torch.bfloat16)
    assert torch.equal(rest, codes.codes)


def test_nothing_to_gain_is_left_alone() -> None:
    scheme = Scheme(4, -1)
    values_ = torch.randint(-8, 8, (20, 3)).double()
    codes = Codes(
        values_.to(torch.int8), torch.full((1, 3), 0.5).double(), None, [slice(0, 20)], -8, 7
    )
    hessian = torch.eye(20).double()
    errors = torch.zeros(20, 3).double()
    gain, clipped = descend(errors, codes, hessian, torch.zeros(20).double(), dtype=torch.float64)
    assert not gain.any()
    assert not clipped.any()
    assert torch.equal(codes.codes.double(), values_)
    assert scheme.code_range == (codes.low, codes.high)


def test_all_codes_zero_keep_their_scale() -> None:
    codes = Codes(torch.zeros(8, 2, dtype=torch.int8), torch.ones(1, 2), None, [slice(0, 8)], -2, 1)
    errors = torch.full((8, 2), 1e-3)
    gain, _ = descend(errors, codes, torch.eye(8), torch.zeros(8), dtype=torch.float32)
    assert torch.equal(codes.scale, torch.ones(1, 2))
    assert not gain.any()

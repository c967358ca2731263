"""Round-to-nearest against plain numpy."""

import numpy as np
import pytest
import torch

from unicomp.compress.method import Stats
from unicomp.compress.quantize.rtn import Rtn
from unicomp.kernels.packed import Scheme

SCHEME = Scheme(4, 16)


def test_minmax_is_one_line_of_numpy() -> None:
    weight = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    method = Rtn(scale_search="minmax")
    solution = method.solve(weight, Stats(0), SCHEME, scale_dtype=torch.float32)
    parts = weight.numpy().reshape(5, 2, 16)
    scale = np.abs(parts).max(2, keepdims=True) / np.float32(7.5)
    codes = np.clip(np.round(parts / scale), -8, 7).reshape(5, 32)
    np.testing.assert_array_equal(solution.packed.codes.numpy(), codes)
    np.testing.assert_allclose(solution.packed.scale.numpy(), scale[..., 0], rtol=1e-6)
    lost = weight.numpy() - (codes.reshape(5, 2, 16) * scale).reshape(5, 32)
    np.testing.assert_allclose(solution.error.numpy(), (lost**2).sum(1), rtol=1e-4)
    assert torch.equal(solution.error, solution.rounding)
    np.testing.assert_allclose(solution.reference.numpy(), (weight.numpy() ** 2).sum(1), rtol=1e-5)
    assert solution.predicted is None
    assert solution.damp is None


def test_with_a_hessian_errors_are_those_of_the_output() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 32, generator=generator)
    inputs = torch.randn(100, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    stats = Stats(100, inputs.T @ inputs / 100)
    solution = Rtn().solve(weight, stats, SCHEME, scale_dtype=torch.bfloat16)
    lost = inputs @ (weight - solution.packed.dequantize()).T
    torch.testing.assert_close(solution.error, lost.square().mean(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        solution.reference, (inputs @ weight.T).square().mean(0), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_search_pays_in_the_weights(bits: int, symmetric: bool) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits))
    scheme = Scheme(bits, 32, symmetric)
    solution = Rtn().solve(weight, Stats(0), scheme, scale_dtype=torch.bfloat16)
    assert float(solution.error.sum()) < float(solution.rounding.sum())
    assert solution.packed.scheme == scheme
    assert (solution.packed.zero_point is None) == symmetric


def test_more_bits_lose_less() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    lost = [
        float(Rtn().solve(weight, Stats(0), Scheme(b, -1), scale_dtype=torch.float32).error.sum())
        for b in range(2, 9)
    ]
    assert lost == sorted(lost, reverse=True)
    assert lost[-1] < 1e-2 * lost[2]

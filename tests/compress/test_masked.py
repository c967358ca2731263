"""Zeros and a grid chosen in one walk, against the formulas written out in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unicomp.compress import grid
from unicomp.compress.method import PruneMethod, Pruning, Stats
from unicomp.compress.prune.magnitude import Magnitude
from unicomp.compress.prune.sparsegpt import Sparsegpt
from unicomp.compress.prune.wanda import Wanda
from unicomp.compress.quantize.gptq import Gptq
from unicomp.compress.quantize.rtn import Rtn
from unicomp.compress.sparsity import keep, parse
from unicomp.kernels.packed import Scheme

PRUNERS = {"magnitude": Magnitude, "wanda": Wanda, "sparsegpt": Sparsegpt}
PLAIN = {"drift": 0.0, "sweeps": 0, "scale_search": "minmax", "order": "none"}
Problem = Callable[..., tuple[Tensor, Stats]]


def problem(rows: int = 24, columns: int = 48, seed: int = 0) -> tuple[Tensor, Stats]:
    """A weight and the second moments of correlated inputs of uneven size, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = draw(columns, columns) / columns**0.5 + torch.eye(columns)
    inputs = draw(400, columns) @ mix * (0.2 + 2 * torch.rand(columns, generator=generator))
    return draw(rows, columns), Stats(len(inputs), inputs.T @ inputs / len(inputs))


def joint(weight: Tensor, hessian: Tensor, pattern: str, size: int, scale: Tensor) -> Tensor:
    """SparseGPT's algorithm with section 3.5's rounding, weights updated in place; 4 bits."""

    def rounded(value: Tensor) -> Tensor:
        return (value / scale).round().clamp(-8, 7) * scale

    work, columns = weight.clone(), weight.shape[1]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    kept = torch.ones_like(weight, dtype=torch.bool)
    width = int(pattern.partition(":")[2]) if ":" in pattern else size
    for i in range(columns):
        if i % width == 0:
            some = work[:, i : i + width]
            cost = (some.square() - (some - rounded(some)).square()) / upper.diagonal()[
                i : i + width
            ].square()
            if ":" in pattern:
                kept[:, i : i + width] = keep(cost, parse(pattern))
            else:
                least = cost.T.flatten().sort(stable=True).indices  # column by column
                gone = torch.zeros(cost.numel(), dtype=torch.bool)
                gone[least[: int(float(pattern) * cost.numel())]] = True
                kept[:, i : i + width] = ~gone.view(cost.T.shape).T
        value = torch.where(kept[:, i, None], rounded(work[:, i, None]), 0.0)[:, 0]
        error = (work[:, i] - value) / upper[i, i]
        work[:, i:] -= error[:, None] * upper[i, i:]
        work[:, i] = value
    return work


@pytest.mark.parametrize("size", [8, 16, 48])
@pytest.mark.parametrize("pattern", ["0.5", "2:4", "1:4"])
def test_sparsegpt_and_gptq_in_one_walk_are_the_papers(pattern: str, size: int) -> None:
    weight, stats = problem()
    assert stats.hessian is not None
    method = Gptq(**PLAIN, block_size=size)
    pruning = Pruning(Sparsegpt(), parse(pattern))
    found = method.solve(weight, stats, Scheme(4, -1), scale_dtype=torch.float64, pruning=pruning)
    scale = found.packed.scale.double()
    wanted = joint(weight, stats.hessian, pattern, size, scale)
    assert torch.equal(found.packed.codes, (wanted / scale).round().to(torch.int8))
    other = joint(weight, stats.hessian, "0.25", size, scale)
    assert not torch.equal(found.packed.codes, (other / scale).round().to(torch.int8))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("name", sorted(PRUNERS))
def test_zeros_stay_through_sweeps_and_errors_are_true(
    name: str, pattern: str, symmetric: bool
) -> None:
    """Every option of the quantizer on: order, searched scales, sweeps, zero points."""
    weight, stats = problem()
    assert stats.hessian is not None
    pruner: PruneMethod = PRUNERS[name]()
    target = parse(pattern)
    found = Gptq(sweeps=3).solve(
        weight,
        stats,
        Scheme(4, 16, symmetric),
        scale_dtype=torch.bfloat16,
        pruning=Pruning(pruner, target),
    )
    got = found.packed.dequantize(torch.float64)
    if target.m is not None:
        assert int((got.view(len(got), -1, 4) != 0).sum(2).max()) <= 2
    assert int((got != 0).sum()) <= got.numel() // 2
    lost = weight - got
    torch.testing.assert_close(
        found.error, ((lost @ stats.hessian) * lost).sum(1), rtol=2e-3, atol=1e-4
    )


def test_zeros_of_a_pruned_model_stay_zero_unless_told_otherwise() -> None:
    weight, stats = problem()
    weight = weight.where(keep(weight.abs(), parse("0.5")), 0)
    scheme = Scheme(4, -1)
    kept = Gptq().solve(weight, stats, scheme, scale_dtype=torch.bfloat16)
    assert bool((kept.packed.codes[weight == 0] == 0).all())
    free = Gptq(keep_zeros=False).solve(weight, stats, scheme, scale_dtype=torch.bfloat16)
    assert bool((free.packed.codes[weight == 0] != 0).any())
    assert float(free.error.sum()) < float(kept.error.sum())


def test_zeros_and_grid_together_beat_one_after_the_other() -> None:
    weight, stats = problem(64, 128)
    target, scheme = parse("2:4"), Scheme(4, -1)
    first = Sparsegpt().solve(weight, stats, target).weight
    assert stats.hessian is not None

    def error(stored: Tensor) -> float:
        lost = weight - stored.double()
        return float(((lost @ stats.hessian) * lost).sum())

    after = Gptq().solve(first, stats, scheme, scale_dtype=torch.bfloat16)
    pruning = Pruning(Sparsegpt(), target)
    together = Gptq().solve(weight, stats, scheme, scale_dtype=torch.bfloat16, pruning=pruning)
    assert error(together.packed.dequantize()) < error(after.packed.dequantize())


def test_rounding_with_zeros_of_least_magnitude() -> None:
    weight, _ = problem()
    target = parse("0.5")
    found = Rtn().solve(
        weight,
        Stats(0),
        Scheme(4, -1),
        scale_dtype=torch.float32,
        pruning=Pruning(Magnitude(), target),
    )
    assert bool((found.packed.codes[~keep(weight.abs(), target)] == 0).all())
    rest = weight.where(keep(weight.abs(), target), 0).float()
    scales = grid.search(rest, Scheme(4, -1), "mse", dtype=torch.float32).scale
    assert torch.equal(found.packed.scale, scales)

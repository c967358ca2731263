"""Pruning of one weight, against the papers' formulas written out in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from unicomp.compress.method import Need, Pruned, Stats
from unicomp.compress.prune.magnitude import Magnitude
from unicomp.compress.prune.sparsegpt import Sparsegpt
from unicomp.compress.prune.wanda import Wanda
from unicomp.compress.sparsity import Zeros, parse
from unicomp.errors import CheckpointError

PATTERNS = ["0.5", "0.3", "2:4", "1:4", "4:8", "2:3"]


def problem(rows: int = 24, columns: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs of uneven size, float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mix = draw(columns, columns) / columns**0.5 + torch.eye(columns)
    size = 0.2 + 2 * torch.rand(columns, generator=generator, dtype=torch.float64)
    return draw(rows, columns), draw(400, columns) @ mix * size


def stats_of(inputs: Tensor) -> Stats:
    second = inputs.T @ inputs / len(inputs)
    return Stats(len(inputs), second, norm=second.diagonal().sqrt())


def paper_wanda(weight: Tensor, inputs: Tensor, pattern: str) -> Tensor:
    """Wanda's algorithm 1: |W| times the norm of each input, sorted by row or by group."""
    metric = weight.abs() * inputs.norm(dim=0)
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    if ":" in pattern:
        n, m = map(int, pattern.split(":"))
        for start in range(0, weight.shape[1], m):
            least = metric[:, start : start + m].topk(m - n, dim=1, largest=False).indices
            pruned.scatter_(1, start + least, True)
    else:
        count = int(weight.shape[1] * float(pattern))
        pruned.scatter_(1, metric.sort(dim=1).indices[:, :count], True)
    return weight.masked_fill(pruned, 0)


def paper_sparsegpt(weight: Tensor, inputs: Tensor, pattern: str, size: int, damp: float) -> Tensor:
    """SparseGPT's algorithm 1, with the inverse Hessian and weights updated in place."""
    work, columns = weight.clone(), weight.shape[1]
    hessian = inputs.T @ inputs / len(inputs)
    hessian += damp * hessian.diagonal().mean() * torch.eye(columns, dtype=hessian.dtype)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    pruned = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, columns, size):
        stop = min(start + size, columns)
        if ":" not in pattern:
            score = (work[:, start:stop] / upper.diagonal()[start:stop]).square()
            count = int(float(pattern) * score.numel())
            flat = torch.zeros(score.numel(), dtype=torch.bool)
            flat[score.flatten().sort().indices[:count]] = True
            pruned[:, start:stop] = flat.view(score.shape)
        for i in range(start, stop):
            if ":" in pattern:
                n, m = map(int, pattern.split(":"))
                if i % m == 0:
                    score = (work[:, i : i + m] / upper.diagonal()[i : i + m]).square()
                    pruned.scatter_(1, i + score.topk(m - n, dim=1, largest=False).indices, True)
            error = torch.where(pruned[:, i], work[:, i], 0) / upper[i, i]
            work[:, i:] -= error[:, None] * upper[i, i:]
            work[:, i] = torch.where(pruned[:, i], 0, work[:, i])
    return work


def test_magnitude_keeps_the_greatest() -> None:
    weight, _ = problem()
    found = Magnitude().solve(weight, Stats(0), parse("0.5")).weight
    least = weight.abs().sort(dim=1).values[:, 24]
    torch.testing.assert_close(found, weight.where(weight.abs() >= least[:, None], 0).float())
    assert not torch.signbit(found[found == 0]).any()  # no zero has a sign
    assert int((Magnitude().solve(weight, Stats(0), Zeros(7)).weight == 0).sum()) == 7


@pytest.mark.parametrize("pattern", PATTERNS)
def test_wanda_is_the_papers(pattern: str) -> None:
    weight, inputs = problem()
    found = Wanda().solve(weight, stats_of(inputs), parse(pattern)).weight
    assert torch.equal(found, paper_wanda(weight, inputs, pattern).float())
    other = paper_wanda(weight, inputs.flip(1), pattern).float()
    assert not torch.equal(found, other)  # the comparison can fail


@pytest.mark.parametrize("size", [8, 16, 48, 128])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_is_the_papers(pattern: str, size: int) -> None:
    """Masks equal, weights equal to float64's rounding, blocks of whole groups."""
    weight, inputs = problem()
    step = int(pattern.partition(":")[2] or 1)
    found = Sparsegpt(block_size=size).solve(weight, stats_of(inputs), parse(pattern))
    wanted = paper_sparsegpt(weight, inputs, pattern, -(-size // step) * step, 0.01)
    assert torch.equal(found.weight == 0, wanted == 0)
    torch.testing.assert_close(found.weight, wanted, rtol=1e-9, atol=1e-9)
    undamped = paper_sparsegpt(weight, inputs, pattern, size, 0.5)
    assert not torch.allclose(found.weight, undamped, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reported_errors_are_those_of_what_is_stored(pattern: str) -> None:
    weight, inputs = problem()
    stats, target = stats_of(inputs), parse(pattern)
    found = Sparsegpt().solve(weight, stats, target)
    plain = Magnitude().solve(weight, stats, target).weight.double()

    def energy(lost: Tensor) -> Tensor:
        return (inputs @ lost.T).square().mean(0)

    assert found.error is not None
    assert found.magnitude is not None
    torch.testing.assert_close(found.error, energy(weight - found.weight))
    torch.testing.assert_close(found.magnitude, energy(weight - plain), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.reference, energy(weight))
    wanda = Wanda().solve(weight, stats, target).weight.double()
    totals = [energy(weight - each).sum() for each in (found.weight, wanda, plain)]
    assert totals[0] < totals[1] < totals[2]


@pytest.mark.parametrize("solve", [Wanda().solve, Sparsegpt().solve])
def test_no_statistics_is_an_error(solve: Callable[..., Pruned]) -> None:
    with pytest.raises(CheckpointError, match="no statistic"):
        solve(problem()[0], Stats(0), parse("0.5"))


@pytest.mark.parametrize(
    "options", [{"sparsity": 1.0}, {"sparsity": "4:2"}, {"scope": "layer"}, {"block_size": 4}]
)
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    method = Magnitude if "scope" in options else Sparsegpt
    with pytest.raises(ValueError, match="validation error"):
        method(**options)


def test_drift_is_made_up_for() -> None:
    """Against the outputs of the original model; all of it gives the least-squares target."""
    weight, original = problem()
    noise = torch.randn(48, 48, generator=torch.Generator().manual_seed(5)).double() / 7
    inputs = original + 0.2 * original @ noise
    plain = stats_of(inputs)
    cross = (original - inputs).T @ inputs / len(inputs)
    wanted = original @ weight.T

    def lost(drift: float, pattern: str) -> float:
        stats = Stats(plain.tokens, plain.hessian, cross)
        found = Sparsegpt(drift=drift, damp=1e-3).solve(weight, stats, parse(pattern))
        return float((inputs @ found.weight.T - wanted).square().sum())

    for pattern in ("0.5", "2:4"):
        losses = [lost(drift, pattern) for drift in (0.0, 0.5, 1.0)]
        assert losses == sorted(losses, reverse=True)
    assert lost(1.0, "0.03") < 0.2 * lost(0.0, "0.03")  # hardly any zeros: nearly all is drift
    assert Sparsegpt(drift=0.0).wants() == {Need.HESSIAN}
    assert Sparsegpt(drift=0.1).wants() == {Need.HESSIAN, Need.CROSS}

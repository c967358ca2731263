"""The target that makes up for an input's drift, against the least squares that it stands for."""

import pytest
import torch

from unicomp.compress.drift import moved
from unicomp.compress.linalg import Order, factorise
from unicomp.compress.method import Stats


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight [20, 16], and the same tokens' inputs as they were and as they are."""
    generator = torch.Generator().manual_seed(3)
    original = torch.randn(500, 16, generator=generator, dtype=torch.float64)
    mixing = torch.randn(16, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(20, 16, generator=generator, dtype=torch.float64)
    return weight, original, original + 0.3 * original @ mixing


@pytest.mark.parametrize("order", ["none", "act"])
@pytest.mark.parametrize("many", [None, True, False])
def test_the_whole_step_is_least_squares(order: Order, many: bool | None) -> None:
    weight, original, inputs = problem()
    stats = Stats(500, inputs.T @ inputs / 500, (original - inputs).T @ inputs / 500)
    assert stats.hessian is not None
    factor = factorise(stats.hessian, order=order, damp=0.0)
    wanted = torch.linalg.lstsq(inputs, original @ weight.T).solution.T
    found = moved(weight, stats, factor, 1.0, many=many)
    torch.testing.assert_close(found, wanted)
    half = moved(weight, stats, factor, 0.5, many=many)
    torch.testing.assert_close(half, (wanted + weight) / 2)
    assert not torch.allclose(half, wanted)
    assert bool(stats.memo) == (many is not False)


def test_nothing_to_make_up_for() -> None:
    weight, _, inputs = problem()
    stats = Stats(500, inputs.T @ inputs / 500)
    assert stats.hessian is not None
    factor = factorise(stats.hessian)
    assert moved(weight, stats, factor, 1.0) is weight
    stats = Stats(500, stats.hessian, stats.hessian)
    assert moved(weight, stats, factor, 0.0) is weight

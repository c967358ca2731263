"""Training of scales: it finds what is best, and leaves what it cannot better."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from unicomp.compress.scales import distill
from unicomp.errors import UnsupportedError
from unicomp.kernels.delta import PackedDelta, Plane, pack_signs, round_factors
from unicomp.kernels.delta_product import DeltaProduct

ROWS, COLUMNS = 12, 20


class Linear(nn.Module):
    """A model of one product, whose tokens are looked up in a fixed table."""

    def __init__(self, product: nn.Module) -> None:
        super().__init__()
        self.product = product
        draw = torch.Generator().manual_seed(2)
        self.register_buffer("table", torch.randn(50, COLUMNS, generator=draw))

    def forward(self, ids: Tensor) -> SimpleNamespace:
        table = self.get_buffer("table")
        return SimpleNamespace(logits=self.product(table[ids]))


def product(scale: float) -> DeltaProduct:
    draw = torch.Generator().manual_seed(3)
    signs = pack_signs(torch.randn(ROWS, COLUMNS, generator=draw) > 0)
    return DeltaProduct(PackedDelta((ROWS, COLUMNS), (Plane(signs, torch.tensor([scale])),), None))


def windows() -> Tensor:
    return torch.randint(0, 50, (32, 10), generator=torch.Generator().manual_seed(4))


def test_the_best_scale_is_found() -> None:
    own = product(0.8)
    found = distill(Linear(own), Linear(product(1.0)), {"w": own}, windows(), steps=200, seed=0)
    assert found.after < 1e-4 * found.before
    assert float(found.scales["w"]["scale0"]) == pytest.approx(1.0, abs=2e-3)


def test_scales_that_are_best_already_stay() -> None:
    own = product(1.0)
    found = distill(Linear(own), Linear(product(1.0)), {"w": own}, windows(), steps=3, seed=0)
    assert found.before == found.after == 0.0
    assert float(own.get_buffer("scale0")) == 1.0


def test_a_delta_without_scales_is_refused() -> None:
    u, v = torch.randn(ROWS, 2), torch.randn(2, COLUMNS)
    own = DeltaProduct(PackedDelta((ROWS, COLUMNS), (), round_factors(u, v, int8=False)))
    with pytest.raises(UnsupportedError, match="no scales"):
        distill(Linear(own), Linear(own), {"w": own}, windows(), steps=1, seed=0)

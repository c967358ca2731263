"""The product with a delta is that with its decoded values, whatever computes it."""

import pytest
import torch
from torch import Tensor

from unicomp.kernels import cpu
from unicomp.kernels.delta import Factors, PackedDelta, Plane, pack_signs, round_factors
from unicomp.kernels.delta_product import DeltaProduct

BACKENDS = ["torch", *(["cpu"] if cpu.available() else [])]
SHAPES = [(1, 1), (7, 33), (16, 64), (70, 341), (130, 700)]


def made(
    shape: tuple[int, int],
    planes: int = 2,
    *,
    rank: int = 5,
    int8: bool = True,
    by_row: bool = True,
) -> PackedDelta:
    draw = torch.Generator().manual_seed(shape[1])
    rows, columns = shape
    found = tuple(
        Plane(
            pack_signs(torch.randn(shape, generator=draw) > 0),
            torch.rand((rows, 1) if by_row else (1,), generator=draw) / (index + 1),
        )
        for index in range(planes)
    )
    factors: Factors | None = None
    if rank:
        u, v = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
        factors = round_factors(u, v, int8=int8)
    return PackedDelta(shape, found, factors)


def inputs(shape: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, shape[1], generator=torch.Generator().manual_seed(1))


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("planes", "rank"), [(1, 0), (0, 3), (2, 21), (4, 1)])
@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("by_row", [True, False])
def test_exact_is_the_decoded_delta(
    backend: str, shape: tuple[int, int], planes: int, rank: int, int8: bool, by_row: bool
) -> None:
    packed = made(shape, planes, rank=rank, int8=int8, by_row=by_row)
    product, x = DeltaProduct(packed, backend=backend), inputs(shape)
    wanted = x.double() @ packed.decode().double().T
    assert product(x).shape == (2, 3, shape[0])
    assert error(product(x), wanted) < 2e-6
    index = torch.arange(12).view(3, 4) % shape[0]
    torch.testing.assert_close(product.rows(index), packed.decode()[index], rtol=1e-5, atol=1e-5)
    assert error(product(x), wanted.roll(1, 0)) > 0.1  # the measure sees another input's product


@pytest.mark.skipif(not cpu.available(), reason="no C extension")
@pytest.mark.parametrize("int8", [True, False])
def test_int8_rounds_a_little(int8: bool) -> None:
    packed = made((130, 700), int8=int8)
    product, x = DeltaProduct(packed, backend="cpu", compute="int8"), inputs((130, 700))
    wanted = x.double() @ packed.decode().double().T
    assert 1e-4 < error(product(x), wanted) < 0.02


@pytest.mark.skipif(not cpu.available(), reason="no C extension")
def test_panels_take_what_the_folder_does() -> None:
    packed = made((512, 2048), 2, rank=64)
    product = DeltaProduct(packed, backend="cpu")
    assert packed.nbytes <= product.nbytes <= 1.03 * packed.nbytes
    assert DeltaProduct(packed).nbytes == packed.nbytes


def test_scales_can_be_trained() -> None:
    packed = made((16, 64), 1, rank=0, by_row=False)
    product, x = DeltaProduct(packed), inputs((16, 64))
    scale = product.get_buffer("scale0").requires_grad_()
    product(x).sum().backward()
    signs = packed.decode().sign()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, (x @ signs.T).sum().view(1))

"""The bytes of a delta, against numpy."""

import numpy as np
import pytest
import torch

from unicomp.kernels.delta import (
    Factors,
    Layout,
    PackedDelta,
    Plane,
    add_plane,
    collect,
    module_of,
    pack_signs,
    unpack_signs,
)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 341])
def test_signs_lie_as_numpy_packs_them(columns: int) -> None:
    positive = torch.rand(5, columns, generator=torch.Generator().manual_seed(columns)) > 0.4
    packed = pack_signs(positive)
    expected = np.packbits(positive.numpy(), axis=1, bitorder="little")
    assert packed.numpy().tolist() == expected.tolist()
    assert torch.equal(unpack_signs(packed, columns), positive)


def made(by_row: bool, int8: bool) -> PackedDelta:
    draw = torch.Generator().manual_seed(0)
    rows, columns, rank = 6, 11, 3
    planes = tuple(
        Plane(
            pack_signs(torch.randn(rows, columns, generator=draw) > 0),
            torch.rand((rows, 1) if by_row else (1,), generator=draw),
        )
        for _ in range(2)
    )
    u, v = torch.randn(rows, rank, generator=draw), torch.randn(rank, columns, generator=draw)
    factors = Factors(u.half(), v.half(), None, None)
    if int8:
        scales = torch.rand(2, rank, generator=draw)
        u8, v8 = ((own * 20).to(torch.int8) for own in (u, v))
        factors = Factors(u8, v8, scales[0], scales[1])
    return PackedDelta((rows, columns), planes, factors)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_values_bytes_and_names(by_row: bool, int8: bool) -> None:
    packed = made(by_row, int8)
    expected = np.zeros(packed.shape)
    for plane in packed.planes:
        bits = np.unpackbits(plane.sign.numpy(), axis=1, bitorder="little")[:, :11]
        expected += plane.scale.numpy().astype(np.float64) * (2.0 * bits - 1)
    factors = packed.factors
    assert factors is not None
    u, v = factors.u.double().numpy(), factors.v.double().numpy()
    if factors.u_scale is not None and factors.v_scale is not None:
        u = u * factors.u_scale.numpy()
        v = v * factors.v_scale.numpy()[:, None]
    np.testing.assert_allclose(packed.decode().numpy(), expected + u @ v, atol=1e-5)
    tensors = packed.tensors("m")
    metas = packed.layout.metas("m", packed.shape)
    assert {meta.name: meta.shape for meta in metas} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == packed.nbytes
    again = collect("m", packed.shape, packed.layout, tensors.__getitem__)
    assert torch.equal(again.decode(), packed.decode())


def test_a_wrong_bit_is_a_wrong_value() -> None:
    packed = made(True, False)
    packed.planes[1].sign[2, 0] ^= 4
    assert int((packed.decode() != made(True, False).decode()).sum()) == 1


def test_experts_have_a_dimension_in_front() -> None:
    metas = {meta.name: meta for meta in Layout(1, False, 2, True).metas("e", (4, 6, 11))}
    assert metas["e.delta_sign"].shape == (4, 6, 2)
    assert metas["e.delta_scale"].shape == (4, 1)
    assert metas["e.delta_u"].shape == (4, 6, 2)
    assert metas["e.delta_v_scale"].shape == (4, 2)


def test_planes_are_added_in_pieces_as_whole() -> None:
    rows, columns = 3000, 2049  # more than a piece
    positive = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) > 0.5
    total = torch.ones(rows, columns)
    scale = torch.rand(rows, 1)
    add_plane(total, pack_signs(positive), scale, times=-2.0)
    assert torch.equal(total, 1 - 2 * torch.where(positive, scale, -scale))


def test_modules() -> None:
    assert module_of("a.b.weight") == "a.b"
    assert module_of("a.experts.down_proj") == "a.experts.down_proj"

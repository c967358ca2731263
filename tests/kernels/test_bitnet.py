"""BitNet's bytes against transformers' own functions and modules, which were written by others."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights, unpack_weights

from unicomp.kernels import bitnet


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 999))
def test_the_bytes_are_those_of_transformers(quarter: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (4 * quarter, columns), dtype=torch.int8, generator=draw)
    theirs = pack_weights(codes.clone())  # it adds one to its argument in place
    packed = bitnet.pack(codes)
    assert torch.equal(packed, theirs)
    assert torch.equal(bitnet.unpack(theirs), codes)
    assert torch.equal(unpack_weights(packed, dtype=torch.float32), codes.float())
    assert not torch.equal(bitnet.unpack(theirs ^ 1), codes)


def test_known_byte() -> None:
    assert int(bitnet.pack(torch.tensor([[-1], [0], [1], [1]], dtype=torch.int8))[0, 0]) == 0xA4


def test_each_class_gets_the_scale_that_it_wants() -> None:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (16, 32), dtype=torch.int8, generator=draw)
    scale = torch.tensor([0.31])
    x = torch.randn(5, 32, generator=draw)
    meant = x @ (codes.float() * scale).T
    for name in bitnet.CLASSES:
        value = bitnet.stored(scale, name, torch.float32)
        assert torch.allclose(bitnet.factor(value, {"linear_class": name}), scale)
        if name == "bitlinear":
            linear = BitLinear(32, 16, bias=False, dtype=torch.float32)
            linear.weight = bitnet.pack(codes)
            linear.weight_scale = value
            found = linear(x)
        else:
            own = AutoBitLinear(32, 16, bias=False, online_quant=False)
            own.load_state_dict({"weight": codes.float(), "weight_scale": value})
            found = own(x)
        assert float((found - meant).abs().max()) < 0.03 * float(meant.abs().max())
        wrong = 1 / value
        if name == "bitlinear":
            linear.weight_scale = wrong
            assert float((linear(x) - meant).abs().max()) > float(meant.abs().max())


def test_what_is_not_ternary_is_refused() -> None:
    import pytest

    with pytest.raises(ValueError, match="four rows"):
        bitnet.pack(torch.full((4, 4), 2, dtype=torch.int8))
    with pytest.raises(ValueError, match="four rows"):
        bitnet.pack(torch.zeros((6, 4), dtype=torch.int8))

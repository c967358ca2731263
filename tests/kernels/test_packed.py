"""Codes in words: the bytes of an independent packer, there and back, whatever the width."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unicomp.kernels.packed import PackedTensor, Scheme, pack_words, unpack_words, words

BITS = range(2, 9)


def oracle(codes: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Pack bit by bit: bit k*bits + b of a row's stream is bit b of code k."""
    unsigned = (codes.astype(np.int64) + (1 << (bits - 1))).astype(np.uint8)
    planes = ((unsigned[..., None] >> np.arange(bits)) & 1).reshape(len(codes), -1)
    planes = np.pad(planes, ((0, 0), (0, -planes.shape[1] % 32)))
    return np.packbits(planes, axis=1, bitorder="little").view("<i4")


@st.composite
def codes(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Any codes of any width, the extremes of the range among them."""
    bits = draw(st.sampled_from(list(BITS)))
    rows, count = draw(st.integers(1, 6)), draw(st.integers(1, 140))
    low, high = Scheme(bits, -1).code_range
    seed = draw(st.integers(0, 2**32 - 1))
    values = np.random.default_rng(seed).integers(low, high + 1, (rows, count))
    values[0, 0], values[-1, -1] = low, high
    return torch.from_numpy(values.astype(np.int8)), bits


@settings(max_examples=200, deadline=None)
@given(codes())
def test_unpack_undoes_pack_and_bytes_are_the_oracles(drawn: tuple[torch.Tensor, int]) -> None:
    values, bits = drawn
    before = values.clone()
    packed = pack_words(values, bits)
    assert torch.equal(values, before)
    assert packed.dtype == torch.int32
    assert packed.shape == (len(values), words(values.shape[1], bits))
    assert packed.is_contiguous()
    assert np.array_equal(packed.numpy(), oracle(values.numpy(), bits))
    assert torch.equal(unpack_words(packed, bits, values.shape[1]), values)


@settings(max_examples=50, deadline=None)
@given(codes(), st.integers(0, 2**32 - 1))
def test_permuted_rows_give_permuted_words(drawn: tuple[torch.Tensor, int], seed: int) -> None:
    values, bits = drawn
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(pack_words(values[order], bits), pack_words(values, bits)[order])


@pytest.mark.parametrize("bits", BITS)
def test_no_rows_are_packed_to_no_rows(bits: int) -> None:
    packed = pack_words(torch.empty((0, 9), dtype=torch.int8), bits)
    assert packed.shape == (0, words(9, bits))
    assert unpack_words(packed, bits, 9).shape == (0, 9)


def test_strided_input() -> None:
    values = torch.randint(-4, 4, (40, 9), dtype=torch.int8)
    packed = pack_words(values.T, 3)
    assert np.array_equal(packed.numpy(), oracle(values.T.contiguous().numpy(), 3))
    spread = torch.stack((packed, packed), -1)[..., 0]
    assert torch.equal(unpack_words(spread, 3, 40), values.T)


@pytest.mark.parametrize(
    ("bits", "row", "expected"),
    [
        (4, list(range(-8, 8)), [0x76543210, 0xFEDCBA98]),
        (2, [-1, 0, 1, 0] * 4, [0xB9B9B9B9 & 0xFFFFFFFF]),
        (3, list(range(-4, 4)) * 4, [0x88FAC688, 0xC688FAC6, 0xFAC688FA]),
    ],
)
def test_published_vectors(bits: int, row: list[int], expected: list[int]) -> None:
    packed = pack_words(torch.tensor([row], dtype=torch.int8), bits)
    assert [word & 0xFFFFFFFF for word in packed[0].tolist()] == expected


@pytest.mark.parametrize("bits", BITS)
def test_compressed_tensors_packs_the_same(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    low, high = Scheme(bits, -1).code_range
    for shape in ((1, 1), (3, 31), (24, 172), (5, 341)):
        values = torch.randint(low, high + 1, shape, dtype=torch.int8)
        assert torch.equal(pack_words(values, bits), helpers.pack_to_int32(values, bits))


@pytest.mark.parametrize("bits", range(2, 8))
def test_a_code_out_of_range_is_refused(bits: int) -> None:
    low, high = Scheme(bits, -1).code_range
    for value in (low - 1, high + 1):
        with pytest.raises(ValueError, match="cannot be packed"):
            pack_words(torch.tensor([[0, value]], dtype=torch.int8), bits)


def test_words_of_another_count_are_refused() -> None:
    packed = pack_words(torch.zeros(2, 33, dtype=torch.int8), 4)
    with pytest.raises(ValueError, match="41 codes"):
        unpack_words(packed, 4, 41)


@settings(max_examples=30, deadline=None)
@given(
    codes(), st.integers(-1, 40), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16])
)
def test_dequantize_is_the_formula(
    drawn: tuple[torch.Tensor, int], size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    values, bits = drawn
    scheme = Scheme(bits, size if size > 0 else -1, symmetric)
    out, columns = values.shape
    groups = scheme.groups(columns)
    low, high = scheme.code_range
    scale = (torch.rand(out, groups) + 0.1).to(dtype)
    zero = None if symmetric else torch.randint(low, high + 1, (out, groups), dtype=torch.int8)
    packed = PackedTensor(values, scale, zero, scheme)
    wide = columns if scheme.group_size == -1 else scheme.group_size
    expected = np.zeros((out, columns))
    for row in range(out):
        for column in range(columns):
            group = column // wide
            shift = 0 if zero is None else int(zero[row, group])
            expected[row, column] = (int(values[row, column]) - shift) * float(scale[row, group])
    dense = packed.dequantize(dtype)
    assert dense.dtype == dtype
    assert torch.equal(dense, torch.from_numpy(expected).to(dtype))
    half = packed.rows(0, (out + 1) // 2)
    assert torch.equal(half.dequantize(dtype), dense[: (out + 1) // 2])


def test_dequantize_leaves_its_parts_alone() -> None:
    values = torch.randint(-8, 8, (4, 16), dtype=torch.int8)
    zero = torch.randint(-8, 8, (4, 2), dtype=torch.int8)
    packed = PackedTensor(values.clone(), torch.rand(4, 2), zero.clone(), Scheme(4, 8, False))
    first = packed.dequantize()
    assert torch.equal(packed.dequantize(), first)
    assert torch.equal(packed.codes, values)
    assert packed.zero_point is not None
    assert torch.equal(packed.zero_point, zero)

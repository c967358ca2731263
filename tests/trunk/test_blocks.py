"""GGUF blocks, byte for byte against gguf-py, which was written by others."""

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from unicomp import blocks

KINDS = sorted(blocks.SIZES)


def draw(kind: str, rows: int, count: int, seed: int) -> tuple[blocks.Codes, blocks.Scale]:
    rng = np.random.default_rng(seed)
    low, high = blocks.RANGES[kind]
    size = blocks.SIZES[kind][0]
    codes = rng.integers(low, high + 1, (rows, count * size), dtype=np.int8)
    scale = (rng.standard_normal((rows, count)) * 0.1).astype(np.float16)
    return codes, scale


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**16))
def test_gguf_reads_what_was_packed(kind: str, rows: int, count: int, seed: int) -> None:
    codes, scale = draw(kind, rows, count, seed)
    packed = blocks.pack(kind, codes, scale)
    size, nbytes = blocks.SIZES[kind]
    assert packed.shape == (rows, count * nbytes)
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == (size, nbytes)
    theirs = dequantize(packed, gguf.GGMLQuantizationType[kind])
    ours = blocks.dequantize(codes, scale)
    assert np.array_equal(theirs, ours)
    read, factors = blocks.unpack(kind, packed, count * size)
    assert np.array_equal(read, codes)
    assert np.array_equal(factors, scale)
    if packed.size and (ours != 0).any():
        harmed = packed.copy()
        harmed ^= 1
        assert not np.array_equal(dequantize(harmed, gguf.GGMLQuantizationType[kind]), ours)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(0, 2**16), st.booleans())
def test_plain_weights_become_the_bytes_that_gguf_makes(
    kind: str, rows: int, seed: int, zeros: bool
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, 512)).astype(np.float32)
    if zeros:
        weight[0, :256] = 0
    if kind.startswith("T"):  # already ternary: what such a tensor is made from
        weight = np.sign(np.round(weight)) * np.float32(0.37)
    theirs = quantize(weight, gguf.GGMLQuantizationType[kind])
    assert np.array_equal(blocks.pack(kind, *blocks.nearest(kind, weight)), theirs)


def test_known_bytes() -> None:
    codes = np.tile(np.array([-1, 0, 1, 0], np.int8), 64)[None]
    one = np.ones((1, 1), np.float16)
    first, second = blocks.pack("TQ1_0", codes, one), blocks.pack("TQ2_0", codes, one)
    assert first.tobytes()[:4].hex() == "0080ff80"
    assert first.tobytes()[-6:].hex() == "007ffd7f003c"
    assert second.tobytes()[:4].hex() == "0055aa55"
    assert second.tobytes()[-6:].hex() == "0055aa55003c"


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_block_cannot_hold_is_refused(kind: str) -> None:
    codes, scale = draw(kind, 2, 2, 0)
    if kind != "Q8_0":
        codes[0, 0] = blocks.RANGES[kind][1] + 1
        with pytest.raises(ValueError, match="outside"):
            blocks.pack(kind, codes, scale)
    with pytest.raises(ValueError, match="scales"):
        blocks.pack(kind, codes[:, :-1], scale)
    with pytest.raises(ValueError, match="are not"):
        blocks.unpack(kind, np.zeros((1, 7), np.uint8), 256)

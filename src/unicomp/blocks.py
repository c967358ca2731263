"""Blocks of GGUF tensors: codes and their scales as bytes, and back.

A row is cut into blocks of `SIZES[type][0]` values; a block holds one float16 scale `d` and codes:

    Q4_0   32   d, then 16 bytes: byte j holds value j low and value j+16 high; (q - 8) * d
    Q8_0   32   d, then 32 signed bytes; q * d
    TQ1_0  256  48 + 4 bytes of trits, then d; (t - 1) * d. A byte is ceil(v * 256 / 243) of
                five trits v = 81 a + 27 b + 9 c + 3 d + e: bytes 0..31 hold values j + 32 n,
                bytes 32..47 values 160 + j + 16 n, the last four 240 + j + 4 n, of four trits
    TQ2_0  256  64 bytes, then d; (q - 1) * d. Each half of 32 bytes holds 128 values:
                bits 2n, 2n+1 of byte j are value j + 32 n

Codes are signed here: `weight = code * scale`. `nearest` rounds plain weights by the rules of
llama.cpp's reference quantizers, in float32, so that its bytes are theirs.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int8]
Bytes = NDArray[np.uint8]
Scale = NDArray[np.float16]
Floats = NDArray[np.float32]

SIZES: Mapping[str, tuple[int, int]] = {
    "Q4_0": (32, 18),
    "Q8_0": (32, 34),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
}
"""Type -> values and bytes of a block."""

RANGES: Mapping[str, tuple[int, int]] = {
    "Q4_0": (-8, 7),
    "Q8_0": (-128, 127),
    "TQ1_0": (-1, 1),
    "TQ2_0": (-1, 1),
}
"""Type -> the least and the greatest code; TQ2_0 could hold a 2, which no reader expects."""

_TRITS = (np.array([81, 27, 9, 3, 1], np.uint16), np.array([1, 3, 9, 27, 81], np.uint16))
_PARTS = ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4))  # values, trits a byte, bytes


def pack(kind: str, codes: Codes, scale: Scale) -> Bytes:
    """Return the bytes of rows of blocks.

    codes    int8 [rows, columns]; columns a multiple of the block
    scale    float16 [rows, columns / block]
    returns  uint8 [rows, columns / block * bytes of a block]

    Raises ValueError for codes that the type cannot hold: they would read back as others.
    """
    size, nbytes = SIZES[kind]
    low, high = RANGES[kind]
    rows, columns = codes.shape
    if columns % size or scale.shape != (rows, columns // size) or scale.dtype != np.float16:
        raise ValueError(f"{kind}: codes {codes.shape} with scales {scale.shape} {scale.dtype}")
    if codes.size and (codes.min() < low or codes.max() > high):
        raise ValueError(f"codes outside {low}..{high} cannot be {kind}")
    blocks = codes.reshape(-1, size)
    factors = np.ascontiguousarray(scale).view(np.uint8).reshape(-1, 2)
    if kind == "Q4_0":
        halves = (blocks + 8).astype(np.uint8)
        parts = [factors, halves[:, :16] | halves[:, 16:] << 4]
    elif kind == "Q8_0":
        parts = [factors, blocks.view(np.uint8)]
    elif kind == "TQ1_0":
        parts = [*(_trits(blocks, part) for part in _PARTS), factors]
    else:
        pairs = (blocks + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
        bits = pairs[:, :, 0] | pairs[:, :, 1] << 2 | pairs[:, :, 2] << 4 | pairs[:, :, 3] << 6
        parts = [bits.reshape(-1, 64), factors]
    return np.concatenate(parts, axis=1).reshape(rows, columns // size * nbytes)


def unpack(kind: str, data: Bytes, columns: int) -> tuple[Codes, Scale]:
    """Return the codes int8 [rows, columns] and scales float16 [rows, blocks] of packed rows."""
    size, nbytes = SIZES[kind]
    rows = data.shape[0]
    if columns % size or data.shape != (rows, columns // size * nbytes):
        raise ValueError(f"{kind}: {data.shape} bytes are not {columns} columns")
    blocks = np.ascontiguousarray(data).reshape(-1, nbytes)
    front = kind in ("Q4_0", "Q8_0")
    factors = np.ascontiguousarray(blocks[:, :2] if front else blocks[:, -2:])
    body = blocks[:, 2:] if front else blocks[:, :-2]
    if kind == "Q4_0":
        codes = np.concatenate((body & 15, body >> 4), axis=1).astype(np.int8) - np.int8(8)
    elif kind == "Q8_0":
        codes = np.ascontiguousarray(body).view(np.int8)
    elif kind == "TQ1_0":
        codes = np.concatenate(_read_trits(body), axis=1)
    else:
        shifts = np.array([0, 2, 4, 6], np.uint8)[:, None]
        codes = ((body.reshape(-1, 2, 1, 32) >> shifts) & 3).astype(np.int8) - np.int8(1)
    return codes.reshape(rows, columns), factors.view(np.float16).reshape(rows, columns // size)


def nearest(kind: str, weight: Floats) -> tuple[Codes, Scale]:
    """Round a plain weight to a type, as llama.cpp does without an importance matrix.

    weight   float32 [rows, columns]; not modified
    returns  codes int8 [rows, columns], scales float16 [rows, blocks]; the codes are chosen with
             the float32 scale, before it is rounded
    """
    size, _ = SIZES[kind]
    rows, columns = weight.shape
    blocks = weight.reshape(-1, size)
    if kind == "Q4_0":
        place = np.abs(blocks).argmax(axis=1)[:, None]
        scale = np.take_along_axis(blocks, place, axis=1) / np.float32(-8)
    else:
        scale = np.abs(blocks).max(axis=1, keepdims=True)
        if kind == "Q8_0":
            scale = scale / np.float32(127)
    with np.errstate(divide="ignore"):
        inverse = np.where(scale == 0, np.float32(0), np.float32(1) / scale)
    steps = blocks * inverse
    if kind == "Q4_0":
        codes = np.clip(np.trunc(steps + np.float32(8.5)), 0, 15) - 8
    else:  # half away from zero, as C rounds
        codes = np.trunc(steps) + np.trunc(2 * (steps - np.trunc(steps)))
    return (
        codes.astype(np.int8).reshape(rows, columns),
        scale.astype(np.float16).reshape(rows, columns // size),
    )


def dequantize(codes: Codes, scale: Scale) -> Floats:
    """Return the weight float32 [rows, columns] that codes and block scales stand for."""
    size = codes.shape[1] // scale.shape[1]
    return codes.astype(np.float32) * np.repeat(scale.astype(np.float32), size, axis=1)


def _trits(blocks: Codes, part: tuple[int, int, int, int]) -> Bytes:
    start, stop, count, width = part
    values = (blocks[:, start:stop] + 1).astype(np.uint16).reshape(-1, count, width)
    number = (values * _TRITS[0][:count, None]).sum(axis=1)
    found: Bytes = ((number * 256 + 242) // 243).astype(np.uint8)
    return found


def _read_trits(body: Bytes) -> list[Codes]:
    found, place = [], 0
    for _, _, count, width in _PARTS:
        packed = body[:, place : place + width].astype(np.uint16)
        place += width
        shifted = (packed[:, None, :] * _TRITS[1][:count, None]) & 255
        trits = (shifted * 3) >> 8
        found.append((trits.astype(np.int8) - np.int8(1)).reshape(len(body), count * width))
    return found

"""A quantized weight in memory: integer codes with their scales, before any on-disk layout.

`PackedTensor` is what a quantizer returns, what a format packs and unpacks, and what a kernel
multiplies with. One value convention everywhere, that of compressed-tensors: codes are signed,
`weight = (codes - zero_point) * scale`, and the zero point is absent when symmetric.

`pack_words` and `unpack_words` are the one bit layout that compressed-tensors and GPTQ share:
code `c` is stored as `c + 2^(bits-1)`, code k of a row fills bits `k*bits .. k*bits+bits-1` of the
row's stream, low bits first, in 32-bit little-endian words; the last word ends in zero bits.
Eight codes fill `bits` whole bytes whatever the width, so the work is byte shifts on strided views.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight is quantized.

    bits        2 to 8 bits per code
    group_size  input columns that share a scale; -1: one scale per output row
    symmetric   no zero point
    """

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def code_range(self) -> tuple[int, int]:
        """The least and the greatest code, both included."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Return how many groups a row of `in_features` columns has; the last may be shorter."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One quantized linear weight.

    codes       int8 [out, in], within `scheme.code_range`
    scale       floating [out, groups], already rounded to the dtype it is stored in
    zero_point  int8 [out, groups], or None when symmetric
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight [out, in] that the codes stand for.

        Computed in float32 and rounded once to `dtype`, where that is another. With `dtype` that of
        the scale this is bit for bit what compressed-tensors computes: a product of two numbers of
        at most 8 and 11 (float16) significant bits is exact in float32.
        """
        out, columns = self.codes.shape
        size = columns if self.scheme.group_size == -1 else self.scheme.group_size
        weight = self.codes.float()
        dtype = dtype or torch.float32
        if columns % size == 0:
            grouped = weight.view(out, self.scale.shape[1], size)
            if self.zero_point is not None:
                grouped -= self.zero_point.float()[:, :, None]
            grouped *= self.scale.float()[:, :, None]
            return weight.to(dtype)
        group = torch.arange(columns, device=self.codes.device) // size
        if self.zero_point is not None:
            weight -= self.zero_point.float()[:, group]
        weight *= self.scale.float()[:, group]
        return weight.to(dtype)

    def rows(self, start: int, stop: int) -> PackedTensor:
        """Return the output rows `start:stop` as views."""
        zero = None if self.zero_point is None else self.zero_point[start:stop]
        return PackedTensor(self.codes[start:stop], self.scale[start:stop], zero, self.scheme)


def words(count: int, bits: int) -> int:
    """Return how many 32-bit words hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack signed codes along their last dimension, densely.

    codes    int8 [rows, count], within the range of `bits`; not modified
    bits     2 to 8
    returns  int32 [rows, words(count, bits)]

    Extra memory: two bytes per code and the result. A code out of range is a ValueError: it would
    spill into its neighbours.
    """
    low, high = Scheme(bits, -1).code_range
    rows, count = codes.shape
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        raise ValueError(f"codes outside {low}..{high} cannot be packed in {bits} bits")
    blocks = -(-count // 32)
    stream = torch.zeros((rows, blocks * 32), dtype=torch.uint8, device=codes.device)
    torch.add(codes.contiguous().view(torch.uint8), 1 << (bits - 1), out=stream[:, :count])
    eights = stream.view(torch.int64)
    for lane, shift in _lanes(bits):
        upper = eights >> lane
        upper &= _even(lane)
        upper <<= lane - shift
        eights &= _even(lane)
        eights |= upper
    kept = stream.view(rows, blocks * 4, 8)[..., :bits].reshape(rows, blocks * 4 * bits)
    return kept.view(torch.int32)[:, : words(count, bits)].contiguous()


def unpack_words(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the signed codes that `pack_words` packed.

    packed   int32 [rows, words(count, bits)]; not modified
    returns  int8 [rows, count]
    """
    rows, width = packed.shape
    if width != words(count, bits):
        raise ValueError(f"{count} codes of {bits} bits are not {width} words")
    blocks = -(-count // 32)
    padded = torch.zeros((rows, blocks * bits), dtype=torch.int32, device=packed.device)
    padded[:, :width] = packed
    stream = torch.zeros((rows, blocks * 4, 8), dtype=torch.uint8, device=packed.device)
    stream[..., :bits] = padded.view(torch.uint8).view(rows, blocks * 4, bits)
    codes = stream.view(rows, blocks * 32)
    eights = codes.view(torch.int64)
    for lane, shift in reversed(_lanes(bits)):
        # The mask may also cover bits of the gap below a lane: they are zero.
        lower = eights & (_even(lane) >> shift)
        eights -= lower
        eights <<= shift
        eights |= lower
    codes -= 1 << (bits - 1)
    return codes[:, :count].contiguous().view(torch.int8)


def _lanes(bits: int) -> list[tuple[int, int]]:
    """Return (lane, shift) of the three steps that close the gaps between eight codes.

    Each step takes pairs of lanes in a 64-bit word, `lane` bits wide with a gap of `shift` bits at
    the top, and moves the upper one down onto the lower one. Eight bits leave no gap, no step.
    """
    return [(lane, lane - lane * bits // 8) for lane in (8, 16, 32) if bits < 8]


def _even(lane: int) -> int:
    """Return the 64-bit mask of every other lane, the lowest included."""
    return sum(((1 << lane) - 1) << start for start in range(0, 64, 2 * lane))

"""A delta -> sign planes and low-rank factors, fitted in turn.

Signs with one scale take what lies everywhere; what they leave is often of low rank. Either part
can go first, and each can be fitted again to what the other leaves: with the factors fixed the
planes are fitted to `delta - u v`, and so on in turn. Both steps lower the squared error, or leave
it, except for what the rounding of factors adds.

Several planes are a grid of 2^planes values a row, symmetric about zero: signs of what the planes
before left, then scales by least squares, a few times over.

Papers: one bit, then low rank, D-QRELO, arXiv:2604.16940; several planes, alternating multi-bit
quantization, arXiv:1802.00150.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from unicomp.compress.lowrank import PASSES, leading
from unicomp.kernels.delta import (
    Factors,
    Layout,
    PackedDelta,
    Plane,
    add_plane,
    pack_signs,
    round_factors,
)
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

First = Literal["one-bit", "low-rank"]

BLOCK = 1 << 17  # weights of a block of rows: half a megabyte
SWEEPS = 4  # times that several planes' signs and scales are fitted in turn
RIDGE = 1e-6  # keeps equal planes from having no scales


@dataclass(frozen=True, slots=True)
class How:
    """How a delta is decomposed.

    zero_plus  the sign of zero is plus; else minus
    first      which part is fitted first
    rounds     times that the two are fitted in turn; 1: each once
    seed       of the random projection
    """

    zero_plus: bool = False
    first: First = "one-bit"
    rounds: int = 1
    seed: int = 0


def decompose(delta: Tensor, layout: Layout, how: How) -> PackedDelta:
    """Decompose the delta of one weight.

    delta    float32 [out, in], finite; not modified
    returns  the parts that the layout names, its rank lowered to min(out, in) where that is less
    """
    out, columns = delta.shape
    layout = replace(layout, rank=min(layout.rank, out, columns))
    planes: tuple[Plane, ...] = ()
    factors: Factors | None = None
    start: Tensor | None = None
    if not layout.planes:
        factors, _ = _factors(delta, layout, how.seed, None)
        return PackedDelta((out, columns), (), factors)
    order = ("planes", "factors") if how.first == "one-bit" else ("factors", "planes")
    rest = torch.empty_like(delta)
    for part in order * how.rounds if layout.rank else ("planes",):
        rest.copy_(delta)
        if part == "planes":
            if factors is not None:
                u, v = factors.wide()
                rest.addmm_(u, v, alpha=-1)
            planes = fit_planes(rest, layout.planes, by_row=layout.by_row, zero_plus=how.zero_plus)
            continue
        for plane in planes:
            add_plane(rest, plane.sign, plane.scale, times=-1)
        factors, start = _factors(rest, layout, how.seed, start)
    return PackedDelta((out, columns), planes, factors)


def fit_planes(target: Tensor, count: int, *, by_row: bool, zero_plus: bool) -> tuple[Plane, ...]:
    """Fit sign planes with scales to a matrix; one plane is fitted exactly.

    target  float32 [out, in]; not modified

    Rows are gone through in blocks that stay in the cache: the work is many simple passes.
    """
    blocks = target.split(max(1, BLOCK // max(target.shape[1], 1)))
    groups = [[block] for block in blocks] if by_row else [list(blocks)]
    fitted = [_fit(group, count, by_row, zero_plus) for group in groups]
    found = []
    for index in range(count):
        sign = torch.cat([signs[index] for _, signs in fitted])
        scale = torch.cat([scales[:, index : index + 1] for scales, _ in fitted])
        found.append(Plane(sign, scale if by_row else scale[0]))
    return tuple(found)


def squared_error(delta: Tensor, packed: PackedDelta) -> float:
    """Return the squared Frobenius norm of what a packed delta misses."""
    rest = packed.decode().sub_(delta)
    return inner(rest, rest)


def inner(one: Tensor, other: Tensor) -> float:
    """Return the sum of the products of two float32 [out, in], added up in float64 by blocks.

    A sum in another dtype than its input's copies the whole input first (torch 2.13).
    """
    step = max(1, BLOCK // max(one.shape[1], 1))
    total = 0.0
    for mine, theirs in zip(one.split(step), other.split(step), strict=True):
        total += float((mine * theirs).sum(dtype=torch.float64))
    return total


def _fit(
    blocks: list[Tensor], count: int, by_row: bool, zero_plus: bool
) -> tuple[Tensor, list[Tensor]]:
    """Fit planes to blocks of rows that share scales, or to one block with scales per row.

    returns  scales float32 [out or 1, count], and for each plane uint8 [out, ceil(in/8)]
    """
    scales = _greedy_scales(blocks, count, by_row)
    for _ in range(SWEEPS if count > 1 else 0):
        scales = _least_squares(blocks, scales, by_row, zero_plus)
    packed: list[list[Tensor]] = [[] for _ in range(count)]
    for block in blocks:
        for index, sign in enumerate(_signs(block, scales, zero_plus)):
            packed[index].append(pack_signs(sign))
    if count > 1:  # the scales of least error for just these signs
        scales = _least_squares(blocks, scales, by_row, zero_plus)
    return scales, [torch.cat(parts) for parts in packed]


def _mean(parts: Iterable[Tensor], by_row: bool) -> Tensor:
    """Return the mean of the parts together, float32 [1, 1], or of one part's rows, [out, 1]."""
    if by_row:
        return next(iter(parts)).mean(1, keepdim=True)
    total, size = torch.zeros((), dtype=torch.float64), 0
    for part in parts:
        total += part.sum(dtype=torch.float64)
        size += part.numel()
    return (total / size).float().reshape(1, 1)


def _greedy_scales(blocks: list[Tensor], count: int, by_row: bool) -> Tensor:
    """Return [out or 1, count]: the mean magnitude of what the planes before leave."""
    scales: list[Tensor] = []

    def rest(block: Tensor) -> Tensor:
        left = block.abs()
        for scale in scales:
            left = left.sub_(scale).abs_()
        return left

    for _ in range(count):
        scales.append(_mean(map(rest, blocks), by_row))
    return torch.cat(scales, 1)


def _signs(block: Tensor, scales: Tensor, zero_plus: bool) -> list[Tensor]:
    """Return for each plane bool [out, in]: the sign of what the planes before leave."""
    rest = block
    signs = []
    for index in range(scales.shape[1]):
        sign = rest >= 0 if zero_plus else rest > 0
        signs.append(sign)
        if index + 1 < scales.shape[1]:
            step = torch.where(sign, scales[:, index : index + 1], -scales[:, index : index + 1])
            rest = rest - step
    return signs


def _least_squares(blocks: list[Tensor], scales: Tensor, by_row: bool, zero_plus: bool) -> Tensor:
    """Return the scales of least squared error for the signs that these give, largest first."""
    rows, count = scales.shape
    size = sum(block.numel() for block in blocks) / rows
    if count == 2:
        return _two_values(blocks, scales, by_row, size)
    gram = torch.zeros(rows, count, count, dtype=torch.float64)
    right = torch.zeros(rows, count, 1, dtype=torch.float64)
    for block in blocks:
        signs = _signs(block, scales, zero_plus)
        whole = [sign.float().mul_(2).sub_(1) for sign in signs]
        for one in range(count):
            right[:, one] += _sum(whole[one] * block, by_row)
            for other in range(one):
                same = _sum(whole[one] * whole[other], by_row)
                gram[:, one, other] += same[:, 0]
                gram[:, other, one] += same[:, 0]
    gram /= size
    gram += torch.eye(count, dtype=torch.float64) * (1 + RIDGE)
    found: Tensor = torch.linalg.solve(gram, right / size)[:, :, 0].abs()
    return found.sort(1, descending=True).values.float()


def _two_values(blocks: list[Tensor], scales: Tensor, by_row: bool, size: float) -> Tensor:
    """Return the same for two planes: magnitudes take two values, the means of those around them.

    size  weights that share scales
    """
    count, high, whole = (torch.zeros(len(scales), 1, dtype=torch.float64) for _ in range(3))
    for block in blocks:
        magnitude = block.abs()
        above = (magnitude > scales[:, :1]).float()
        count += _sum(above, by_row)
        whole += _sum(magnitude, by_row)
        high += _sum(above.mul_(magnitude), by_row)
    low = (whole - high) / (size - count).clamp_min(1)
    high = torch.where(count > 0, high / count.clamp_min(1), low)
    low = torch.where(count < size, low, high)
    return torch.cat([(high + low) / 2, (high - low) / 2], 1).float()


def _sum(values: Tensor, by_row: bool) -> Tensor:
    """Return the sum of a block, float64 [1, 1], or of its rows, [out, 1]."""
    if by_row:
        return values.sum(1, keepdim=True).double()
    return values.sum(dtype=torch.float64).reshape(1, 1)


def _factors(
    matrix: Tensor, layout: Layout, seed: int, start: Tensor | None
) -> tuple[Factors | None, Tensor | None]:
    """Return the factors of a matrix's leading part, and a start for the next time."""
    if not layout.rank:
        return None, None
    # From where the last round ended, one pass is as good as more from nothing.
    u, values, v = leading(
        matrix, layout.rank, seed=seed, start=start, passes=PASSES if start is None else 1
    )
    root = values.sqrt()
    left, right = u * root, v * root[:, None]
    return round_factors(left, right, int8=layout.int8), v.T

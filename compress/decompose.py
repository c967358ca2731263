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

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from unicomp.compress.lowrank import PASSES, leading
from unicomp.kernels.delta import Factors, Layout, PackedDelta, Plane, add_plane, pack_signs

First = Literal["one-bit", "low-rank"]

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
    for part in order * how.rounds if layout.rank else ("planes",):
        rest = delta.clone()
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
    """
    scales = _greedy_scales(target, count, by_row=by_row, zero_plus=zero_plus)
    signs = _signs(target, scales, zero_plus)
    for _ in range(SWEEPS if count > 1 else 0):
        scales = _least_squares(target, signs, by_row)
        signs = _signs(target, scales, zero_plus)
    if count > 1:
        scales = _least_squares(target, signs, by_row)
    found = []
    for index, sign in enumerate(signs):
        scale = scales[:, index : index + 1].float()
        found.append(Plane(pack_signs(sign), (scale if by_row else scale[0]).contiguous()))
    return tuple(found)


def squared_error(delta: Tensor, packed: PackedDelta) -> float:
    """Return the squared Frobenius norm of what a packed delta misses."""
    rest = packed.decode().sub_(delta)
    return float(rest.square_().sum(dtype=torch.float64))


def _mean(values: Tensor, by_row: bool) -> Tensor:
    """Return means [out, 1] or [1, 1]; sums are exact enough for any size."""
    if by_row:
        return values.mean(1, keepdim=True)
    return values.mean(dtype=torch.float64).float().reshape(1, 1)


def _greedy_scales(target: Tensor, count: int, *, by_row: bool, zero_plus: bool) -> Tensor:
    """Return [out or 1, count]: the mean magnitude of what the planes before leave."""
    rest = target.abs()
    scales = []
    for _ in range(count):
        scale = _mean(rest, by_row)
        scales.append(scale)
        if len(scales) < count:
            rest = rest.sub_(scale).abs_()
    return torch.cat(scales, 1)


def _signs(target: Tensor, scales: Tensor, zero_plus: bool) -> list[Tensor]:
    """Return for each plane bool [out, in]: the sign of what the planes before leave."""
    rest = target
    signs = []
    for index in range(scales.shape[1]):
        sign = rest >= 0 if zero_plus else rest > 0
        signs.append(sign)
        if index + 1 < scales.shape[1]:
            step = torch.where(sign, scales[:, index : index + 1], -scales[:, index : index + 1])
            rest = rest - step
    return signs


def _least_squares(target: Tensor, signs: list[Tensor], by_row: bool) -> Tensor:
    """Return the scales [out or 1, count] of least squared error for these signs, largest first."""
    count = len(signs)
    rows = len(target) if by_row else 1
    gram = torch.eye(count).repeat(rows, 1, 1) * (1 + RIDGE)
    right = torch.empty(rows, count, 1)
    for one in range(count):
        right[:, one] = _mean(torch.where(signs[one], target, -target), by_row)
        for other in range(one):
            same = 1 - 2 * _mean((signs[one] ^ signs[other]).float(), by_row)
            gram[:, one, other] = gram[:, other, one] = same[:, 0]
    found: Tensor = torch.linalg.solve(gram, right)[:, :, 0].abs()
    return found.sort(1, descending=True).values


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
    return rounded(left, right, int8=layout.int8), v.T


def rounded(u: Tensor, v: Tensor, *, int8: bool) -> Factors:
    """Round two factors [out, rank], [rank, in]: to float16, or to int8 with a scale per rank."""
    if not int8:
        limit = torch.finfo(torch.float16).max
        return Factors(
            u.clamp(-limit, limit).half().contiguous(),
            v.clamp(-limit, limit).half().contiguous(),
            None,
            None,
        )
    u_scale = u.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny) / 127
    v_scale = v.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return Factors(
        (u / u_scale).round().clamp(-127, 127).to(torch.int8).contiguous(),
        (v / v_scale[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous(),
        u_scale,
        v_scale,
    )

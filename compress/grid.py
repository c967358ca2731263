"""Where the points of a quantization grid stand: a scale and perhaps a zero point a group.

A grid is found from the weights alone, by their extremes (`minmax`) or by least error over shrunk
ranges (`mse`), before any code is chosen: groups are static, so any order of columns may follow.
Scales are rounded to the dtype they will be stored in first, so that codes fit what is stored.
The last group of a row may be shorter.

Papers: the error norm 2.4 and the shrinking range are those of GPTQ's reference code
(arXiv:2210.17323); absmean scales are those of BitNet b1.58 (arXiv:2402.17764).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unicomp.kernels.packed import PackedTensor, Scheme

Search = Literal["minmax", "mse"]

STEPS = 100
LEAST_SHARE = 0.2
NORM = 2.4
CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Grid:
    """The points `(code - zero) * scale`, code within `low` and `high`.

    scale  float [out, groups], positive, representable in the stored dtype
    zero   float [out, groups], whole numbers, or None when symmetric
    low, high  the least and the greatest code
    """

    scale: Tensor
    zero: Tensor | None
    low: int
    high: int


def group_of(columns: int, scheme: Scheme, device: torch.device | None = None) -> Tensor:
    """Return the group of each column, int64 [in]."""
    size = columns if scheme.group_size == -1 else scheme.group_size
    return torch.arange(columns, device=device) // size


def grouped(weight: Tensor, scheme: Scheme) -> Iterator[tuple[slice, Tensor]]:
    """Yield (groups, view [out, groups, size]): the whole groups, then a shorter last one."""
    out, columns = weight.shape
    size = columns if scheme.group_size == -1 else min(scheme.group_size, columns)
    whole = columns // size
    yield slice(0, whole), weight[:, : whole * size].view(out, whole, size)
    if whole * size < columns:
        yield slice(whole, whole + 1), weight[:, whole * size :].view(out, 1, -1)


def search(weight: Tensor, scheme: Scheme, how: Search, *, dtype: torch.dtype) -> Grid:
    """Find the grid of every group of every row.

    weight  float [out, in]; not modified
    dtype   what scales are stored in; float16 and bfloat16 round them
    """
    low, high = scheme.code_range
    groups = scheme.groups(weight.shape[1])
    scale = weight.new_empty(weight.shape[0], groups)
    zero = None if scheme.symmetric else torch.empty_like(scale)
    for where, part in grouped(weight, scheme):
        flat = part.reshape(-1, part.shape[-1])
        rows = max(1, CHUNK // flat.shape[1])
        found_s, found_z = [], []
        for chunk in torch.split(flat, rows):
            s, z = _extremes(chunk, low, high, scheme.symmetric, dtype)
            if how == "mse":
                s, z = _least_error(chunk, s, z, low, high, dtype)
            found_s.append(s)
            found_z.append(z)
        scale[:, where] = torch.cat(found_s).view(weight.shape[0], -1)
        if zero is not None:
            zero[:, where] = torch.cat(found_z).view(weight.shape[0], -1)
    return Grid(scale, zero, low, high)


def stored(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the dtype they are stored in; never zero, never infinite."""
    info = torch.finfo(dtype)
    return scale.clamp(info.tiny, info.max).to(dtype).to(scale.dtype)


def _extremes(
    part: Tensor, low: int, high: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if symmetric:
        top = part.abs().amax(-1)
        scale = 2 * top / (high - low)
        zero = torch.zeros_like(scale)
    else:
        least, most = part.amin(-1).clamp_max(0), part.amax(-1).clamp_min(0)
        scale = (most - least) / (high - low)
        zero = least
    scale = stored(torch.where(scale > 0, scale, 1.0), dtype)
    if not symmetric:
        zero = torch.round(low - zero / scale).clamp(low, high)
    return scale, zero


def _least_error(
    part: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    best = torch.full_like(scale, torch.inf)
    best_s, best_z = scale.clone(), zero.clone()
    for step in range(int(STEPS * (1 - LEAST_SHARE))):
        s = stored(scale * (1 - step / STEPS), dtype)
        z = torch.round(zero * scale / s)
        z = z.clamp(low, high)
        q = torch.round(part / s[:, None] + z[:, None]).clamp_(low, high)
        error = ((q - z[:, None]) * s[:, None] - part).abs_().pow_(NORM).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        best_s = torch.where(better, s, best_s)
        best_z = torch.where(better, z, best_z)
    return best_s, best_z


def packed(codes: Tensor, found: Grid, scheme: Scheme, dtype: torch.dtype) -> PackedTensor:
    """Put codes int8 [out, in] and their grid together as they will be stored."""
    zero = None if found.zero is None else found.zero.to(torch.int8)
    return PackedTensor(codes, found.scale.to(dtype), zero, scheme)


def round_to(
    weight: Tensor, found: Grid, scheme: Scheme, *, dtype: torch.dtype
) -> tuple[PackedTensor, Tensor]:
    """Round every weight to the nearest point of its grid; also count clipped codes by row."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    clipped = torch.zeros(weight.shape[0], dtype=torch.int64, device=weight.device)
    code_views = [view for _, view in grouped(codes, scheme)]
    for (where, part), into in zip(grouped(weight, scheme), code_views, strict=True):
        raw = part / found.scale[:, where, None]
        if found.zero is not None:
            raw += found.zero[:, where, None]
        raw.round_()
        clipped += ((raw < found.low) | (raw > found.high)).sum((1, 2))
        into.copy_(raw.clamp_(found.low, found.high))
    return packed(codes, found, scheme, dtype), clipped


def output_error(error: Tensor, hessian: Tensor | None) -> Tensor:
    """Return diag(error · hessian · errorᵀ), float [out]; no Hessian: the identity."""
    if hessian is None:
        return error.square().sum(1)
    return ((error @ hessian) * error).sum(1)

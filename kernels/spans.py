"""The door to the C search for scales: every group of a weight, by least squares over a few spans.

`csrc/spans.h` is the definition; `compress/grid.py` says what it is for, and does the same in torch
where there is no extension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from unicomp.kernels import cpu
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

COUNT = 8  # as in csrc/spans.h


def usable(like: Tensor) -> bool:
    """Tell whether `search` takes tensors of this dtype and device here."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and cpu.available()


def search(
    weight: Tensor,
    cost: Tensor,
    shares: Sequence[float],
    *,
    group: int,
    symmetric: bool,
    low: int,
    high: int,
    polish: int,
) -> tuple[Tensor, Tensor | None]:
    """Return the scale and, unless symmetric, the zero point of every group, [out, groups].

    weight  float32 [out, in]
    cost    float32 [in], not negative: what a column's squared error costs
    shares  of the span from extreme to extreme, `COUNT` of them: the spans to try
    group   columns of a group; the last may be shorter
    low, high  the least and the greatest code
    polish  how often the best is tried again with the scale that it gave

    Raises ValueError where they do not fit each other.
    """
    from unicomp.kernels import _cpu

    rows, columns = weight.shape
    if weight.dtype != torch.float32 or cost.dtype != torch.float32:
        raise ValueError(f"`weight` is {weight.dtype}, `cost` is {cost.dtype}")
    if tuple(cost.shape) != (columns,) or len(shares) != COUNT:
        raise ValueError(f"`cost` is {list(cost.shape)}, `shares` are {len(shares)}")
    weight, cost, tried = weight.contiguous(), cost.contiguous(), torch.tensor(list(shares))
    groups = -(-columns // group)
    scale = torch.empty(rows, groups)
    zero = None if symmetric else torch.empty(rows, groups)
    _cpu.spans(
        weight.data_ptr(),
        cost.data_ptr(),
        tried.data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        rows,
        columns,
        group,
        polish,
        symmetric,
        low,
        high,
        cpu.threads(),
    )
    return scale, zero

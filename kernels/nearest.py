"""The door to the C loop of nearest plane: one block of columns rounded, each for all before it.

`csrc/nearest.h` is the definition; `compress/babai.py` says what it is for, and does the same in
torch where there is no extension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicomp.kernels import cpu
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 128  # columns of a block: more of them would not stay in the cache


def usable(like: Tensor) -> bool:
    """Tell whether `round_block` takes tensors of this dtype and device here."""
    return like.dtype == torch.float32 and like.device.type == "cpu" and cpu.available()


def round_block(
    goal: Tensor,
    block: Tensor,
    unit: Tensor,
    *,
    scale: Tensor,
    zero: Tensor | None,
    group: Tensor,
    low: int,
    high: int,
    codes: Tensor,
    clipped: Tensor,
) -> None:
    """Round columns one after the other, in place.

    goal     float32 [steps, rows]: what they should be, but for each other's errors; those are
             added
    block    float32 [steps, rows]: weights; holds weights minus rounded ones on return
    unit     float32 [steps, steps], any row stride: what an error moves a later column by, below
             the diagonal
    scale    float32 [groups, rows]
    zero     float32 [groups, rows], or None
    group    int32 [steps]: each column's group
    codes    int8 [steps, rows], written
    clipped  int64 [rows], counted on: codes whose target lay beyond `low` or `high`

    Raises ValueError where the tensors do not fit each other.
    """
    from unicomp.kernels import _cpu

    steps, rows = goal.shape
    shapes = {
        "block": (block, (steps, rows), torch.float32),
        "scale": (scale, (len(scale), rows), torch.float32),
        "zero": (scale if zero is None else zero, (len(scale), rows), torch.float32),
        "group": (group, (steps,), torch.int32),
        "codes": (codes, (steps, rows), torch.int8),
        "clipped": (clipped, (rows,), torch.int64),
        "goal": (goal, (steps, rows), torch.float32),
    }
    for name, (tensor, shape, dtype) in shapes.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"`{name}` is {tensor.dtype} {list(tensor.shape)}, not {shape}")
    if tuple(unit.shape) != (steps, steps) or unit.stride(1) != 1 or unit.dtype != torch.float32:
        raise ValueError(f"`unit` is {unit.dtype} {list(unit.shape)} of strides {unit.stride()}")
    _cpu.nearest(
        goal.data_ptr(),
        block.data_ptr(),
        unit.data_ptr(),
        unit.stride(0),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        group.data_ptr(),
        codes.data_ptr(),
        clipped.data_ptr(),
        steps,
        rows,
        len(scale),
        low,
        high,
        cpu.threads(),
    )

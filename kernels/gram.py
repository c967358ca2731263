"""The door to the C products of activations with activations: second moments in bfloat16.

`csrc/gram.h` is the definition. A product of two bfloat16 is exact in float32, so only sums are
rounded; a library's product of two bfloat16 matrices comes out in bfloat16, too coarse for a
Hessian.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicomp.kernels import cpu
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


def usable(like: Tensor) -> bool:
    """Tell whether `add` takes tensors of this dtype and device here."""
    from_cpu = like.dtype == torch.bfloat16 and like.device.type == "cpu" and cpu.available()
    return from_cpu and _usable()


def add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left.T @ right` to a total in place; for one and the same input its upper triangle.

    total  float32 [rows, columns], contiguous; where `left` is `right`, what stands below the
           diagonal is of no use afterwards
    left   bfloat16 [tokens, rows]
    right  bfloat16 [tokens, columns]

    Raises ValueError where they do not fit each other.
    """
    from unicomp.kernels import _cpu

    tokens, rows = left.shape
    columns = right.shape[1]
    shapes = {
        "total": (total, (rows, columns), torch.float32),
        "left": (left, (tokens, rows), torch.bfloat16),
        "right": (right, (tokens, columns), torch.bfloat16),
    }
    for name, (tensor, shape, dtype) in shapes.items():
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(f"`{name}` is {tensor.dtype} {list(tensor.shape)}, not {list(shape)}")
    if not total.is_contiguous():
        raise ValueError(f"`total` has strides {total.stride()}")
    same = left is right
    left = left.contiguous()
    right = left if same else right.contiguous()
    _cpu.gram(
        left.data_ptr(),
        right.data_ptr(),
        total.data_ptr(),
        tokens,
        rows,
        columns,
        same,
        cpu.threads(),
    )


def _usable() -> bool:
    from unicomp.kernels import _cpu

    return _cpu.gram_usable()

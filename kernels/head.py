"""The door to products of a few tokens with a dense weight in bfloat16, which is mostly the head.

`csrc/head.h` is the definition. Where the processor has no instructions for bfloat16, torch reads
such a weight more slowly than memory gives it, and for two to four tokens several times.
"""

from functools import cache

import torch
from torch import Tensor

from unicomp.kernels import cpu
from unicomp.kernels.cpu import HUGE_PAGE

TOKENS, STEP = 4, 32  # as in csrc/head.h


@cache
def _alone() -> bool:
    from unicomp.kernels import _cpu

    return _cpu.head_usable() and not _cpu.gram_usable()


def here() -> bool:
    """Tell whether there is the kernel, and torch has no instructions that are faster."""
    return cpu.available() and _alone()


def usable(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `multiply` takes these, and torch has no faster way.

    x       [..., in]
    weight  [out, in]
    """
    return here() and _fit(x, weight)


def settle(weight: Tensor) -> None:
    """Move a weight that `multiply` will take onto huge pages, in place; nothing if it is small.

    Read row beside row, small pages cost as much as the numbers do.
    """
    if here() and weight.dtype == torch.bfloat16 and weight.is_cpu and weight.nbytes >= HUGE_PAGE:
        room = cpu.allocate(weight.nbytes).view(weight.dtype).view(weight.shape)
        weight.data = room.copy_(weight.detach())


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T`, summed in float32 and rounded once.

    x        bfloat16 [..., in] on the CPU, contiguous, of at most `TOKENS` tokens
    weight   bfloat16 [out, in] on the CPU, contiguous; `STEP` divides `in`
    returns  bfloat16 [..., out]

    Raises ValueError where that is not what is given, or the processor has no AVX2.
    """
    from unicomp.kernels import _cpu

    if not _fit(x, weight):
        raise ValueError(
            f"no product of {x.dtype} {list(x.shape)} with {weight.dtype} {list(weight.shape)}"
        )
    rows, columns = weight.shape
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    _cpu.head(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // columns,
        rows,
        columns,
        cpu.threads(),
    )
    return out


def _fit(x: Tensor, weight: Tensor) -> bool:
    columns = weight.shape[-1]
    return (
        x.dtype == weight.dtype == torch.bfloat16
        and all(one.is_cpu and one.is_contiguous() for one in (x, weight))
        and weight.dim() == 2
        and x.shape[-1] == columns > 0
        and columns % STEP == 0
        and x.numel() <= TOKENS * columns
    )

"""The door to attention in bfloat16, in C: of whole windows, causally, and of the newest token.

`csrc/attention.h` is the definition. torch attends more slowly in bfloat16 than in float32, unless
the processor has instructions for it; windows need those here, the newest token AVX2.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from unicomp.kernels import cpu, gram

WIDTH_STEP, WIDTH_MAX = 16, 256  # as in csrc/attention.h


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether `attend` takes these: all windows whole, all of one width, dtype and device.

    query       [batch, heads, tokens, width]
    key, value  [batch, heads of keys, tokens, width]
    """
    return query.shape[2] == key.shape[2] and gram.usable(query) and _fit(query, key, value)


def usable_newest(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether `attend_newest` takes these, and nothing here attends to them faster.

    query       [batch, heads, 1, width]
    key, value  [batch, heads of keys, tokens, width]
    """
    return cpu.available() and _newest() and _fit_newest(query, key, value)


@cache
def _newest() -> bool:
    from unicomp.kernels import _cpu

    return _cpu.attention_newest_usable() and not _cpu.gram_usable()


def _fit_newest(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return query.shape[2] == 1 <= key.shape[2] and _fit(query, key, value)


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    batch, heads, _, width = query.shape
    groups, tokens = key.shape[1:3]
    return (
        all(
            one.dtype == torch.bfloat16 and one.is_cpu and one.stride(-1) == 1
            for one in (query, key, value)
        )
        and key.shape == value.shape == (batch, groups, tokens, width)
        and heads % groups == 0
        and width % WIDTH_STEP == 0
        and width <= WIDTH_MAX
    )


def attend(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Return each query's mean of the values up to its own place, weighed by softmax.

    query       bfloat16 [batch, heads, tokens, width]
    key, value  bfloat16 [batch, heads of keys, tokens, width]
    scale       of the scores
    returns     bfloat16 [batch, tokens, heads, width]

    Raises ValueError where they are not `usable`.
    """
    from unicomp.kernels import _cpu

    if not usable(query, key, value):
        raise _unusable(query, key, value)
    return _attend(_cpu.attention, query, key, value, scale)


def attend_newest(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Return each newest query's mean of all values, weighed by softmax.

    query       bfloat16 [batch, heads, 1, width]
    key, value  bfloat16 [batch, heads of keys, tokens, width]
    scale       of the scores
    returns     bfloat16 [batch, 1, heads, width]; weights and sums are float32

    Raises ValueError where they are not of these shapes, on the CPU, or it has not the
    instructions.
    """
    from unicomp.kernels import _cpu

    if not _fit_newest(query, key, value):
        raise _unusable(query, key, value)
    return _attend(_cpu.attention_newest, query, key, value, scale)


def _unusable(*given: Tensor) -> ValueError:
    return ValueError(f"cannot attend: {', '.join(f'{x.dtype} {list(x.shape)}' for x in given)}")


def _attend(
    kernel: Callable[..., None], query: Tensor, key: Tensor, value: Tensor, scale: float
) -> Tensor:
    batch, heads, tokens, width = query.shape
    out = torch.empty(batch, tokens, heads, width, dtype=query.dtype)
    kernel(
        query.data_ptr(),
        _strides(query),
        key.data_ptr(),
        _strides(key),
        value.data_ptr(),
        _strides(value),
        out.data_ptr(),
        batch,
        heads,
        key.shape[1],
        key.shape[2],
        width,
        scale,
        cpu.threads(),
    )
    return out


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)

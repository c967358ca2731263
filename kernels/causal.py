"""The door to causal attention of whole windows in bfloat16, in C.

`csrc/attention.h` is the definition. torch attends more slowly in bfloat16 than in float32.
"""

import torch
from torch import Tensor

from unicomp.kernels import cpu, gram

WIDTH_STEP, WIDTH_MAX = 16, 256  # as in csrc/attention.h


def usable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether `attend` takes these: all windows whole, all of one width, dtype and device.

    query       [batch, heads, tokens, width]
    key, value  [batch, heads of keys, tokens, width]
    """
    batch, heads, tokens, width = query.shape
    return (
        all(gram.usable(one) and one.stride(-1) == 1 for one in (query, key, value))
        and key.shape == value.shape == (batch, key.shape[1], tokens, width)
        and heads % key.shape[1] == 0
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
        raise ValueError(
            f"cannot attend: {query.dtype} {list(query.shape)}, {key.dtype} {list(key.shape)}, "
            f"{value.dtype} {list(value.shape)}"
        )
    batch, heads, tokens, width = query.shape
    out = torch.empty(batch, tokens, heads, width, dtype=query.dtype)
    _cpu.attention(
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
        tokens,
        width,
        scale,
        cpu.threads(),
    )
    return out


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)

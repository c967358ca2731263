"""The ternary layout of transformers' BitNet: four rows to a byte, one scale for a whole weight.

    <m>.weight        uint8 [out/4, in]   bits 2i and 2i+1 of byte (r, c) are the code, plus one,
                                          of row r + i * out/4
    <m>.weight_scale  [1], the model's dtype

Two classes read these names, and they use the scale in opposite ways: `bitlinear` divides by it,
`autobitlinear` multiplies. A file for one is silently wrong in the other, so the config's
`linear_class` decides, here as there. Both round activations to int8 per token, which no weight
can undo: a model scores the same here and there only up to that.

Paper: BitNet b1.58, arXiv:2402.17764.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


METHOD = "bitnet"
CLASSES = ("autobitlinear", "bitlinear")


def pack(codes: Tensor) -> Tensor:
    """Return uint8 [out/4, in] of ternary codes int8 [out, in].

    Raises ValueError for other codes, or rows that four do not divide.
    """
    if codes.shape[0] % 4 or (codes.numel() and int(codes.abs().max()) > 1):
        raise ValueError(f"codes of shape {tuple(codes.shape)} are not four rows of -1, 0, 1")
    parts = (codes + 1).to(torch.uint8).view(4, codes.shape[0] // 4, codes.shape[1])
    return parts[0] | parts[1] << 2 | parts[2] << 4 | parts[3] << 6


def unpack(packed: Tensor) -> Tensor:
    """Return the codes int8 [out, in] of uint8 [out/4, in]."""
    parts = [((packed >> shift) & 3).to(torch.int8) - 1 for shift in (0, 2, 4, 6)]
    return torch.cat(parts)


def factor(stored: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return what codes are multiplied with, float32 [1], by the config's `linear_class`."""
    scale = stored.float().reshape(1)
    return scale if config.get("linear_class") == "autobitlinear" else 1 / scale


def stored(scale: Tensor, linear_class: str, dtype: torch.dtype) -> Tensor:
    """Return the value to store, [1], for codes that are multiplied with `scale`."""
    value = scale.float().reshape(1)
    return (value if linear_class == "autobitlinear" else 1 / value).to(dtype)

"""Ternary weights, {-1, 0, 1} times a scale, by the same walk over the columns as GPTQ.

Codes take two bits in any layout that has two-bit codes, of which -2 is never used. The scale is
the one of least squared error, or the mean magnitude of the group, as BitNet b1.58 trains with.

Papers: absmean scales, BitNet b1.58, arXiv:2402.17764; the walk, arXiv:2210.17323 and 2507.18553.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from unicomp.compress import grid
from unicomp.compress.grid import Grid
from unicomp.compress.quantize.gptq import Gptq
from unicomp.kernels.packed import Scheme
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class Ternary(Gptq):
    """Options of ternary weights."""

    warning: ClassVar[str] = (
        "ternary weights need training: without it the model will be poor, "
        "this is a start for distillation"
    )

    bits: Literal[2] = Field(2, description="bits per weight, 2 to 8")
    symmetric: Literal[True] = Field(True, description="no zero point")
    sweeps: int = Field(
        4, ge=0, le=100, description="sweeps of coordinate descent over codes and scales afterwards"
    )
    absmean: bool = Field(
        False, description="scale is the group's mean magnitude, instead of the one of least error"
    )

    @model_validator(mode="after")
    def _all_ternary(self) -> Self:
        for pattern, override in self.modules.items():
            if override.bits not in (None, 2) or override.symmetric is False:
                raise ValueError(f"`{pattern}`: ternary weights have 2 bits and no zero point")
        return self

    def _grid(self, target: Tensor, scheme: Scheme, dtype: torch.dtype, cost: Tensor) -> Grid:
        how: grid.Search = "absmean" if self.absmean else self.scale_search
        return grid.search(target, scheme, how, dtype=dtype, importance=cost, codes=(-1, 1))

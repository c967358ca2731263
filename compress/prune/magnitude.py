"""Magnitude pruning: the smallest weights become zero; it needs no text.

The baseline that every other criterion is measured against.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from unicomp.compress.method import Pruned, PruneMethod, Stats
from unicomp.compress.sparsity import Sparsity, Target, keep, parse
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class Magnitude(PruneMethod):
    """Options of magnitude pruning."""

    scope: Literal["row", "global"] = Field(
        "row", description="a share of each row, or of all weights of the model together"
    )

    @model_validator(mode="after")
    def _single_zeros(self) -> Self:
        if self.spread() and parse(self.sparsity).m is not None:
            raise ValueError(
                f"`scope: global` shares out single zeros, `{self.sparsity}` is the same everywhere"
            )
        return self

    def target(self, module: str, columns: int) -> Sparsity | None:
        """Return the module's zeros, which by `scope: global` are those of the whole model."""
        found = super().target(module, columns)
        return None if found is None else replace(found, spread=self.spread())

    def spread(self) -> bool:
        """Tell whether the zeros are shared out over the whole model."""
        return self.scope == "global"

    def solve(self, weight: Tensor, stats: Stats, target: Target) -> Pruned:
        """Make the least magnitudes zero; float [out, in]."""
        weight = weight.float()
        return Pruned(torch.where(keep(weight.abs(), target), weight, 0.0))

"""Magnitude pruning: the smallest weights become zero; it needs no text.

The baseline that every other criterion is measured against.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unicomp.compress.method import Pruned, PruneMethod, Stats
from unicomp.compress.sparsity import Target, keep


class Magnitude(PruneMethod):
    """Options of magnitude pruning."""

    scope: Literal["row", "global"] = Field(
        "row", description="a share of each row, or of all weights of the model together"
    )

    def spread(self) -> bool:
        """Tell whether the zeros are shared out over the whole model."""
        return self.scope == "global"

    def solve(self, weight: Tensor, stats: Stats, target: Target) -> Pruned:
        """Make the least magnitudes zero; float [out, in]."""
        weight = weight.float()
        return Pruned(torch.where(keep(weight.abs(), target), weight, 0.0))

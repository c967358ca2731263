"""Wanda: drop the weights whose magnitude times input norm is least, row by row.

Paper: arXiv:2306.11695, equation 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from unicomp.compress.method import Allocation, Need, Pruned, PruneMethod, Stats
from unicomp.compress.sparsity import Target, keep
from unicomp.errors import CheckpointError
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class Wanda(PruneMethod):
    """Options of Wanda."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.NORM})

    allocation: Allocation = Field(
        "uniform",
        description="every linear has the share of zeros, or more where zeros are measured to cost "
        "less, at the same number in all",
    )
    exclude_sink: bool = Field(
        False, description="leave each window's first token, where activations are massive, out"
    )

    def solve(self, weight: Tensor, stats: Stats, target: Target) -> Pruned:
        """Make the least products of magnitude and input norm zero; float [out, in]."""
        weight = weight.float()
        kept = keep(weight.abs() * _norm(stats), target)
        return Pruned(torch.where(kept, weight, 0.0))


def _norm(stats: Stats) -> Tensor:
    """Return the norms of the inputs, from whatever was gathered."""
    if stats.norm is not None:
        return stats.norm
    if stats.hessian is None:
        raise CheckpointError(
            "there is no statistic of this layer's input", hint="give calibration text"
        )
    return stats.hessian.diagonal().sqrt()

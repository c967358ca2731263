"""SparseGPT: zeros chosen block by block, and made up for by the weights after them.

The same walk over the columns as GPTQ: what a column's error moves, and what an error costs once
later columns have made up for it, are the factor's; a weight's choice is to become zero or to take
its target as it is. Of a share the zeros of a block of columns are chosen when the walk reaches it,
over all rows together; of `n:m` those of each m columns.

Paper: SparseGPT, arXiv:2301.00774, algorithm 1; the walk as nearest plane, arXiv:2507.18553.
"""

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from unicomp.compress.babai import Choice, nearest_plane, ordered
from unicomp.compress.linalg import Factor, factorise, undamped
from unicomp.compress.method import Need, Pruned, PruneMethod, Stats
from unicomp.compress.sparsity import Sparsity, Target, Zeros, keep
from unicomp.errors import CheckpointError


class Sparsegpt(PruneMethod):
    """Options of SparseGPT."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.HESSIAN})

    damp: float = Field(
        0.01, ge=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean"
    )
    block_size: int = Field(
        128, ge=8, le=4096, description="columns whose zeros are chosen together"
    )
    exclude_sink: bool = Field(
        False, description="leave each window's first token, where activations are massive, out"
    )

    def workspace_bytes(self, rows: int, columns: int) -> int:
        """Return the most bytes that `solve` takes for a float32 weight [rows, columns]."""
        return 4 * (8 * rows * columns + 4 * columns * columns)

    def solve(self, weight: Tensor, stats: Stats, target: Target) -> Pruned:
        """Choose zeros and make up for them; float [out, in].

        Raises CheckpointError where the Hessian cannot be factorised.
        """
        if stats.hessian is None:
            raise CheckpointError(
                "there is no statistic of this layer's input", hint="give calibration text"
            )
        key = ("factor", "none", self.damp)
        if key not in stats.memo:
            stats.memo[key] = factorise(stats.hessian, damp=self.damp)
        factor = cast(Factor, stats.memo[key])
        weight = weight.to(stats.hessian.dtype)
        columns = ordered(weight, factor.order)
        reference = factor.energy(columns)
        plain = factor.energy(columns.masked_fill(keep(weight.abs(), target).T, 0.0))
        step = target.m if isinstance(target, Sparsity) and target.m is not None else 1
        size = -(-self.block_size // step) * step
        choice = Zeroing(factor, target, size)
        damped = nearest_plane(columns, factor, choice, block_size=size)
        return Pruned(
            torch.where(choice.kept.T, weight - columns.T, 0.0),
            error=undamped(damped, columns, factor.added),
            magnitude=plain,
            reference=reference,
            damp=factor.damp,
        )


class Zeroing(Choice):
    """The choice of a pruner: zero, or the target itself.

    kept  bool [in, rows], which weights stay
    """

    def __init__(self, factor: Factor, target: Target, leaf: int) -> None:
        if isinstance(target, Zeros):
            raise ValueError("zeros of a whole tensor cannot be chosen block by block")
        self.leaf = leaf
        self._pivots, self._target = factor.pivots, target
        self._rows: list[Tensor] = []

    @property
    def kept(self) -> Tensor:
        """Everything chosen so far."""
        return torch.cat(self._rows)

    def choose(self, goal: Tensor, block: Tensor, unit: Tensor, step: int) -> None:
        """Choose a block's zeros, or those of each m columns as the walk reaches them."""
        size = len(goal) if self._target.m is None else self._target.m
        for start in range(0, len(goal), size):
            some = slice(start, min(start + size, len(goal)))
            if start:
                goal[some].addmm_(unit[some, :start], block[:start])
            updated = _updated(goal[some], block[some], unit[some, some])
            kept = self._kept(updated, self._pivots[step + start : step + some.stop])
            self._rows.append(kept)
            for i in range(len(kept)):
                at = start + i
                if i:
                    goal[at : at + 1].addmm_(unit[at : at + 1, start:at], block[start:at])
                block[at] -= goal[at] * kept[i]

    def _kept(self, goal: Tensor, pivots: Tensor) -> Tensor:
        """Return which of some columns' targets stay, bool [columns, rows]."""
        cost = goal.square() * pivots[:, None]
        if self._target.m is not None:
            return keep(cost.T.contiguous(), self._target).T
        return keep(cost, Zeros(int(self._target.share * cost.numel())))


def _updated(goal: Tensor, weights: Tensor, unit: Tensor) -> Tensor:
    """Return what columns would be if none of them became zero, all [columns, rows].

    A target holds for the columns before it as they came; here each is its own target, which is
    what GPTQ's form of the walk has in its updated weights.
    """
    moved = torch.linalg.solve_triangular(
        unit.tril(-1), weights - goal, upper=False, unitriangular=True
    )
    return weights - moved

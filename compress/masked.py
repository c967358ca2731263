"""A choice for nearest plane among zero and something else: SparseGPT, alone and with a grid.

A `Mask` says which weights become zero, before the walk (magnitudes, Wanda) or as it goes on
(SparseGPT). What is kept is taken as it is or, given a `Rounding`, as the nearest point of its
grid; then mask and grid are chosen together: what a weight costs as zero is counted beyond what it
costs rounded.

Paper: SparseGPT, arXiv:2301.00774, algorithm 1 and section 3.5; the walk, arXiv:2507.18553.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from unicomp.compress.babai import Choice, Rounding
from unicomp.compress.sparsity import Sparsity, Target, Zeros, keep
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class Mask(ABC):
    """Which weights stay.

    width  columns that are decided together; None: all of a block
    """

    width: int | None = None

    @abstractmethod
    def kept(self, step: int, updated: Tensor, rounded: Tensor) -> Tensor:
        """Decide on some columns, bool [columns, rows].

        step     position of the first in the factor's order
        updated  [columns, rows], what they would be if none of them became zero
        rounded  [columns, rows], what would be taken of that
        """


class Given(Mask):
    """A mask that is known before."""

    def __init__(self, kept: Tensor) -> None:
        """`kept` is bool [in, rows], columns in the factor's order."""
        self._kept = kept

    def kept(self, step: int, updated: Tensor, rounded: Tensor) -> Tensor:
        """Return it."""
        return self._kept[step : step + len(updated)]


class Cheapest(Mask):
    """SparseGPT's: zeros are what costs least once later columns have made up for it.

    Of a share those of a block, over all rows together; of `n:m` those of each m columns, which
    must then stand in their own order.
    """

    def __init__(self, pivots: Tensor, target: Target) -> None:
        if not isinstance(target, Sparsity):
            raise TypeError("zeros of a whole tensor cannot be chosen block by block")
        self._pivots, self._target = pivots, target
        self.width = target.m

    def kept(self, step: int, updated: Tensor, rounded: Tensor) -> Tensor:
        """Compare what each would cost."""
        more = updated.square() - (updated - rounded).square()
        cost = more * self._pivots[step : step + len(updated), None]
        if self.width is not None:
            return keep(cost.T.contiguous(), self._target).T
        return keep(cost, Zeros(int(self._target.share * cost.numel())))


class Masked(Choice):
    """Zero, or the target, or the nearest point of the target's grid.

    kept  bool [in, rows], which weights stay, as far as the walk has come
    """

    def __init__(self, mask: Mask, like: Tensor, leaf: int, rounding: Rounding | None = None):
        """`like` is [in, rows]; `leaf` a multiple of the mask's width."""
        self.leaf = leaf
        self.kept = torch.ones_like(like, dtype=torch.bool)
        self._mask, self._rounding = mask, rounding

    def choose(self, goal: Tensor, block: Tensor, unit: Tensor, step: int) -> None:
        """Choose a block's zeros, or those of each group of columns as the walk reaches it."""
        size = self._mask.width or len(goal)
        for start in range(0, len(goal), size):
            some = slice(start, min(start + size, len(goal)))
            if start:
                goal[some].addmm_(unit[some, :start], block[:start])
            updated = rounded = _updated(goal[some], block[some], unit[some, some])
            if self._rounding is not None:
                rounded = self._rounding.nearest(step + start, updated)
            kept = self._mask.kept(step + start, updated, rounded)
            self.kept[step + start : step + some.stop] = kept
            for i, stays in enumerate(kept):
                at = start + i
                if i:
                    goal[at : at + 1].addmm_(unit[at : at + 1, start:at], block[start:at])
                if self._rounding is None:
                    block[at] -= torch.where(stays, goal[at], 0.0)
                else:
                    self._rounding.place(step + at, goal[at], block[at], stays)


def whole(block_size: int, width: int | None) -> int:
    """Return a block's columns, so many more that no group is cut in two."""
    return block_size if width is None else -(-block_size // width) * width


def _updated(goal: Tensor, weights: Tensor, unit: Tensor) -> Tensor:
    """Return what columns would be if none of them became zero, all [columns, rows].

    A target holds for the columns before it as they came; here each is its own target, which is
    what GPTQ's form of the walk has in its updated weights.
    """
    moved: Tensor = torch.linalg.solve_triangular(
        unit.tril(-1), weights - goal, upper=False, unitriangular=True
    )
    return weights - moved

"""Nearest plane over the columns of a weight: the one loop of every second-order method.

Columns are visited in the factor's order. Each column's target is its weight plus what the errors
already made would like it to be; a `Choice` says which value is taken instead (a point of a
quantization grid, a zero of a mask), and the difference joins the errors. All rows go together:
they share the factor and nothing else.

The work is left-looking and recursive: a block's targets come from one matrix product with all
errors before it, and within a block the same again by halves, so few vector products remain. Where
the C extension is built, its loop does the smallest pieces.

Paper: GPTQ as Babai's nearest plane, arXiv:2507.18553, theorem 4: the same integers as GPTQ
(arXiv:2210.17323, algorithm 1), which keeps updated weights and needs the inverse Hessian.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unicomp.compress.grid import Grid, group_of
from unicomp.compress.linalg import Factor
from unicomp.kernels import nearest
from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

LEAF = 8


class Choice(ABC):
    """What is taken instead of the targets of a few columns.

    leaf  the most columns that `choose` is given at once
    """

    leaf: int = LEAF

    @abstractmethod
    def choose(self, goal: Tensor, block: Tensor, unit: Tensor, step: int) -> None:
        """Choose a few columns, whose targets lack only each other's errors.

        goal   [steps, rows]: the targets; on return with each other's errors
        block  [steps, rows]: weights; weights minus chosen values on return
        unit   [steps, steps]: what an error moves a later target by, below the diagonal
        step   position of the first in the factor's order; they come in turn, block by block
        """


class OneByOne(Choice):
    """A choice that is made column by column."""

    def choose(self, goal: Tensor, block: Tensor, unit: Tensor, step: int) -> None:
        """Choose each column in turn."""
        for i in range(len(goal)):
            if i:
                goal[i : i + 1].addmm_(unit[i : i + 1, :i], block[:i])
            self.pick(step + i, goal[i], block[i])

    @abstractmethod
    def pick(self, step: int, target: Tensor, column: Tensor) -> None:
        """Choose the values of one column.

        step    position in the factor's order
        target  [rows], what the column should be, given the errors so far; not to be modified
        column  [rows], holds the weights; must hold weights minus chosen values on return
        """


def nearest_plane(columns: Tensor, factor: Factor, choice: Choice, *, block_size: int) -> Tensor:
    """Choose every column's values in the factor's order.

    columns  [in, rows], contiguous: the transposed weight in the factor's order; on return it
             holds weights minus chosen values
    returns  [rows], squared error of each row under the damped Hessian, from the pivots
    """
    size, rows = columns.shape
    block_size = min(block_size, size)
    targets = columns.new_empty(block_size, rows)
    weights = columns.new_empty(block_size, rows)
    error = columns.new_zeros(rows)
    for start in range(0, size, block_size):
        stop = min(start + block_size, size)
        block = columns[start:stop]
        goal = targets[: stop - start]
        before = weights[: stop - start].copy_(block)
        if start:
            torch.addmm(block, factor.unit[:start, start:stop].T, columns[:start], out=goal)
        else:
            goal.copy_(block)
        unit = factor.unit[start:stop, start:stop].T.contiguous()
        walk(goal, block, unit, choice, start)
        goal -= before
        goal += block
        error += goal.square_().mul_(factor.pivots[start:stop, None]).sum(0)
    return error


def walk(goal: Tensor, block: Tensor, unit: Tensor, choice: Choice, step: int) -> None:
    """Choose the columns of one block, whose targets lack only each other's errors."""
    size = goal.shape[0]
    if size > choice.leaf:
        half = (size + 1) // 2
        walk(goal[:half], block[:half], unit[:half, :half], choice, step)
        goal[half:].addmm_(unit[half:, :half], block[:half])
        walk(goal[half:], block[half:], unit[half:, half:], choice, step + half)
        return
    choice.choose(goal, block, unit, step)


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantized weight while it is worked on: transposed, columns in the weight's own order.

    codes   int8 [in, rows]
    scale   float [groups, rows]
    zero    float [groups, rows], or None when symmetric
    groups  the columns of each group
    low, high  the least and the greatest code
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    groups: list[slice]
    low: int
    high: int

    def packed(self, scheme: Scheme, dtype: torch.dtype) -> PackedTensor:
        """Return it as it will be stored, scales in `dtype`."""
        zero = None if self.zero is None else self.zero.T.to(torch.int8).contiguous()
        scale = self.scale.T.to(dtype).contiguous()
        return PackedTensor(self.codes.T.contiguous(), scale, zero, scheme)


class Rounding(OneByOne):
    """The choice of a quantizer: the nearest point of the column's grid.

    In float32 on the CPU a loop in C does many columns at once, where it is built.

    clipped  int64 [rows], codes whose target lay beyond the range
    """

    def __init__(self, found: Grid, scheme: Scheme, order: Tensor, *, clip: bool = True) -> None:
        """Lay out the grid by steps.

        order  int64 [in], the factor's order
        clip   False: codes may leave the range, as the error bound of the paper assumes; for tests
        """
        rows = found.scale.shape[0]
        self._found, self._scheme, self._order = found, scheme, order
        self._low, self._high = (found.low, found.high) if clip else (-128, 127)
        group = group_of(order.shape[0], scheme, order.device)[order]
        self._group, self._groups = group.tolist(), group.int()
        self._scale = found.scale.T.contiguous()
        self._zero = None if found.zero is None else found.zero.T.contiguous()
        self._codes = torch.empty(order.shape[0], rows, dtype=torch.int8, device=order.device)
        self._kernel = nearest.usable(found.scale)
        if self._kernel:
            self.leaf = nearest.STEPS
        self._raw = found.scale.new_empty(LEAF, rows)
        self._kept = torch.empty_like(self._raw)
        self._start = 0
        self.clipped = torch.zeros(rows, dtype=torch.int64, device=order.device)

    def choose(self, goal: Tensor, block: Tensor, unit: Tensor, step: int) -> None:
        """Round some columns."""
        some = slice(step, step + len(goal))
        if not self._kernel:
            self._start = step
            super().choose(goal, block, unit, step)
            raw, kept = self._raw[: len(goal)], self._kept[: len(goal)]
            self._codes[some] = kept
            self.clipped += (raw != kept).sum(0)
            return
        nearest.round_block(
            goal,
            block,
            unit,
            scale=self._scale,
            zero=self._zero,
            group=self._groups[some],
            low=self._low,
            high=self._high,
            codes=self._codes[some],
            clipped=self.clipped,
        )

    def pick(self, step: int, target: Tensor, column: Tensor) -> None:
        """Round the target."""
        group = self._group[step]
        scale, at = self._scale[group], step - self._start
        raw, kept = self._raw[at], self._kept[at]
        if self._zero is None:
            torch.div(target, scale, out=raw).round_()
            torch.clamp(raw, self._low, self._high, out=kept)
            column.addcmul_(kept, scale, value=-1)
        else:
            zero = self._zero[group]
            torch.addcdiv(zero, target, scale, out=raw).round_()
            torch.clamp(raw, self._low, self._high, out=kept)
            column.addcmul_(kept - zero, scale, value=-1)

    def nearest(self, step: int, updated: Tensor) -> Tensor:
        """Return the points of the grid nearest to some columns [steps, rows]."""
        group = self._groups[step : step + len(updated)].long()
        scale = self._scale[group]
        if self._zero is None:
            return (updated / scale).round_().clamp_(self._low, self._high) * scale
        zero = self._zero[group]
        return ((updated / scale + zero).round_().clamp_(self._low, self._high) - zero) * scale

    def errors(self, columns: Tensor) -> Tensor:
        """Return what columns [in, rows] are off from the points of the grid nearest to them."""
        found = torch.empty_like(columns)
        for at in range(0, len(columns), nearest.STEPS):
            some = columns[at : at + nearest.STEPS]
            torch.sub(some, self.nearest(at, some), out=found[at : at + nearest.STEPS])
        return found

    def place(self, step: int, target: Tensor, column: Tensor, kept: Tensor) -> None:
        """Round the target of one column where it is kept; the rest becomes zero."""
        scale = self._scale[self._group[step]]
        zero = torch.zeros_like(scale) if self._zero is None else self._zero[self._group[step]]
        raw = (target / scale + zero).round_()
        code = torch.where(kept, raw.clamp(self._low, self._high), zero)
        self.clipped += (raw != code) & kept
        self._codes[step] = code.to(torch.int8)
        column -= (code - zero) * scale

    def codes(self) -> Codes:
        """Return what was chosen."""
        found = self._found
        columns = self._codes.shape[0]
        size = columns if self._scheme.group_size == -1 else self._scheme.group_size
        return Codes(
            codes=restored(self._codes, self._order),
            scale=found.scale.T.contiguous(),
            zero=None if found.zero is None else found.zero.T.contiguous(),
            groups=[slice(at, min(at + size, columns)) for at in range(0, columns, size)],
            low=found.low,
            high=found.high,
        )


def ordered(weight: Tensor, order: Tensor) -> Tensor:
    """Return a weight [out, in] as columns [in, out] in an order, contiguous."""
    return weight.T.contiguous()[order]


def restored(columns: Tensor, order: Tensor) -> Tensor:
    """Return columns [in, ...] that stand in an order in their own order again."""
    own = torch.empty_like(columns)
    own[order] = columns
    return own

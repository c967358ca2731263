"""Nearest plane over the columns of a weight: the one loop of every second-order method.

Columns are visited in the factor's order. Each column's target is its weight plus what the errors
already made would like it to be; a `Choice` says which value is taken instead (a point of a
quantization grid, a zero of a mask), and the difference joins the errors. All rows go together:
they share the factor and nothing else.

The work is left-looking and recursive: a block's targets come from one matrix product with all
errors before it, and within a block the same again by halves, so few vector products remain.

Paper: GPTQ as Babai's nearest plane, arXiv:2507.18553, theorem 4: the same integers as GPTQ
(arXiv:2210.17323, algorithm 1), which keeps updated weights and needs the inverse Hessian.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from unicomp.compress.grid import Grid, group_of
from unicomp.compress.linalg import Factor
from unicomp.kernels.packed import PackedTensor, Scheme

LEAF = 8


class Choice(Protocol):
    """What is taken instead of a column's target."""

    def pick(self, step: int, target: Tensor, column: Tensor) -> None:
        """Choose the values of one column; steps come in order, block by block.

        step    position in the factor's order
        target  [rows], what the column should be, given the errors so far; not to be modified
        column  [rows], holds the weights; must hold weights minus chosen values on return
        """

    def close(self, start: int, stop: int) -> None:
        """Be told that the steps `start:stop` are done."""


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
        choice.close(start, stop)
        goal -= before
        goal += block
        error += goal.square_().mul_(factor.pivots[start:stop, None]).sum(0)
    return error


def walk(goal: Tensor, block: Tensor, unit: Tensor, choice: Choice, step: int) -> None:
    """Choose the columns of one block, whose targets lack only each other's errors."""
    size = goal.shape[0]
    if size > LEAF:
        half = (size + 1) // 2
        walk(goal[:half], block[:half], unit[:half, :half], choice, step)
        goal[half:].addmm_(unit[half:, :half], block[:half])
        walk(goal[half:], block[half:], unit[half:, half:], choice, step + half)
        return
    for i in range(size):
        if i:
            goal[i : i + 1].addmm_(unit[i : i + 1, :i], block[:i])
        choice.pick(step + i, goal[i], block[i])


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


class Rounding:
    """The choice of a quantizer: the nearest point of the column's grid.

    clipped  int64 [rows], codes whose target lay beyond the range
    """

    def __init__(
        self, found: Grid, scheme: Scheme, order: Tensor, *, block_size: int, clip: bool = True
    ) -> None:
        """Lay out the grid by steps.

        order  int64 [in], the factor's order
        clip   False: codes may leave the range, as the error bound of the paper assumes; for tests
        """
        rows = found.scale.shape[0]
        self._found, self._scheme, self._order = found, scheme, order
        self._low, self._high = (found.low, found.high) if clip else (-128, 127)
        self._group = group_of(order.shape[0], scheme, order.device)[order].tolist()
        self._scale = found.scale.T.contiguous().unbind(0)
        self._zero = None if found.zero is None else found.zero.T.contiguous().unbind(0)
        self._raw = found.scale.new_empty(min(block_size, order.shape[0]), rows)
        self._kept = torch.empty_like(self._raw)
        self._raws, self._kepts = self._raw.unbind(0), self._kept.unbind(0)
        self._start = 0
        self._codes = torch.empty(order.shape[0], rows, dtype=torch.int8, device=order.device)
        self.clipped = torch.zeros(rows, dtype=torch.int64, device=order.device)

    def pick(self, step: int, target: Tensor, column: Tensor) -> None:
        """Round the target."""
        group = self._group[step]
        scale, at = self._scale[group], step - self._start
        raw, kept = self._raws[at], self._kepts[at]
        if self._zero is None:
            torch.div(target, scale, out=raw).round_()
            torch.clamp(raw, self._low, self._high, out=kept)
            column.addcmul_(kept, scale, value=-1)
        else:
            zero = self._zero[group]
            torch.addcdiv(zero, target, scale, out=raw).round_()
            torch.clamp(raw, self._low, self._high, out=kept)
            column.addcmul_(kept - zero, scale, value=-1)

    def close(self, start: int, stop: int) -> None:
        """Keep the codes of a block."""
        raw, kept = self._raw[: stop - start], self._kept[: stop - start]
        self._codes[start:stop] = kept
        self.clipped += (raw != kept).sum(0)
        self._start = stop

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

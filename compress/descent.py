"""Coordinate descent on a quantized weight: what nearest plane left, group by group.

Nearest plane never goes back; this does. For one group of columns after the other, with all other
columns as they are, the group's scale is set to the one that fits its codes best (one division),
and each code to the best one, given all the others. The error under the damped Hessian falls or
stays at each step, so sweeps may stop anywhere.

The gradient of a block comes from one product with all errors; within it the same recursion as in
nearest plane applies, in units of codes.

Papers: descent on codes is that of QuantEase, arXiv:2309.01885; the scale's closed form is ordinary
least squares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicomp.compress.babai import Codes, OneByOne, walk
from unicomp.compress.grid import stored
from unicomp.kernels import nearest
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

HALF = 0.5 + 1e-4  # a code, and room for float32


def descend(
    errors: Tensor,
    state: Codes,
    hessian: Tensor,
    added: Tensor,
    *,
    dtype: torch.dtype,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sweep once over all groups, changing codes, scales and errors in place.

    errors   [in, rows], target minus dequantized
    added    [in], the damping of each column
    dtype    what scales are stored in
    kept     bool [in, rows], which codes may change; the others are zeros; None: all may
    returns  what the squared error under the damped Hessian fell by, float [rows], and how many
             codes were held at the end of the range, int64 [rows]
    """
    gain = errors.new_zeros(errors.shape[1])
    clipped = torch.zeros(errors.shape[1], dtype=torch.int64, device=errors.device)
    for index, columns in enumerate(state.groups):
        block = errors[columns]
        own = hessian[columns, columns].clone()
        own.diagonal().add_(added[columns])
        codes = state.codes[columns].to(errors.dtype)
        zero = None if state.zero is None else state.zero[index]
        if zero is not None:
            codes -= zero
        slope = torch.addcmul(hessian[columns] @ errors, added[columns, None], block)
        gain += _refit(state.scale[index], block, slope, codes, own, dtype)
        scale = state.scale[index]
        cost = own.diagonal().clone()
        slope /= scale
        slope /= cost[:, None]
        step = torch.empty_like(block)
        may = None if kept is None else kept[columns]
        choice = _Nearest(codes, zero, state.low, state.high, may)
        walk(slope, step, own / cost[:, None], choice, 0)
        block.addcmul_(step, scale)
        short = slope + step  # of the best value, in codes: more than a half at the range's end
        beyond = short.abs() > HALF
        clipped += (beyond if may is None else beyond & may).sum(0)
        gain -= short.add_(slope).mul_(step).mul_(cost[:, None]).sum(0) * scale.square()
        codes -= step
        if zero is not None:
            codes += zero
        state.codes[columns] = codes.to(torch.int8)
    return gain, clipped


class _Nearest(OneByOne):
    """Each code becomes the one that is best with all others as they are.

    codes  [in, rows], without their zero points
    zero   [rows], or None
    kept   bool [in, rows], which may change; None: all
    """

    def __init__(
        self, codes: Tensor, zero: Tensor | None, low: int, high: int, kept: Tensor | None = None
    ) -> None:
        self._codes, self._zero, self._low, self._high = codes, zero, low, high
        self._kept = kept
        self._kernel = nearest.usable(codes) and kept is None
        if self._kernel:
            self.leaf = nearest.STEPS

    def choose(self, goal: Tensor, block: Tensor, unit: Tensor, step: int) -> None:
        """Choose some columns; goal is the slope in units of codes, block becomes old minus new."""
        if not self._kernel:
            super().choose(goal, block, unit, step)
            return
        steps, rows = goal.shape
        old = self._codes[step : step + steps]
        goal += old
        block.copy_(old)
        nearest.round_block(
            goal,
            block,
            unit,
            scale=torch.ones(1, rows),
            zero=None if self._zero is None else self._zero[None],
            group=torch.zeros(steps, dtype=torch.int32),
            low=self._low,
            high=self._high,
            codes=torch.empty(steps, rows, dtype=torch.int8),
            clipped=torch.zeros(rows, dtype=torch.int64),
        )
        goal -= old

    def pick(self, step: int, target: Tensor, column: Tensor) -> None:
        """Choose one column, in the same terms."""
        old, zero = self._codes[step], 0 if self._zero is None else self._zero
        torch.add(old, target, out=column).add_(zero).round_()
        column.clamp_(self._low, self._high)
        torch.sub(old + zero, column, out=column)
        if self._kept is not None:
            column *= self._kept[step]


def _refit(
    scale: Tensor, block: Tensor, slope: Tensor, codes: Tensor, own: Tensor, dtype: torch.dtype
) -> Tensor:
    """Fit one group's scale to its codes in place, where that helps; return what it gained."""
    pull = own @ codes
    down = (codes * slope).sum(0)
    bend = (codes * pull).sum(0)
    wanted = scale + down / bend.clamp_min(torch.finfo(bend.dtype).tiny)
    step = stored(wanted.clamp(scale / 2, scale * 2), dtype) - scale
    gain = step * (2 * down - bend * step)
    step = torch.where(gain > 0, step, 0.0)
    scale += step
    block.addcmul_(codes, step, value=-1)
    slope.addcmul_(pull, step, value=-1)
    return gain.clamp_min_(0)

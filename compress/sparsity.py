"""How many weights become zero, and which: patterns of zeros, and masks from scores.

A share of each row, `n:m` (n of every m neighbouring weights in a row stay), or so many of a whole
tensor. Equal scores are told apart by their place, so a mask always has exactly the zeros asked
for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


PATTERN = re.compile(r"(\d+):(\d+)")
LARGEST_GROUP = 1024


@dataclass(frozen=True, slots=True)
class Sparsity:
    """A pattern of zeros.

    share  of the weights that become zero, of each row; with n and m the share that these make
    n, m   of every m neighbouring weights of a row n stay; both None: no such pattern
    within by how much a linear's own share may differ, the share being that of the whole model;
           None: every linear has the share
    spread the share is that of the whole model, and a linear's own follows from its magnitudes
    """

    share: float
    n: int | None = None
    m: int | None = None
    within: float | None = None
    spread: bool = False

    def __str__(self) -> str:
        if self.m is not None:
            return f"{self.n}:{self.m}"
        return f"{self.share:g}" + (f" ± {self.within:g}" if self.within is not None else "")

    def words(self) -> str:
        """Return what becomes of a linear, in words: `0.5 of each row zero`."""
        if self.m is not None:
            return f"{self} stay"
        if self.spread:
            return f"{self} of all weights together zero"
        return f"{self} of each row zero"

    def fits(self, columns: int) -> bool:
        """Tell whether rows of this many columns can have the pattern."""
        return self.m is None or columns % self.m == 0


@dataclass(frozen=True, slots=True)
class Zeros:
    """So many zeros in a whole tensor, wherever they fall."""

    count: int


Target = Sparsity | Zeros


def parse(text: float | str) -> Sparsity:
    """Read `0.5` or `2:4`; ValueError says what is wrong with it."""
    found = PATTERN.fullmatch(str(text))
    if found is not None:
        n, m = int(found[1]), int(found[2])
        if not 0 < n < m <= LARGEST_GROUP:
            raise ValueError(
                f"should be `n:m` with 0 < n < m <= {LARGEST_GROUP}: n of every m stay"
            )
        return Sparsity(1 - n / m, n, m)
    try:
        share = float(text)
    except ValueError:
        raise ValueError("should be a share of zeros such as 0.5, or `n:m` as in `2:4`") from None
    if not 0 < share < 1:
        raise ValueError("a share of zeros lies between 0 and 1")
    return Sparsity(share)


def notes(sparsity: Sparsity) -> Iterator[str]:
    """Yield what whoever runs the model should know: zeros alone bring mostly nothing."""
    same = "zeros take as many bytes as other weights"
    if sparsity.m is None:
        yield (
            f"{same}, and no runtime named here skips single ones: "
            "neither the file nor the model gets smaller or faster by them"
        )
    else:
        yield (
            f"{same}; n:m patterns are faster only on GPUs with sparse tensor cores and a runtime "
            "that uses them, such as 2:4 in vLLM: not measured here"
        )
    if sparsity.spread:
        yield (
            f"{sparsity.share:g} of all weights together, those of least magnitude wherever they "
            "are: each linear's share is counted before the first layer is pruned"
        )
    if sparsity.within is not None:
        yield (
            f"{sparsity.share:g} of all weights together: each linear's share, within "
            f"{sparsity.within:g} of that, is measured before the first layer is pruned"
        )


def keep(scores: Tensor, target: Target) -> Tensor:
    """Return which weights stay, those of the greatest scores: bool [rows, columns].

    scores  [rows, columns], what it costs to make a weight zero; of equal ones the first goes
    """
    rows, columns = scores.shape
    if isinstance(target, Zeros):
        return _without_least(scores.reshape(1, -1), target.count).view(rows, columns)
    if target.m is None or target.n is None:
        return _without_least(scores, int(target.share * columns))
    groups = scores.reshape(-1, target.m)
    return _without_least(groups, target.m - target.n).view(rows, columns)


def _without_least(scores: Tensor, count: int) -> Tensor:
    order = torch.argsort(scores, dim=1, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], False)


class Budget:
    """The least magnitudes of many tensors, found without holding more than one of them.

    Tensors pass three times, in the same order: two passes narrow down the magnitude that divides
    them, as the bits of a float32 say, and the third counts each tensor's zeros.
    """

    PASSES = 3

    def __init__(self, share: float) -> None:
        """`share` of all weights become zero, rounded down."""
        self._share = share
        self._upper = torch.zeros(1 << 16, dtype=torch.int64)
        self._lower = torch.zeros(1 << 16, dtype=torch.int64)
        self._bound: tuple[int, int] = (0, 0)
        self._left = 0
        self._pass = 0

    def add(self, weight: Tensor) -> Zeros | None:
        """Take up one tensor; in the last pass return its zeros."""
        bits = weight.float().abs().flatten().view(torch.int32)
        upper = bits >> 16
        if self._pass == 0:
            self._upper += torch.bincount(upper, minlength=1 << 16)
            return None
        inside = bits[upper == self._bound[0]] & 0xFFFF
        if self._pass == 1:
            self._lower += torch.bincount(inside, minlength=1 << 16)
            return None
        below = int((upper < self._bound[0]).sum()) + int((inside < self._bound[1]).sum())
        level = min(int((inside == self._bound[1]).sum()), self._left)
        self._left -= level
        return Zeros(below + level)

    def turn(self) -> None:
        """End a pass."""
        if self._pass == 0:
            self._left = int(self._share * int(self._upper.sum()))
            self._bound = (self._narrow(self._upper), 0)
        elif self._pass == 1:
            self._bound = (self._bound[0], self._narrow(self._lower))
        self._pass += 1

    def _narrow(self, counts: Tensor) -> int:
        """Return the first bin in which the zeros run out; take off those of the bins before."""
        before = counts.cumsum(0)
        found = int((before <= self._left).sum().clamp_max(len(counts) - 1))
        self._left -= int(before[found - 1]) if found else 0
        return found

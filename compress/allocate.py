"""Which parts of which delta are worth their bytes, under one budget.

Every weight has a few choices of planes, each with the error that they leave and the singular
values of it; a rank takes away its squared singular value and costs its bytes. At a price per byte
each weight has one best choice by itself; the price is found at which all together just fit, and
what is left over buys single ranks. This is the least sum of errors that any allocation of ranks
reaches, up to what is left over.

Paper: allocation at equal slopes, Shoham and Gersho, "Efficient bit allocation for an arbitrary set
of quantizers", IEEE Trans. ASSP 36(9), 1988.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from unicomp.kernels.delta import Layout
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

STEPS = 80  # halvings of the price's range
SLACK = 1.1  # what a rank may gain more than the random decomposition says
NOTHING = 1e-6  # of an error: not worth looking for
GRACE = 0.01  # of the ratio: what scales and the padding of signs may take beside it
FEW = 64  # ranks that are looked at first
WEIGHED = 1.5  # of a weight's own share: most that its planes may take and its ranks be looked for

# What rounding takes of a rank's gain: int8 with a scale per vector, and float16.
ROUNDING = {True: 2e-4, False: 2e-7}


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to keep the delta of a weight, before its rank is known.

    layout  of rank 0
    error   squared, of the planes alone, all matrices of the weight together
    gains   float64 [most], squared singular values of what the planes leave, largest first
    """

    layout: Layout
    error: float
    gains: Tensor


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight [out, in] with its choices.

    count       matrices of this shape, all kept alike: experts
    importance  what a squared error in this weight counts
    """

    shape: tuple[int, int]
    choices: Sequence[Choice]
    count: int = 1
    importance: float = 1.0

    def nbytes(self, layout: Layout) -> int:
        """Return the bytes that this layout takes of all its matrices."""
        return self.count * layout.nbytes(self.shape)

    def least(self) -> int:
        """Return the bytes of its smallest choice."""
        return min(self.nbytes(choice.layout) for choice in self.choices)


def settled(shape: tuple[int, int], choice: Choice, most: int, others: Sequence[Choice]) -> bool:
    """Say whether no rank of a choice beyond those known is ever bought.

    choice  of one matrix; its next ranks gain at most what its last known one does
    most    ranks that it may have
    others  with more planes

    So it is where a line from the last known rank to another choice runs, in bytes and errors,
    below all that the unknown ranks could reach: prices then jump over them.
    """
    known, cost = len(choice.gains), choice.layout.rank_bytes(shape)
    if known >= most:
        return True
    nbytes = choice.layout.nbytes(shape) + known * cost
    error = choice.error - float(choice.gains.sum())
    next_gain = SLACK * float(choice.gains[-1])
    least = error - (most - known) * next_gain
    if error - least <= NOTHING * choice.error:
        return True
    return any(
        other.error <= least
        and (error - other.error) * cost >= next_gain * (other.layout.nbytes(shape) - nbytes)
        for other in others
    )


def gains(values: Tensor, *, int8: bool) -> Tensor:
    """Return what each rank takes off the squared error once its factors are rounded, float64."""
    return values.double().square() * (1 - ROUNDING[int8])


def allocate(weights: Sequence[Weight], budget: int) -> list[Layout]:
    """Choose a layout for each weight so that the sum of errors is least within the bytes.

    budget  bytes of all of them

    Raises ValueError if the smallest choices do not fit: the caller asks `Weight.least` before.
    """
    if sum(weight.least() for weight in weights) > budget:
        raise ValueError("the budget is below the least")

    def taken(price: float) -> tuple[list[Layout], int]:
        found = [_best(weight, price) for weight in weights]
        return found, sum(w.nbytes(own) for w, own in zip(weights, found, strict=True))

    least = min(range(len(weights)), key=lambda i: weights[i].least()) if weights else None
    if least is None:
        return []
    chosen = [_smallest(weight) for weight in weights]
    low, high = -80.0, 200.0  # binary logarithms of the price; the high one buys the least
    for _ in range(STEPS):
        middle = (low + high) / 2
        found, nbytes = taken(2.0**middle)
        if nbytes <= budget:
            chosen, high = found, middle
        else:
            low = middle
    filled = [_fill(weights, chosen, budget), _swap(weights, chosen, budget)]
    return min(filled, key=lambda own: _error(weights, own))


def _smallest(weight: Weight) -> Layout:
    return min((choice.layout for choice in weight.choices), key=weight.nbytes)


def _best(weight: Weight, price: float) -> Layout:
    """Return the layout of least error plus price times bytes; of equals the smaller."""
    found: tuple[float, int, Layout] | None = None
    for choice in weight.choices:
        cost = price * weight.count * choice.layout.rank_bytes(weight.shape)
        own = choice.gains * weight.importance
        rank = int((own > cost).sum())
        layout = replace(choice.layout, rank=rank)
        nbytes = weight.nbytes(layout)
        total = weight.importance * choice.error - float(own[:rank].sum()) + price * nbytes
        if found is None or (total, nbytes) < found[:2]:
            found = total, nbytes, layout
    if found is None:
        raise ValueError("a weight without choices")
    return found[2]


def _fill(weights: Sequence[Weight], chosen: list[Layout], budget: int) -> list[Layout]:
    """Buy single ranks with what is left, the best for their bytes first."""
    left = budget - sum(w.nbytes(own) for w, own in zip(weights, chosen, strict=True))
    offers: list[tuple[float, int, int]] = []
    for index, (weight, layout) in enumerate(zip(weights, chosen, strict=True)):
        base = replace(layout, rank=0)
        choice = next(own for own in weight.choices if own.layout == base)
        cost = weight.count * layout.rank_bytes(weight.shape)
        for gain in choice.gains[layout.rank : layout.rank + 64].tolist():
            if gain > 0:
                offers.append((gain * weight.importance / cost, index, cost))
    taken = [0] * len(weights)
    closed: set[int] = set()
    for _, index, cost in sorted(offers, key=lambda offer: (-offer[0], offer[1])):
        if index in closed or cost > left:
            closed.add(index)  # its later ranks cost as much
            continue
        left -= cost
        taken[index] += 1
    return [replace(own, rank=own.rank + more) for own, more in zip(chosen, taken, strict=True)]


def _swap(weights: Sequence[Weight], chosen: list[Layout], budget: int) -> list[Layout]:
    """Give one weight after the other the best layout that what is left allows.

    Prices only reach layouts on the convex hull of bytes and errors; with few weights, or little
    left, others are better.
    """
    found = list(chosen)
    left = budget - sum(w.nbytes(own) for w, own in zip(weights, found, strict=True))
    for _ in range(2 * len(weights)):
        moves = []
        for index, weight in enumerate(weights):
            layout = _within(weight, weight.nbytes(found[index]) + left)
            gain = _error([weight], [found[index]]) - _error([weight], [layout])
            moves.append((gain, -index, layout))
        gain, place, layout = max(moves, key=lambda move: move[:2])
        if gain <= 0:
            break
        left += weights[-place].nbytes(found[-place]) - weights[-place].nbytes(layout)
        found[-place] = layout
    return found


def _within(weight: Weight, nbytes: int) -> Layout:
    """Return the layout of least error in these bytes."""
    found = []
    for choice in weight.choices:
        room = nbytes - weight.nbytes(choice.layout)
        cost = weight.count * choice.layout.rank_bytes(weight.shape)
        if room >= 0:
            rank = min(room // cost, int((choice.gains > 0).sum()))
            layout = replace(choice.layout, rank=rank)
            found.append((_error([weight], [layout]), weight.nbytes(layout), layout))
    return min(found, key=lambda one: one[:2])[2]


def _error(weights: Sequence[Weight], chosen: Sequence[Layout]) -> float:
    """Return the sum of errors, each as important as its weight."""
    total = 0.0
    for weight, layout in zip(weights, chosen, strict=True):
        base = replace(layout, rank=0)
        choice = next(own for own in weight.choices if own.layout == base)
        total += weight.importance * (choice.error - float(choice.gains[: layout.rank].sum()))
    return total


def total(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of gains of several matrices that are kept alike, at equal rank."""
    return torch.stack(list(values)).sum(0)

"""What every method of structured pruning has: a goal, and which of the model's units stay.

A method looks for a shape that meets the goal, from headers alone, and shows which it weighed. When
the calibration text has run through the model it says, of each axis, which units are worth most;
those stay. `compensate` then lets least squares make up for the rest (`compress/compensate.py`).

Sparsity is a word for zeros in a shape that stays. Here it is the share of the model's parameters
that goes, so that one option says how much is pruned whatever the method.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import AfterValidator, Field, model_validator

from unicomp import size
from unicomp.compress.axes import Axes, Shape
from unicomp.compress.cuts import Cut
from unicomp.compress.method import Method, Need
from unicomp.errors import UnicompError, UnsupportedError

if TYPE_CHECKING:
    from unicomp.compress.importance import LayerScores

SHARE = 0.25
MOST_SHOWN = 10

# Sets of layers -> the mean loss without each, in nats a token.
Losses = Callable[[Sequence[tuple[int, ...]]], list[float]]


@dataclass(frozen=True, slots=True)
class Goal:
    """What the smaller model has to be; one of them is given.

    params   parameters, at most
    nbytes   bytes of its tensors, at most
    speedup  bytes that a token reads, source over result, at least
    """

    params: int | None = None
    nbytes: int | None = None
    speedup: float | None = None

    def met(self, axes: Axes, sizes: Shape) -> bool:
        """Tell whether a shape meets it."""
        if self.params is not None:
            return axes.params(sizes) <= self.params
        if self.nbytes is not None:
            return axes.nbytes(sizes) <= self.nbytes
        return speedup(axes, sizes) >= (self.speedup or 1.0)

    def __str__(self) -> str:
        if self.params is not None:
            return f"at most {self.params} parameters"
        if self.nbytes is not None:
            return f"at most {self.nbytes} bytes"
        return f"a speed-up of at least {self.speedup:g}"


def speedup(axes: Axes, sizes: Shape) -> float:
    """Return the bytes that a decoded token reads before, over those after.

    Decoding is bound by reading weights, so this is what it may gain; the run measures what it did.
    """
    return axes.read_bytes(axes.sizes) / max(axes.read_bytes(sizes), 1)


def _share(value: float | str | None) -> float | str | None:
    if value is None:
        return None
    try:
        share = float(value)
    except ValueError:
        raise ValueError(
            "should be a share of the parameters such as 0.25; patterns of zeros such as `2:4` are "
            "for `wanda`, `sparsegpt` and `magnitude`"
        ) from None
    if not 0 < share < 1:
        raise ValueError("the share of parameters that goes lies between 0 and 1")
    return value


def _size(value: int | str | None) -> int | str | None:
    if value is not None:
        _bytes(value)
    return value


def _bytes(value: int | str) -> int:
    return size.parse(str(value))


class CutMethod(Method):
    """A method of the verb `prune` that makes a model's shapes smaller."""

    declares: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.NORM})

    sparsity: Annotated[float | str | None, AfterValidator(_share)] = Field(
        None, description="share of zeros, 0 to 1, or `n:m`: n of every m neighbours stay"
    )
    target_params: int | None = Field(
        None, ge=1, description="most parameters that the smaller model has, instead of a share"
    )
    target_bytes: Annotated[int | str | None, AfterValidator(_size)] = Field(
        None, description="most bytes that its tensors take, such as 400MB, instead of a share"
    )
    target_speedup: float | None = Field(
        None,
        gt=1,
        description="least factor by which a decoded token reads fewer bytes, instead of a share",
    )
    compensate: bool = Field(
        True, description="let least squares on the calibration inputs make up for what goes"
    )
    damp: float = Field(
        0.01, gt=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean"
    )

    @model_validator(mode="after")
    def _one_goal(self) -> Self:
        goals = ("sparsity", "target_params", "target_bytes", "target_speedup")
        given = [name for name in goals if getattr(self, name) is not None]
        given += [name for name in self._exact() if getattr(self, name) is not None][:1]
        if len(given) > 1:
            words = " and ".join(f"`{name}`" for name in given)
            raise ValueError(f"{words} are two ways to say how small: give one of them")
        return self

    def _exact(self) -> tuple[str, ...]:
        """Return the options that say the sizes themselves."""
        return ()

    def goal(self, axes: Axes) -> Goal:
        """Return what the smaller model has to be; a quarter smaller where nothing is said."""
        if self.target_params is not None:
            return Goal(params=self.target_params)
        if self.target_bytes is not None:
            return Goal(nbytes=_bytes(self.target_bytes))
        if self.target_speedup is not None:
            return Goal(speedup=self.target_speedup)
        share = SHARE if self.sparsity is None else float(self.sparsity)
        return Goal(params=math.floor((1 - share) * axes.params(axes.sizes)))

    @abstractmethod
    def shapes(self, axes: Axes) -> list[Shape]:
        """Return the shapes that meet the goal, the one to make first.

        Raises UnicompError, before any weight is read, where none does or the model cannot have it.
        """

    def notes(self, axes: Axes, sizes: Shape) -> list[str]:
        """Return what the user must know of a shape."""
        return []

    def sees_attention(self) -> bool:
        """Tell whether the choice asks for the attention paid to the first token."""
        return False

    def second_order(self) -> bool:
        """Tell whether the choice asks for second moments, and not for magnitudes alone."""
        return False

    def searches(self) -> bool:
        """Tell whether layers are chosen by the loss that is measured without them."""
        return False

    @abstractmethod
    def choose(self, axes: Axes, sizes: Shape, seen: Sequence[LayerScores], loss: Losses) -> Cut:
        """Return what stays.

        seen  what the calibration text showed of every layer
        loss  the mean loss on it, in nats a token, of the model without each of some sets of layers
        """


def largest(axes: Axes, goal: Goal, shapes: Sequence[Shape], what: str) -> list[Shape]:
    """Return the shapes that meet the goal, the one with most parameters first.

    what  is cut, for the message
    """
    found = [shape for shape in shapes if goal.met(axes, shape)]
    if not found:
        least = min(shapes, key=axes.params, default=axes.sizes)
        raise UnicompError(
            f"{goal} cannot be had by cutting {what}: the least that is left is "
            f"{axes.params(least)} of {axes.params(axes.sizes)} parameters, "
            f"{axes.nbytes(least)} bytes, a speed-up of {speedup(axes, least):.2f}",
            hint="ask for less, or cut by another method: `width`, `depth`, `heads`, `experts`",
        )
    return sorted(found, key=axes.params, reverse=True)


def refuse(message: str, hint: str) -> UnsupportedError:
    """Return the error for a size that the model cannot have."""
    return UnsupportedError(message, hint=hint)

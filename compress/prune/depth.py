"""Depth: whole layers go, by block influence or by the loss that is measured without them.

Block influence is one minus the cosine between a layer's input and its output: a layer that hardly
turns the hidden states goes first. The search measures instead: layer after layer, the one without
which the loss on the calibration text is least goes; of blocks, the one block. What config.json
says of single layers (`layer_types` and their like) is written anew.

Papers: ShortGPT, arXiv:2403.03853, section 3.1; a block of layers, arXiv:2403.17887, section 3.
Differs: the layer before a gap is refitted so that its output is what the layers in the gap gave.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unicomp.compress.axes import Axes, Shape
from unicomp.compress.cut_method import CutMethod, Losses, largest, refuse
from unicomp.compress.cuts import Cut

if TYPE_CHECKING:
    from unicomp.compress.importance import LayerScores


class Depth(CutMethod):
    """Options of pruning by depth."""

    layers: int | None = Field(None, ge=0, description="layers that stay")
    criterion: Literal["influence", "loss"] = Field(
        "loss",
        description="which layers go: those of least block influence, or those without which the "
        "measured loss is least",
    )
    contiguous: bool = Field(False, description="the layers that go stand side by side")

    def _exact(self) -> tuple[str, ...]:
        return ("layers",)

    def searches(self) -> bool:
        """Tell whether losses are measured."""
        return self.criterion == "loss"

    def shapes(self, axes: Axes) -> list[Shape]:
        """Return the shapes that meet the goal, the deepest first."""
        have, least = axes.sizes.layers, axes.sizes.layers - len(axes.loose)
        if self.layers is not None:
            if self.layers == 0:
                raise refuse("every layer would be removed: none stays", "give `layers: 1` or more")
            if not max(1, least) <= self.layers < have:
                raise refuse(
                    f"`layers` {self.layers}: of the model's {have} layers between "
                    f"{max(1, least)} and {have - 1} can stay",
                    "layers of another kind than most are never left out",
                )
            return [replace(axes.sizes, layers=self.layers)]
        some = [replace(axes.sizes, layers=n) for n in range(max(1, least), have)]
        if not some:
            raise refuse(
                "every layer would be removed: the model has one", "prune it by `width` instead"
            )
        return largest(axes, self.goal(axes), some, "layers, all but one")

    def choose(self, axes: Axes, sizes: Shape, seen: Sequence[LayerScores], loss: Losses) -> Cut:
        """Return the layers that stay."""
        count = axes.sizes.layers - sizes.layers
        if self.contiguous:
            blocks = [
                axes.loose[at : at + count]
                for at in range(len(axes.loose) - count + 1)
                if axes.loose[at + count - 1] - axes.loose[at] == count - 1
            ]
            if not blocks:
                raise refuse(
                    f"no {count} layers of one kind stand side by side", "use `contiguous: false`"
                )
            costs = (
                loss([tuple(block) for block in blocks])
                if self.criterion == "loss"
                else [sum(seen[layer].influence for layer in block) for block in blocks]
            )
            gone = tuple(blocks[costs.index(min(costs))])
        elif self.criterion == "influence":
            order = sorted(axes.loose, key=lambda layer: (seen[layer].influence, layer))
            gone = tuple(order[:count])
        else:
            gone = ()
            while len(gone) < count:
                tries = [tuple(sorted((*gone, one))) for one in axes.loose if one not in gone]
                costs = loss(tries)
                gone = tries[costs.index(min(costs))]
        return Cut(tuple(layer for layer in range(axes.sizes.layers) if layer not in gone))

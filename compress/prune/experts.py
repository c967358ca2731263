"""Experts: those to which the router gives least probability on the user's text go.

Their rows of the router go with them, so that the router chooses among those that stay, with the
probabilities that it would have if the others had none. Models trained so that all tokens of a
document go to one pool of experts bear this well; ordinary mixtures of experts do not.

Paper: none; the evidence for pools is EMO, https://github.com/allenai/EMO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from unicomp.compress.axes import Axes, Shape
from unicomp.compress.cut_method import CutMethod, Losses, largest, refuse
from unicomp.compress.cuts import Cut, LayerCut, best

if TYPE_CHECKING:
    from unicomp.compress.importance import LayerScores

WARNING = (
    "experts of ordinary mixtures of experts share the work of every text: leaving some out costs "
    "much more than their share; only models trained with pools of experts bear it"
)


class Experts(CutMethod):
    """Options of pruning experts."""

    experts: int | None = Field(None, ge=0, description="experts that stay, of each layer")

    def _exact(self) -> tuple[str, ...]:
        return ("experts",)

    def shapes(self, axes: Axes) -> list[Shape]:
        """Return the shapes that meet the goal, that with most experts first."""
        have = axes.sizes.experts
        if not have:
            raise refuse(
                f"`{axes.model.type}` has no experts", "prune it by `width`, `depth` or `heads`"
            )
        if self.experts is not None:
            if self.experts == 0:
                raise refuse("every expert would be removed: none stays", "give `experts: 1`")
            if self.experts >= have:
                raise refuse(
                    f"`experts` {self.experts}: the model has {have}",
                    f"give `experts: {have - 1}` or fewer",
                )
            return [replace(axes.sizes, experts=self.experts)]
        some = [replace(axes.sizes, experts=n) for n in range(1, have)]
        return largest(axes, self.goal(axes), some, "experts, all but one")

    def notes(self, axes: Axes, sizes: Shape) -> list[str]:
        """Warn, and say where fewer experts stay than a token was sent to."""
        found = [WARNING]
        top = int(axes.config.get("num_experts_per_tok") or 0)
        if sizes.experts < top:
            found.append(
                f"a token was sent to {top} experts and now to {sizes.experts}: no more stay"
            )
        return found

    def choose(self, axes: Axes, sizes: Shape, seen: Sequence[LayerScores], loss: Losses) -> Cut:
        """Return the experts of most probability."""
        layers = {
            index: LayerCut(experts=best(scores.experts, sizes.experts))
            for index, scores in enumerate(seen)
            if len(scores.experts)
        }
        return Cut(tuple(range(axes.sizes.layers)), None, layers)

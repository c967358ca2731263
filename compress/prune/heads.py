"""Heads: query heads, or KV heads with all theirs, go; the same number in every layer.

A head is worth the size of what it adds to the hidden states; or, by `sink`, the less the more of
its attention goes to the first token: such heads do little. KV heads must still divide the heads,
so every KV head keeps as many query heads as any other.

Papers: Minitron, arXiv:2407.14679, section 2.2; sink heads, arXiv:2601.06787.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unicomp.compress.axes import FUSED_HEADS, Axes, Shape
from unicomp.compress.cut_method import CutMethod, Losses, largest, refuse
from unicomp.compress.cuts import Cut, LayerCut, best
from unicomp.later import torch

if TYPE_CHECKING:
    from unicomp.compress.importance import LayerScores


class Heads(CutMethod):
    """Options of pruning heads."""

    heads: int | None = Field(None, ge=0, description="query heads that stay, of each layer")
    kv_heads: int | None = Field(
        None, ge=0, description="KV heads that stay; default: all, or as the goal asks"
    )
    criterion: Literal["activation", "second-order", "sink"] = Field(
        "activation",
        description="which heads go: those that add least, those that the others make up for "
        "best, or those that attend to the first token most",
    )

    def _exact(self) -> tuple[str, ...]:
        return ("heads", "kv_heads")

    def sees_attention(self) -> bool:
        """Tell whether attention is looked at."""
        return self.criterion == "sink"

    def second_order(self) -> bool:
        """Tell whether second moments are gathered."""
        return self.criterion == "second-order"

    def shapes(self, axes: Axes) -> list[Shape]:
        """Return the shapes that meet the goal, that with most heads first."""
        sizes = axes.sizes
        if axes.model.type in FUSED_HEADS:
            raise refuse(
                f"`{axes.model.type}` has no `head_dim` of its own: heads cannot go without hidden "
                "channels",
                "prune it by `width`",
            )
        if self.heads is not None or self.kv_heads is not None:
            shape = self._given(sizes)
            axes.check(shape)
            return [shape]
        each = sizes.heads // sizes.kv_heads
        some = {(kv * each, kv) for kv in range(1, sizes.kv_heads)}
        some |= {(sizes.kv_heads * few, sizes.kv_heads) for few in range(1, each)}
        every = [replace(sizes, heads=heads, kv_heads=kv) for heads, kv in some]
        shapes = [shape for shape in every if axes.fits(shape)]
        if not shapes:
            raise refuse("no fewer heads can be had: the model has one", "prune it by `width`")
        return largest(axes, self.goal(axes), shapes, "heads")

    def _given(self, sizes: Shape) -> Shape:
        kv_heads = sizes.kv_heads if self.kv_heads is None else self.kv_heads
        each = sizes.heads // sizes.kv_heads
        heads = each * kv_heads if self.heads is None else self.heads
        if not heads or not kv_heads:
            raise refuse("every head would be removed: none stays", "give `heads: 1` or more")
        if kv_heads > sizes.kv_heads or heads > sizes.heads or heads // kv_heads > each:
            raise refuse(
                f"{heads} heads with {kv_heads} KV heads cannot be had from {sizes.heads} with "
                f"{sizes.kv_heads}",
                f"a KV head has {each} heads at most",
            )
        if heads % kv_heads:
            raise refuse(
                f"{kv_heads} KV heads do not divide {heads} heads",
                f"use `heads: {max(1, heads // kv_heads) * kv_heads}`, or other `kv_heads`",
            )
        if (heads, kv_heads) == (sizes.heads, sizes.kv_heads):
            raise refuse("nothing would be pruned: the model has these heads", "give fewer")
        return replace(sizes, heads=heads, kv_heads=kv_heads)

    def choose(self, axes: Axes, sizes: Shape, seen: Sequence[LayerScores], loss: Losses) -> Cut:
        """Return the heads that stay: KV heads by the sum of theirs, then the best of each."""
        old, layers = axes.sizes, {}
        few, each = sizes.heads // sizes.kv_heads, old.heads // old.kv_heads
        for index, scores in enumerate(seen):
            worth = 1 - scores.sink if self.criterion == "sink" else scores.heads
            groups = worth.reshape(old.kv_heads, each)
            kv_heads = best(groups.sum(1), sizes.kv_heads)
            own = [best(groups[group], few) + group * each for group in kv_heads.tolist()]
            layers[index] = LayerCut(heads=torch.cat(own), kv_heads=kv_heads)
        return Cut(tuple(range(old.layers)), None, layers)

"""Width: FFN channels, hidden channels and KV groups go, those worth least on the calibration text.

The shape is searched from headers: for every hidden width and number of KV heads the widest FFN
that meets the goal, the one first that by a rule of thumb costs least. FFN channels bear most,
hidden channels least: they are the only way from layer to layer. Each layer chooses its own FFN
channels and heads, as many as every other; hidden channels are the same throughout. Widths are
multiples that kernels and groups of quantized weights like.

Paper: Minitron, arXiv:2407.14679, sections 2.2 and 2.3.
Differs: candidates are weighed by what is cut, not each scored; a rank by second moments; what
stays is refitted by least squares (`compress/compensate.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from unicomp.compress.axes import FUSED_HEADS, Axes, Shape
from unicomp.compress.cut_method import CutMethod, Goal, Losses, largest, refuse
from unicomp.compress.cuts import Cut, LayerCut, best
from unicomp.compress.widths import LARGEST_MULTIPLE, STEPS, cost, even, multiple, multiples
from unicomp.later import torch

if TYPE_CHECKING:
    from unicomp.compress.importance import LayerScores

MOST_HIDDEN = 0.4  # share of the hidden channels that may go
MOST_GROUPS = 0.5


class Width(CutMethod):
    """Options of pruning by width."""

    hidden: int | None = Field(None, ge=1, description="hidden channels that stay")
    ffn: int | None = Field(None, ge=1, description="FFN channels that stay, of each layer")
    kv_heads: int | None = Field(None, ge=1, description="KV heads that stay, with their heads")
    multiple: int | None = Field(
        None, ge=1, description="widths are multiples of it; default: 8 to 256, by the width"
    )
    criterion: Literal["activation", "second-order"] = Field(
        "activation",
        description="what a channel is worth: the size of what it adds, or what is lost without "
        "it once the others make up for it",
    )

    def _exact(self) -> tuple[str, ...]:
        return ("hidden", "ffn", "kv_heads")

    def second_order(self) -> bool:
        """Tell whether second moments are gathered."""
        return self.criterion == "second-order"

    def shapes(self, axes: Axes) -> list[Shape]:
        """Return the shapes that meet the goal, the one that should cost least first."""
        if any(getattr(self, name) is not None for name in self._exact()):
            shape = self._given(axes)
            axes.check(shape)
            return [shape]
        goal = self.goal(axes)
        found = list(self._search(axes, goal))
        if not found:
            least = [self._narrowed(axes, *sizes, 1) for sizes in self._frames(axes)]
            return largest(axes, goal, least, "width")
        return sorted(found, key=lambda shape: (cost(axes.sizes, shape), -axes.params(shape)))

    def _search(self, axes: Axes, goal: Goal) -> Iterator[Shape]:
        for hidden, kv_heads in self._frames(axes):
            low, high = 0, STEPS * LARGEST_MULTIPLE * 1024
            high = min(high, multiples(self._ffn(axes.sizes), self.multiple))
            if goal.met(axes, self._narrowed(axes, hidden, kv_heads, high)):
                low = high
            while low + 1 < high:  # the widest FFN that meets the goal
                middle = (low + high) // 2
                if goal.met(axes, self._narrowed(axes, hidden, kv_heads, middle)):
                    low = middle
                else:
                    high = middle
            shape = self._narrowed(axes, hidden, kv_heads, low)
            if low and shape != axes.sizes and axes.fits(shape):
                yield shape

    def _ffn(self, sizes: Shape) -> int:
        return max(sizes.ffn, sizes.expert_ffn)

    def _frames(self, axes: Axes) -> Iterator[tuple[int, int]]:
        """Yield hidden widths and numbers of KV heads."""
        sizes = axes.sizes
        for groups in range(sizes.kv_heads, 0, -1):
            if groups < sizes.kv_heads * (1 - MOST_GROUPS):
                break
            if axes.model.type in FUSED_HEADS:
                yield groups * sizes.head_dim, groups
                continue
            step = multiple(sizes.hidden, self.multiple)
            for hidden in {sizes.hidden, *range(step, sizes.hidden, step)}:
                if hidden >= sizes.hidden * (1 - MOST_HIDDEN):
                    yield hidden, groups

    def _narrowed(self, axes: Axes, hidden: int, kv_heads: int, units: int) -> Shape:
        """Return the shape with the FFN at so many of its multiples."""
        sizes = axes.sizes
        most = multiples(self._ffn(sizes), self.multiple)

        def narrow(width: int) -> int:
            step = multiple(width, self.multiple)
            return width if units >= most else max(step, round(width * units / most / step) * step)

        return replace(
            sizes,
            hidden=hidden,
            heads=sizes.heads // sizes.kv_heads * kv_heads,
            kv_heads=kv_heads,
            ffn=min(sizes.ffn, narrow(sizes.ffn)) if sizes.ffn else 0,
            expert_ffn=min(sizes.expert_ffn, narrow(sizes.expert_ffn)) if sizes.expert_ffn else 0,
        )

    def _given(self, axes: Axes) -> Shape:
        """Return the shape that the options say; UnsupportedError where it cannot be had."""
        sizes = axes.sizes
        for name in self._exact():
            wanted, there = getattr(self, name), getattr(sizes, name)
            if name == "ffn" and not there:
                there = sizes.expert_ffn
            if wanted is not None and wanted > there:
                raise refuse(
                    f"`{name}` {wanted} is more than the model has: {there}",
                    f"give `{name}: {there}` or less",
                )
        kv_heads = self.kv_heads or sizes.kv_heads
        hidden = self.hidden or sizes.hidden
        if axes.model.type in FUSED_HEADS:
            if self.hidden is not None and hidden % sizes.head_dim:
                raise refuse(
                    f"`hidden` {hidden} is not a multiple of the {sizes.head_dim} channels of a "
                    f"head, and `{axes.model.type}` has no `head_dim` of its own",
                    f"use `hidden: {max(1, hidden // sizes.head_dim) * sizes.head_dim}`",
                )
            if self.hidden is None:
                hidden = kv_heads * sizes.head_dim
            elif self.kv_heads is None:
                kv_heads = hidden // sizes.head_dim
            if hidden != kv_heads * sizes.head_dim:
                raise refuse(
                    f"`{axes.model.type}` cannot have {hidden} hidden channels and {kv_heads} "
                    f"heads of {sizes.head_dim}",
                    "give `hidden` or `kv_heads` alone",
                )
        shape = replace(
            sizes,
            hidden=hidden,
            heads=sizes.heads // sizes.kv_heads * kv_heads,
            kv_heads=kv_heads,
        )
        if self.ffn is not None:
            inner = {"ffn": self.ffn} if sizes.ffn else {}
            if sizes.expert_ffn:
                width = self.ffn * sizes.expert_ffn // sizes.ffn if sizes.ffn else self.ffn
                inner["expert_ffn"] = width if not sizes.ffn else even(width)
            shape = replace(shape, **inner)
        if shape == sizes:
            raise refuse("nothing would be pruned: the model has these sizes", "give smaller ones")
        return shape

    def choose(self, axes: Axes, sizes: Shape, seen: Sequence[LayerScores], loss: Losses) -> Cut:
        """Return the channels and heads that are worth most."""
        old, layers = axes.sizes, {}
        for index, scores in enumerate(seen):
            kv_heads = heads = None
            if sizes.kv_heads < old.kv_heads:
                kv_heads = best(scores.heads.reshape(old.kv_heads, -1).sum(1), sizes.kv_heads)
                each = old.heads // old.kv_heads
                heads = (kv_heads[:, None] * each + torch.arange(each)).flatten()
            width = sizes.ffn if len(scores.experts) == 0 else sizes.expert_ffn
            whole = all(width == len(one) for one in scores.ffn)
            ffn = None if whole else tuple(best(one, width) for one in scores.ffn)
            layers[index] = LayerCut(heads=heads, kv_heads=kv_heads, ffn=ffn)
        hidden = None
        if sizes.hidden < old.hidden:
            hidden = best(torch.stack([one.hidden for one in seen]).sum(0), sizes.hidden)
        return Cut(tuple(range(old.layers)), hidden, layers)

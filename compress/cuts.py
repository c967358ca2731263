"""What stays of a model, and the smaller model read as if it were stored: sliced when asked.

A `Cut` is a choice of layers, hidden channels, and of each layer FFN channels, heads and experts.
`CutSource` shows the source with that choice: new names, shapes and config, every tensor read in
its stored dtype, a piece at a time where rows are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from unicomp.compress.axes import ROOT_SCALED, Axes, Axis, Place, Shape, renamed
from unicomp.kernels.dense import DenseSource
from unicomp.later import torch
from unicomp.writer import Meta

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerCut:
    """What stays of one layer: int64 indices in ascending order; None: all.

    ffn  one choice, or one for each expert of the source, those that go included
    """

    heads: Tensor | None = None
    kv_heads: Tensor | None = None
    experts: Tensor | None = None
    ffn: tuple[Tensor, ...] | None = None

    def stays(self, axis: Axis, expert: int | None) -> Tensor | None:
        """Return what stays of an axis, in an expert or outside."""
        if axis is Axis.FFN:
            return None if self.ffn is None else self.ffn[expert or 0]
        found: Tensor | None = getattr(self, axis.value)
        return found


@dataclass(frozen=True, slots=True)
class Cut:
    """What stays of a model.

    kept    its layers, as the source counts them, ascending
    hidden  int64, hidden channels, ascending; None: all
    layers  by the source's number; a layer that is not here is left whole
    """

    kept: tuple[int, ...]
    hidden: Tensor | None = None
    layers: Mapping[int, LayerCut] = field(default_factory=dict)

    def layer(self, index: int) -> LayerCut:
        """Return what stays of one layer, by the source's number."""
        return self.layers.get(index, LayerCut())


def best(scores: Tensor, count: int) -> Tensor:
    """Return the places of the greatest scores, ascending; of equal ones the first stays."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:count].sort().values


class CutSource:
    """A source with a cut, read like any weights.

    config   config.json of the smaller model
    tensors  new name -> dtype and shape, in the order of the source
    """

    def __init__(self, axes: Axes, cut: Cut, sizes: Shape, dense: DenseSource) -> None:
        """Work out names and shapes; nothing is read."""
        self.axes = axes
        self.cut = cut
        self.dense = dense
        self.sizes = sizes
        self.config = axes.rewritten(sizes, cut.kept)
        self.origin: dict[str, Place] = {}
        self.tensors: dict[str, Meta] = {}
        numbers = {old: new for new, old in enumerate(cut.kept)}
        for name in dense.tensors:
            place = axes.places.get(name)
            if place is None or (place.layer is not None and place.layer not in numbers):
                continue
            if place.layer is not None:
                name = renamed(name, place.layer, numbers[place.layer])
                if place.expert is not None:
                    experts = cut.layer(place.layer).experts
                    if experts is not None:
                        at = (experts == place.expert).nonzero()
                        if not at.numel():
                            continue
                        was, now = f".experts.{place.expert}.", f".experts.{int(at)}."
                        name = name.replace(was, now)
            self.origin[name] = place
            self.tensors[name] = Meta(name, place.meta.dtype, place.shape(sizes))

    def rows_of(self, place: Place, dim: int, expert: int | None = None) -> Tensor | None:
        """Return which rows of a source tensor's dimension stay, int64; None: all.

        expert  whose FFN channels they are, in a tensor of all experts
        """
        runs = place.dims[dim]
        expert = place.expert if expert is None else expert
        pieces: list[Tensor] = []
        start, whole = 0, True
        for run in runs:
            if run.axis is Axis.HIDDEN:
                stays = self.cut.hidden
            else:
                layer = -1 if place.layer is None else place.layer
                stays = self.cut.layer(layer).stays(run.axis, expert)
            count = self.axes.sizes.size(run.axis, place.inside)
            whole = whole and stays is None
            units = torch.arange(count) if stays is None else stays
            pieces.append(start + (units[:, None] * run.rows + torch.arange(run.rows)).flatten())
            start += count * run.rows
        return None if whole else torch.cat(pieces)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a tensor of the smaller model, or some of its rows, in its stored dtype."""
        place = self.origin[name]
        if place.stack:
            return self._stack(place, rows)
        first = self.rows_of(place, 0)
        if first is None:
            value = self.dense.read(place.meta.name, rows)
        else:
            wanted = first if rows is None else first[rows]
            low, high = (int(wanted.min()), int(wanted.max()) + 1) if len(wanted) else (0, 0)
            value = self.dense.read(place.meta.name, slice(low, high))
            value = value.index_select(0, wanted - low)
        for dim in range(1, len(place.dims)):
            index = self.rows_of(place, dim)
            value = value if index is None else value.index_select(dim, index)
        return self._scaled(name, place, value)

    def _stack(self, place: Place, rows: slice | None) -> Tensor:
        """Return the experts that stay of a 3-D tensor, each with its own channels."""
        experts = self.rows_of(place, 0)
        chosen = torch.arange(place.meta.shape[0]) if experts is None else experts
        found = []
        for expert in chosen[rows or slice(None)].tolist():
            value = self.dense.read(place.meta.name, slice(expert, expert + 1))
            for dim in (1, 2):
                index = self.rows_of(place, dim, expert)
                value = value if index is None else value.index_select(dim, index)
            found.append(value)
        if found:
            return torch.cat(found)
        return self.dense.read(place.meta.name, slice(0, 0))

    def _scaled(self, name: str, place: Place, value: Tensor) -> Tensor:
        """Take up what follows the hidden size where the model scales its embedding by its root."""
        model = self.axes.model
        if self.cut.hidden is None or model.type not in ROOT_SCALED or place.layer is not None:
            return value
        factor = math.sqrt(self.axes.sizes.hidden / self.sizes.hidden)
        role = model.roles[place.meta.name]
        if role == "embedding":
            return (value.float() * factor).to(value.dtype)
        if role == "norm" and model.tied:  # the head reads the same table
            return ((1 + value.float()) / factor - 1).to(value.dtype)
        return value

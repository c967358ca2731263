"""Which layout each weight of a delta gets: what planes and ranks leave of it, for how many bytes.

What is found of a weight is journalled, so that an interrupted run chooses the same again.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from unicomp.compress.allocate import (
    FEW,
    GRACE,
    WEIGHED,
    Choice,
    Weight,
    allocate,
    gains,
    settled,
    total,
)
from unicomp.compress.decompose import inner
from unicomp.compress.lowrank import spectrum
from unicomp.compress.method import DeltaMethod
from unicomp.kernels.delta import Layout
from unicomp.recipes.delta.plan import DeltaPlan, is_matrix, matrices_of
from unicomp.recipes.delta.work import Work, delta_of, seed_of
from unicomp.recipes.stage.progress import Progress

LAYER = re.compile(r"\.(\d+)\.")


def choose(work: Work) -> dict[str, Layout]:
    """Return the layout of every weight that has a delta."""
    plan, method, options = work.plan, work.plan.method, work.plan.method.layouts()
    names = [name for name, own in work.tensors.items() if own.kind == "delta"]
    if len(options) == 1 and not method.spreads():
        return _alike(work, names, options[0])
    weights, known = {}, work.done("weigh")
    for index, name in enumerate(names, 1):
        work.show(Progress("weigh", index, len(names), name))
        if (entry := known.get(name)) is None:
            entry = _weigh(work, name)
            work.journal.append(entry)
        weights[name] = _weight(work, name, entry)
    taken = sum(own.bytes for own in work.tensors.values() if is_matrix(own))
    if method.spreads():
        found = allocate(list(weights.values()), plan.budget - taken)
        return dict(zip(names, found, strict=True))
    chosen = {}
    for name, weight in weights.items():
        room = int(method.ratio * 2 * weight.count * prod(weight.shape) * (1 + GRACE))
        chosen[name] = allocate([weight], max(room, weight.least()))[0]
    return chosen


def _alike(work: Work, names: list[str], layout: Layout) -> dict[str, Layout]:
    """Give each weight the rank that its own ratio buys, rounded up as far as all bytes allow.

    Rounded down everywhere, small weights would leave a twentieth of the bytes unused. The largest
    fractions are rounded up first.
    """
    method, weights = work.plan.method, {name: matrices_of(work.tensors[name]) for name in names}
    found = {
        name: replace(layout, rank=method.rank(shape, layout))
        for name, (_, shape) in weights.items()
    }
    left = work.plan.budget
    left -= sum(own.bytes for own in work.tensors.values() if is_matrix(own))
    left -= sum(count * found[name].nbytes(shape) for name, (count, shape) in weights.items())
    more = {
        name: method.bought(shape, layout) - found[name].rank
        for name, (_, shape) in weights.items()
    }
    for name in sorted(names, key=lambda name: -more[name]):
        count, shape = weights[name]
        cost = count * layout.rank_bytes(shape)
        if more[name] > 1e-9 and cost <= left:
            found[name] = replace(layout, rank=found[name].rank + 1)
            left -= cost
    return found


def _weigh(work: Work, name: str) -> dict[str, Any]:
    """Find what planes leave of a weight's delta, and what each rank would take off that.

    returns  plain JSON: `errors`, one for each of `_tried`, and number of planes -> `squares`, of
             singular values of what they leave, over all matrices of the weight
    """
    method, own = work.plan.method, work.tensors[name]
    count, shape = matrices_of(own)
    room, tried = 2 * method.ratio * prod(shape), _tried(method, shape)
    errors = dict.fromkeys(tried, 0.0)
    squares: dict[int, list[Tensor]] = {}
    for index in range(count):
        delta = delta_of(work.plan, own, name, index)
        others: list[Choice] = []
        for key, layout in reversed(tried.items()):  # most planes first
            rest = delta
            if layout.planes:
                rest = method.solve(delta, layout, 0).decode().neg_().add_(delta)
            error = inner(rest, rest)
            errors[key] += error
            found = squares.setdefault(layout.planes, [])
            if len(found) > index:
                continue  # a scale per row or per tensor leaves much the same singular values
            most = int(WEIGHED * max(room - layout.nbytes(shape), 0) / layout.rank_bytes(shape))
            most = min(most + 1, *shape)
            few = len(found[0]) if found else min(FEW, most)
            ranks = spectrum(rest, few, seed=seed_of(method, name))
            if not found and not settled(shape, Choice(layout, error, ranks), most, others):
                ranks = spectrum(rest, most, seed=seed_of(method, name))
            found.append(ranks)
            others.append(Choice(layout, error, ranks))
    sums = {str(planes): total(parts).tolist() for planes, parts in squares.items()}
    return {"weigh": name, "errors": list(errors.values()), "squares": sums}


def _tried(method: DeltaMethod, shape: tuple[int, int]) -> dict[tuple[int, bool], Layout]:
    """Return (planes, scale by row) -> a layout, of those that may pay at this ratio."""
    room = 2 * method.ratio * prod(shape)
    keys = {(layout.planes, layout.by_row): layout for layout in reversed(method.layouts())}
    return {
        key: layout
        for key, layout in sorted(keys.items())
        if not layout.planes or layout.nbytes(shape) <= WEIGHED * room
    }


def _weight(work: Work, name: str, entry: Mapping[str, Any]) -> Weight:
    """Return a weight with its choices, of what `_weigh` found."""
    method = work.plan.method
    count, shape = matrices_of(work.tensors[name])
    errors = dict(zip(_tried(method, shape), entry["errors"], strict=True))
    sums = {
        int(planes): torch.tensor(values, dtype=torch.float64).sqrt()
        for planes, values in entry["squares"].items()
    }
    choices = [
        Choice(layout, errors[key], gains(sums[layout.planes], int8=layout.int8))
        for layout in method.layouts()
        if (key := (layout.planes, layout.by_row)) in errors
    ]
    return Weight(shape, choices, count, method.importance(_depth(work.plan, name)))


def _depth(plan: DeltaPlan, name: str) -> float:
    """Return 0 for the first layer and embeddings, 1 for the last and the head."""
    numbers = [int(found[1]) for key in plan.tensors if (found := LAYER.search(key))]
    own = LAYER.search(name)
    if own is None:
        return 1.0 if "head" in name else 0.0
    return int(own[1]) / max(max(numbers), 1)

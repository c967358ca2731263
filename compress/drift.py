"""The target that makes up for what earlier layers did to a layer's input.

The input of a layer has drifted from that of the uncompressed model. The weights that answer it
best for the original outputs are `w + w cross / H`; a share of that step is taken, since the cross
statistic is one of the calibration text and not of the world.

Papers: GPTAQ, arXiv:2504.02692; Qronos, arXiv:2505.11695.
Differs: GPTAQ adds its correction column by column through the inverse's factor, a quarter of it;
here the least-squares target is set once, and what follows treats it like any other weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from unicomp.compress.babai import ordered, restored
from unicomp.compress.linalg import Factor
from unicomp.compress.method import Stats

if TYPE_CHECKING:
    from torch import Tensor


def moved(
    weight: Tensor, stats: Stats, factor: Factor, share: float, *, many: bool | None = None
) -> Tensor:
    """Return the weight, moved by a share of what would make up for all of the drift.

    weight  floating [out, in]; not modified, and returned itself where there is nothing to do
    stats   its cross statistic; its memo keeps `cross / H` for the next weight with this factor
    share   0 to 1
    many    that is worked out rather than the weight's own product with it: default where there
            are as many rows as columns
    """
    if not share or stats.cross is None:
        return weight
    if many is None:
        many = weight.shape[0] >= weight.shape[1]
    order = factor.order
    if not many:
        return (
            weight + share * restored(factor.solve(ordered(weight @ stats.cross, order)), order).T
        )
    key = ("drift", factor)
    if key not in stats.memo:
        stats.memo[key] = restored(factor.solve(ordered(stats.cross, order)), order).T
    return weight + share * (weight @ cast("Tensor", stats.memo[key]))

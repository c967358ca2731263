"""GPTQ as nearest plane: each column's rounding error is made up for by the columns after it.

Papers: GPTQ, arXiv:2210.17323; as Babai's nearest plane, arXiv:2507.18553.
"""

from typing import ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from unicomp.compress import grid
from unicomp.compress.babai import Rounding, nearest_plane
from unicomp.compress.grid import Grid
from unicomp.compress.linalg import Factor, Order, factorise
from unicomp.compress.method import Need, QuantizeMethod, Solution, Stats
from unicomp.errors import CheckpointError
from unicomp.kernels.packed import Scheme


class Gptq(QuantizeMethod):
    """Options of GPTQ."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.HESSIAN})

    order: Order = Field("act", description="order in which columns are rounded")
    damp: float = Field(
        0.01, ge=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean"
    )
    block_size: int = Field(128, ge=8, le=4096, description="columns per block; changes speed only")

    def solve(
        self, weight: Tensor, stats: Stats, scheme: Scheme, *, scale_dtype: object
    ) -> Solution:
        """Round column by column."""
        dtype = cast(torch.dtype, scale_dtype)
        if stats.hessian is None:
            raise CheckpointError("`gptq` needs a Hessian", hint="give calibration text")
        factor = factorise(stats.hessian, order=self.order, damp=self.damp)
        found = grid.search(weight, scheme, self.scale_search, dtype=dtype)
        columns = weight.T[factor.order].contiguous()
        choice = Rounding(found, scheme, factor.order)
        damped = nearest_plane(columns, factor, choice, block_size=self.block_size)
        error = (damped - factor.shift * columns.square().sum(0)).clamp_min_(0)
        packed = choice.packed(dtype)
        plain = grid.search(weight, scheme, "minmax", dtype=dtype)
        rounding, _ = grid.round_to(weight, plain, scheme, dtype=dtype)
        return Solution(
            packed=packed,
            error=error,
            rounding=grid.output_error(weight - rounding.dequantize(weight.dtype), stats.hessian),
            reference=grid.output_error(weight, stats.hessian),
            predicted=_predicted(found, scheme, factor),
            clipped=choice.clipped,
            damp=factor.damp,
        )


def _predicted(found: Grid, scheme: Scheme, factor: Factor) -> Tensor:
    group = grid.group_of(factor.order.shape[0], scheme, factor.order.device)[factor.order]
    share = factor.pivots.new_zeros(found.scale.shape[1]).index_add_(0, group, factor.pivots)
    return found.scale.square() @ share / 12

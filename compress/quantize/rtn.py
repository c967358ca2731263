"""Round-to-nearest: each weight becomes the nearest point of its group's grid.

Needs no calibration and is what every other method has to beat. With a Hessian at hand its errors
are those of the layer's output; without one, those of the weights themselves (the Hessian of
independent inputs of unit size).

Paper: arXiv:2106.08295 surveys it, with the grids.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from unicomp.compress import grid
from unicomp.compress.method import Pruning, QuantizeMethod, Solution, Stats
from unicomp.compress.sparsity import keep
from unicomp.kernels.packed import Scheme
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class Rtn(QuantizeMethod):
    """Options of round-to-nearest."""

    def solve(
        self,
        weight: Tensor,
        stats: Stats,
        scheme: Scheme,
        *,
        scale_dtype: object,
        pruning: Pruning | None = None,
    ) -> Solution:
        """Round every weight to its grid.

        weight   floating [out, in]; not modified
        stats    may be empty; a Hessian float [in, in] only changes what errors are measured by
        pruning  how much becomes zero first: the least magnitudes, whatever method is named
        """
        dtype = cast(torch.dtype, scale_dtype)
        weight = weight.to(torch.float32 if stats.hessian is None else stats.hessian.dtype)
        rest = weight
        if pruning is not None:
            rest = torch.where(keep(weight.abs(), pruning.target), weight, 0.0)
        plain = grid.search(rest, scheme, "minmax", dtype=dtype)
        nearest, clipped = grid.round_to(rest, plain, scheme, dtype=dtype)
        rounding = error = _error(weight, nearest.dequantize(weight.dtype), stats)
        if self.scale_search != "minmax":
            found = grid.search(rest, scheme, self.scale_search, dtype=dtype)
            nearest, clipped = grid.round_to(rest, found, scheme, dtype=dtype)
            error = _error(weight, nearest.dequantize(weight.dtype), stats)
        return Solution(
            packed=nearest,
            error=error,
            rounding=rounding,
            reference=grid.output_error(weight, stats.hessian),
            predicted=None,
            clipped=clipped,
            damp=None,
        )


def _error(weight: Tensor, nearest: Tensor, stats: Stats) -> Tensor:
    return grid.output_error(weight - nearest, stats.hessian)

"""Round-to-nearest: each weight becomes the nearest point of its group's grid.

Needs no calibration. With a Hessian at hand, errors are those of the layer's output; without one,
those of the weights (the Hessian of independent inputs of unit size).
"""

from typing import cast

import torch
from torch import Tensor

from unicomp.compress import grid
from unicomp.compress.method import QuantizeMethod, Solution, Stats
from unicomp.kernels.packed import Scheme


class Rtn(QuantizeMethod):
    """Options of round-to-nearest."""

    def solve(
        self, weight: Tensor, stats: Stats, scheme: Scheme, *, scale_dtype: object
    ) -> Solution:
        """Round every weight to its grid."""
        dtype = cast(torch.dtype, scale_dtype)
        found = grid.search(weight, scheme, self.scale_search, dtype=dtype)
        packed, clipped = grid.round_to(weight, found, scheme, dtype=dtype)
        error = grid.output_error(weight - packed.dequantize(weight.dtype), stats.hessian)
        plain = grid.search(weight, scheme, "minmax", dtype=dtype)
        rounding, _ = grid.round_to(weight, plain, scheme, dtype=dtype)
        return Solution(
            packed=packed,
            error=error,
            rounding=grid.output_error(weight - rounding.dequantize(weight.dtype), stats.hessian),
            reference=grid.output_error(weight, stats.hessian),
            predicted=None,
            clipped=clipped,
            damp=None,
        )

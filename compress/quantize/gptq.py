"""GPTQ as nearest plane: each column's rounding error is made up for by the columns after it.

One Cholesky factor of the damped Hessian serves all rows and all weights that read one input. Two
things may follow or precede the walk over the columns: `drift` moves the target (`drift.py`), and
`sweeps` goes over the codes and scales again by coordinate descent.

Papers: GPTQ, arXiv:2210.17323; as Babai's nearest plane, arXiv:2507.18553.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from unicomp import machine
from unicomp.compress import grid
from unicomp.compress.babai import Choice, Rounding, nearest_plane, ordered, restored
from unicomp.compress.descent import descend
from unicomp.compress.drift import moved
from unicomp.compress.grid import Grid
from unicomp.compress.linalg import Factor, Order, factorise, undamped
from unicomp.compress.masked import Given, Mask, Masked, whole
from unicomp.compress.method import Need, Pruning, QuantizeMethod, Solution, Stats
from unicomp.errors import CheckpointError
from unicomp.kernels.packed import Scheme
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 23  # weights at a time: rows are independent, so scratch need not grow with them
PRUNED = 0.05  # share of zeros from where a weight counts as pruned
WIDE = 512  # columns from where bfloat16 products are faster


class Gptq(QuantizeMethod):
    """Options of GPTQ."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.HESSIAN, Need.CROSS})

    order: Order = Field("act", description="order in which columns are rounded")
    damp: float = Field(
        0.01, ge=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean"
    )
    block_size: int = Field(128, ge=8, le=4096, description="columns a block; changes speed only")
    drift: float = Field(
        0.75,
        ge=0,
        le=1,
        description="share of the input's drift from the uncompressed model's that is made up for; "
        "0 needs no second stream of activations",
    )
    sweeps: int = Field(
        1, ge=0, le=100, description="sweeps of coordinate descent over codes and scales afterwards"
    )
    keep_zeros: bool = Field(
        True, description="zeros of a pruned model stay zero: of a weight that has 5% of them"
    )

    def wants(self) -> frozenset[Need]:
        """Return the statistics that these options ask for."""
        return self.needs if self.drift else frozenset({Need.HESSIAN})

    def workspace_bytes(self, rows: int, columns: int) -> int:
        """Return the most bytes that `solve` takes for a float32 weight [rows, columns].

        Rows go by chunks: weight, target and what rounding leaves of each, in the walk's order and
        in the columns' own, and in bfloat16 for the report. Of the Hessian there are a damped, a
        permuted and a factorised copy, and one to invert with. The result is codes and a weight.
        """
        chunk = min(rows * columns, max(CHUNK, columns))
        return 4 * (8 * chunk + 4 * columns * columns) + 5 * rows * columns

    def solve_work(self, rows: int, columns: int) -> dict[str, float]:
        """Return what `solve` has to do: the factor, the drift, grid and walk, sweeps, the report.

        Elementwise work is counted in passes over the weight: 40, and 12 a sweep.
        """
        square = float(rows) * columns**2
        walks = 1 + 2 * self.sweeps
        found = {"factor": columns**3 / 3, "thin": walks * square}
        found["half" if _report(columns) else "product"] = 2 * square
        found["grid"] = float(rows * columns) if self.scale_search == "mse" else 0.0
        found["rounding"] = float(rows * columns) * (1 + self.sweeps)
        found["memory"] = (40 + 12 * self.sweeps) * 4.0 * rows * columns
        if self.drift:
            found["factor"] += 2.0 * columns**2 * min(rows, columns)
            found["product"] = found.get("product", 0.0) + 2 * square
        return found

    def solve(
        self,
        weight: Tensor,
        stats: Stats,
        scheme: Scheme,
        *,
        scale_dtype: object,
        pruning: Pruning | None = None,
    ) -> Solution:
        """Quantize a weight, or several that read the same input stacked by rows.

        weight  floating [out, in]; not modified
        stats   the Hessian, and with `drift` the cross statistic; its memo keeps the factor
        pruning  what is to become zero in the same walk; columns then keep their own order, since
                 `n:m` goes by neighbours, and a share of a block by blocks of busy and idle
                 columns alike. The error of rounding does not count zeros

        Raises CheckpointError where the Hessian cannot be factorised; the hint names the options.
        """
        if stats.hessian is None:
            raise CheckpointError(
                "there is no statistic of this layer's input", hint="give calibration text"
            )
        order = self.order if pruning is None else "none"
        key = ("factor", order, self.damp)
        if key not in stats.memo:
            stats.memo[key] = factorise(stats.hessian, order=order, damp=self.damp)
        factor = cast(Factor, stats.memo[key])
        dtype = cast(torch.dtype, scale_dtype)
        parts = []
        for part in torch.split(weight, max(1, CHUNK // weight.shape[1])):
            part = part.to(stats.hessian.dtype)
            many = weight.shape[0] >= weight.shape[1]
            target = moved(part, stats, factor, self.drift, many=many)
            mask = None
            if pruning is not None:
                mask = pruning.method.mask(part, stats, pruning.target, factor)
            elif self.keep_zeros and float((part == 0).float().mean()) >= PRUNED:
                mask = Given(ordered(part != 0, factor.order))
            parts.append(self._rows(part, target, stats.hessian, factor, scheme, dtype, mask))
        return Solution.joined(parts)

    def _grid(self, target: Tensor, scheme: Scheme, dtype: torch.dtype, cost: Tensor) -> Grid:
        return grid.search(target, scheme, self.scale_search, dtype=dtype, importance=cost)

    def _rows(
        self,
        weight: Tensor,
        target: Tensor,
        hessian: Tensor,
        factor: Factor,
        scheme: Scheme,
        dtype: torch.dtype,
        mask: Mask | None,
    ) -> Solution:
        order = factor.order
        report = _report(len(hessian)) if hessian.dtype == torch.float32 else None
        columns = ordered(target, order)
        own = columns if target is weight else ordered(weight, order)
        plain = Rounding(grid.search(target, scheme, "minmax", dtype=dtype), scheme, order)
        reference, rounding = factor.energies(own, plain.errors(columns), dtype=report)
        cost = restored(factor.pivots, order)
        likely = target
        if mask is not None:  # the grid is for what is likely to stay
            every = torch.cat(
                [mask.kept(at, some, some) for at, some in _blocks(columns, self.block_size, mask)]
            )
            likely = target.masked_fill(~restored(every, order).T, 0.0)
        found = self._grid(likely, scheme, dtype, cost)
        rounder, kept, size = Rounding(found, scheme, order), None, self.block_size
        choice: Choice = rounder
        if mask is not None:
            size = whole(size, mask.width)
            choice = masked = Masked(mask, columns, size, rounder)
            kept = masked.kept
        damped = nearest_plane(columns, factor, choice, block_size=size)
        clipped, codes = rounder.clipped, rounder.codes()
        kept = None if kept is None else restored(kept, order)
        errors, added = restored(columns, order), restored(factor.added, order)
        for _ in range(self.sweeps):
            gain, clipped = descend(errors, codes, hessian, added, dtype=dtype, kept=kept)
            damped -= gain
        groups = torch.stack([cost[columns].sum() for columns in codes.groups])
        return Solution(
            packed=codes.packed(scheme, dtype),
            error=undamped(damped, errors, added),
            rounding=rounding,
            reference=reference,
            predicted=(found.scale.square() * groups).sum(1) / 12,
            clipped=clipped,
            damp=factor.damp,
        )


def _report(columns: int) -> torch.dtype | None:
    """Return what the report multiplies in: bfloat16 changes its fourth digit, in half the time."""
    return torch.bfloat16 if columns >= WIDE and machine.multiplies_bfloat16() else None


def _blocks(columns: Tensor, size: int, mask: Mask) -> Iterator[tuple[int, Tensor]]:
    """Yield (position, columns) of what a mask decides together."""
    step = mask.width or size
    for at in range(0, len(columns), step):
        yield at, columns[at : at + step]

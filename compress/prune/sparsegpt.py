"""SparseGPT: zeros chosen block by block, and made up for by the weights after them.

The same walk over the columns as GPTQ: what a column's error moves, and what an error costs once
later columns have made up for it, are the factor's; a weight's choice is to become zero or to take
its target as it is. Of a share the zeros of a block of columns are chosen when the walk reaches it,
over all rows together; of `n:m` those of each m columns. `drift` moves the target first, as in GPTQ
(`drift.py`).

Paper: SparseGPT, arXiv:2301.00774, algorithm 1; the walk as nearest plane, arXiv:2507.18553.
Differs: with `drift: 0` these are its masks and weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

from pydantic import Field

from unicomp.compress.babai import nearest_plane, ordered
from unicomp.compress.drift import moved
from unicomp.compress.linalg import Factor, factorise, undamped
from unicomp.compress.masked import Cheapest, Mask, Masked, whole
from unicomp.compress.method import Allocation, Need, Pruned, PruneMethod, Stats
from unicomp.compress.sparsity import Target, keep
from unicomp.errors import CheckpointError
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class Sparsegpt(PruneMethod):
    """Options of SparseGPT."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.HESSIAN, Need.CROSS})

    damp: float = Field(
        0.01, ge=0, le=1, description="added to the Hessian's diagonal, as a fraction of its mean"
    )
    block_size: int = Field(
        128, ge=8, le=4096, description="columns whose zeros are chosen together"
    )
    drift: float = Field(
        0.75,
        ge=0,
        le=1,
        description="share of the input's drift from the uncompressed model's that is made up for; "
        "0 needs no second stream of activations",
    )
    allocation: Allocation = Field(
        "uniform",
        description="every linear has the share of zeros, or more where zeros are measured to cost "
        "less, at the same number in all",
    )
    exclude_sink: bool = Field(
        False, description="leave each window's first token, where activations are massive, out"
    )

    def wants(self) -> frozenset[Need]:
        """Return the statistics that these options ask for."""
        return self.needs if self.drift else frozenset({Need.HESSIAN})

    def workspace_bytes(self, rows: int, columns: int) -> int:
        """Return the most bytes that `solve` takes for a float32 weight [rows, columns]."""
        return 4 * (10 * rows * columns + 5 * columns * columns)

    def solve_work(self, rows: int, columns: int) -> dict[str, float]:
        """Return what `solve` has to do: the factor, the drift, the walk, and two orders of all.

        Within a block each column reads those before it.
        """
        square = float(rows) * columns**2
        found = {"factor": columns**3 / 3, "thin": 3 * square}
        found["sort"] = found["line"] = float(rows * columns)
        found["memory"] = (40 + self.block_size / 2) * 4.0 * rows * columns
        if self.drift:
            found["factor"] += 2.0 * columns**2 * min(rows, columns)
            found["product"] = 2 * square
        return found

    def solve(self, weight: Tensor, stats: Stats, target: Target) -> Pruned:
        """Choose zeros and make up for them; float [out, in].

        Raises CheckpointError where the Hessian cannot be factorised.
        """
        if stats.hessian is None:
            raise CheckpointError(
                "there is no statistic of this layer's input", hint="give calibration text"
            )
        key = ("factor", "none", self.damp)
        if key not in stats.memo:
            stats.memo[key] = factorise(stats.hessian, damp=self.damp)
        factor = cast(Factor, stats.memo[key])
        weight = weight.to(stats.hessian.dtype)
        aim = moved(weight, stats, factor, self.drift)
        columns = ordered(aim, factor.order)
        plain = columns.masked_fill(keep(aim.abs(), target).T, 0.0)
        reference, plain = factor.energies(columns, plain)
        mask = self.mask(aim, stats, target, factor)
        size = whole(self.block_size, mask.width)
        choice = Masked(mask, columns, size)
        damped = nearest_plane(columns, factor, choice, block_size=size)
        return Pruned(
            torch.where(choice.kept.T, aim - columns.T, 0.0),
            error=undamped(damped, columns, factor.added),
            magnitude=plain,
            reference=reference,
            damp=factor.damp,
        )

    def mask(self, weight: Tensor, stats: Stats, target: Target, factor: Factor) -> Mask:
        """Choose zeros as the walk goes on."""
        return Cheapest(factor.pivots, target)

"""The factor of a damped Hessian that nearest plane walks along, and the orders to walk it in.

With `p` the order in which columns are rounded, `H[p][:, p] = C diag(D) Cᵀ`, C unit upper
triangular: row i of C says how the error of the i-th rounded column moves the targets of all later
ones, and `D[i]` what that column's own rounding costs once the later ones have made up for it. It
is the Cholesky factor of the reversed matrix, read backwards; no inverse is ever formed.

Paper: GPTQ as Babai's nearest plane, arXiv:2507.18553, theorems 4 and 5.
Differs: a dead column (zero diagonal) keeps its weights and is simply rounded to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unicomp.errors import CheckpointError
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

Order = Literal["none", "act", "min-pivot"]

DAMP_GROWTH = 4.0
DAMP_FLOOR = 1e-4
DAMP_LIMIT = 1.0
PANEL = 128


@dataclass(frozen=True, slots=True)
class Factor:
    """`hessian[order][:, order] + diag(added) = unit · diag(pivots) · unitᵀ`.

    order   int64 [in], columns of the weight in the order of rounding
    unit    [in, in], unit upper triangular; rows and columns stand in that order
    pivots  [in], positive, in that order
    damp    the fraction of the mean diagonal that was added in the end
    added   [in], the same in absolute terms, in that order
    """

    order: Tensor
    unit: Tensor
    pivots: Tensor
    damp: float
    added: Tensor

    def energies(self, *parts: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Return what the rows of each part are under the Hessian without its damping, [rows].

        parts  [in, rows] each, in the factor's order; not modified
        dtype  what products are computed in; None: as they are
        """
        columns = torch.cat([part.to(dtype or part.dtype) for part in parts], 1)
        total = parts[0].new_zeros(columns.shape[1])
        for start in range(0, len(columns), PANEL):
            stop = min(start + PANEL, len(columns))
            panel = self.unit[:stop, start:stop] * self.pivots[start:stop].sqrt()
            product = (panel.to(columns.dtype).T @ columns[:stop]).to(total.dtype)
            total += product.square_().sum(0)
        found = total.split([part.shape[1] for part in parts])
        return [
            undamped(energy, part, self.added) for energy, part in zip(found, parts, strict=True)
        ]

    def solve(self, columns: Tensor) -> Tensor:
        """Return the damped Hessian's inverse times columns [in, rows], in the factor's order."""
        half: Tensor = torch.linalg.solve_triangular(
            self.unit, columns, upper=True, unitriangular=True
        )
        half /= self.pivots[:, None]
        whole: Tensor = torch.linalg.solve_triangular(
            self.unit.T, half, upper=False, unitriangular=True
        )
        return whole


def undamped(energy: Tensor, columns: Tensor, added: Tensor) -> Tensor:
    """Take the damping's share off the energy [rows] of columns [in, rows]."""
    # No product of vector and matrix: BLAS gives other last bits for another alignment in memory.
    return torch.clamp_min(energy - columns.square().mul_(added[:, None]).sum(0), 0)


def factorise(hessian: Tensor, *, order: Order = "none", damp: float = 0.01) -> Factor:
    """Damp, permute and factorise; where that fails, damp more and try again.

    hessian  float32 or float64 [in, in], symmetric, mean of x·xᵀ; not modified
    damp     added to the diagonal, as a fraction of its mean (of the columns that are not dead)

    Raises CheckpointError if the Hessian is not finite, or if damping of the whole mean diagonal
    does not make it positive definite; the message says how the damping grew.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CheckpointError(
            "the statistics of this layer's input are not finite",
            hint="a NaN or Inf activation reached it: check the weights before it, "
            "or calibrate on other text",
        )
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].double().mean()) if bool(live.any()) else 1.0
    tried: list[float] = []
    while True:
        tried.append(damp)
        added = torch.full_like(diagonal, damp * mean)
        if damp == 0:
            added[~live] = mean  # a dead column has no pivot of its own
        found = _factorise(hessian, added, order)
        if found is not None:
            columns, unit, pivots = found
            return Factor(columns, unit, pivots, damp, added[columns])
        if damp >= DAMP_LIMIT:
            raise CheckpointError(
                "the damped Hessian is not positive definite, with `damp` at "
                + ", ".join(f"{value:g}" for value in tried),
                hint="give more calibration `samples`, or a larger `damp`",
            )
        damp = min(max(damp * DAMP_GROWTH, DAMP_FLOOR), DAMP_LIMIT)


def _factorise(
    hessian: Tensor, added: Tensor, order: Order
) -> tuple[Tensor, Tensor, Tensor] | None:
    if order == "min-pivot":
        columns = min_pivot_order(hessian + torch.diag(added))
    elif order == "act":
        columns = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    else:
        columns = torch.arange(hessian.shape[0], device=hessian.device)
    back = columns.flip(0)
    work = hessian.index_select(0, back).index_select(1, back)
    work.diagonal().add_(added[back])
    lower, info = torch.linalg.cholesky_ex(work)
    del work
    root = lower.diagonal().flip(0)
    if int(info) != 0 or not bool((root > 0).all()) or not bool(torch.isfinite(root).all()):
        return None
    unit = lower.flip((0, 1))
    del lower
    unit /= root
    return columns, unit, root.square()


def min_pivot_order(hessian: Tensor) -> Tensor:
    """Return the order that always rounds last the column whose remaining pivot is least.

    hessian  [in, in], positive definite; not modified
    returns  int64 [in]; its first entry is to be rounded first

    A Cholesky factorisation with the least pivot chosen at each step, in panels so that all but a
    panel's share of the work is matrix products: O(in³) in all.
    Paper: arXiv:2507.18553.
    """
    size = hessian.shape[0]
    rest = hessian.clone()
    taken = torch.empty(size, dtype=torch.int64, device=hessian.device)
    names = torch.arange(size, device=hessian.device)
    for start in range(0, size, PANEL):
        width = min(PANEL, size - start)
        left = rest.shape[0]
        pivots = rest.diagonal().clone()
        panel = rest.new_zeros(width, left)
        picked: list[int] = []
        for k in range(width):
            best = int(pivots.argmin())
            picked.append(best)
            row = rest[best] - panel[:k, best] @ panel[:k]
            row *= pivots[best].clamp_min(torch.finfo(rest.dtype).tiny).rsqrt()
            panel[k] = row
            pivots -= row * row
            pivots[picked] = torch.inf
        chosen = torch.tensor(picked, device=hessian.device)
        taken[start : start + width] = names[chosen]
        keep = torch.ones(left, dtype=torch.bool, device=hessian.device)
        keep[chosen] = False
        names = names[keep]
        tail = panel[:, keep]
        rest = rest[keep][:, keep].addmm_(tail.T, tail, alpha=-1)
    return taken.flip(0)

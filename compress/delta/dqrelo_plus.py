"""D-QRELO with every byte spent where it takes away most error, over the whole model.

Beside the paper's, each a flag: factors of int8 with a scale per rank, so that the rank doubles; a
scale per row where rows differ enough to pay for it; planes and factors fitted in turn; a second
and further planes of signs where they pay more than ranks, or none at all where the delta is of
low rank, as merged adapters are; and the ranks of all weights bought out of one budget. A plane
more divides the squared error of noise by three, which many ranks cannot, so at 1/8 most weights of
a full fine-tune get two planes and few ranks.

Papers: D-QRELO, arXiv:2604.16940; several planes, arXiv:1802.00150.
Differs: `early` shifts ranks to early layers, as the paper's figures suggest, and is off: on the
pairs of `benchmarks/delta_recovery.py` it gained nothing over the singular values' own word.
"""

from typing import Literal

from pydantic import Field

from unicomp.compress.decompose import First, How
from unicomp.compress.method import DeltaMethod
from unicomp.kernels.delta import Layout


class DqreloPlus(DeltaMethod):
    """Options of D-QRELO with its improvements."""

    planes: int = Field(4, ge=1, le=4, description="most sign planes that a weight may have")
    scale: Literal["either", "row", "tensor"] = Field(
        "either", description="a scale per output row, or per tensor, or whichever pays"
    )
    factors: Literal["int8", "float16"] = Field("int8", description="what factors are stored in")
    rounds: int = Field(
        4, ge=1, le=50, description="times that planes and factors are fitted in turn"
    )
    first: First = Field("one-bit", description="which part is fitted first")
    allocation: Literal["model", "tensor"] = Field(
        "model", description="one budget for all weights, or the ratio for each by itself"
    )
    early: float = Field(
        0.0,
        ge=0,
        le=1,
        description="how much more errors count in early layers: 1 + early at the first, "
        "1 - early at the last",
    )

    def layouts(self) -> tuple[Layout, ...]:
        """Return every number of planes with every scale, and none; float16 where int8 loses."""
        rows = {"either": (False, True), "row": (True,), "tensor": (False,)}[self.scale]
        kinds = (True, False) if self.factors == "int8" else (False,)
        found = [Layout(0, False, 0, int8) for int8 in kinds]
        for count in range(1, self.planes + 1):
            found += [Layout(count, by_row, 0, int8) for by_row in rows for int8 in kinds]
        return tuple(found)

    def spreads(self) -> bool:
        """Say whether there is one budget for all."""
        return self.allocation == "model"

    def importance(self, depth: float) -> float:
        """Return more for early layers, if asked."""
        return 1 + self.early * (1 - 2 * depth)

    def how(self, seed: int) -> How:
        """Return the order and the rounds."""
        return How(first=self.first, rounds=self.rounds, seed=seed)

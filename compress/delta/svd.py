"""Low rank alone: the leading singular vectors of what the fine-tune added.

The baseline of all delta compression. It is exact where the delta is of that rank, as merged
adapters are, and poor where a fine-tune moved every weight.

Paper: as a baseline, D-QRELO, arXiv:2604.16940, table 1; the randomized decomposition is that of
`compress/lowrank.py`.
"""

from typing import Literal

from pydantic import Field

from unicomp.compress.method import DeltaMethod
from unicomp.kernels.delta import Layout


class Svd(DeltaMethod):
    """Options of low rank alone."""

    factors: Literal["int8", "float16"] = Field("float16", description="what factors are stored in")
    allocation: Literal["model", "tensor"] = Field(
        "tensor", description="the ratio for each weight by itself, or one budget for all"
    )

    def layouts(self) -> tuple[Layout, ...]:
        """Return factors and no planes."""
        return (Layout(0, False, 0, self.factors == "int8"),)

    def spreads(self) -> bool:
        """Say whether there is one budget for all."""
        return self.allocation == "model"

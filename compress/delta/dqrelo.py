"""D-QRELO: one bit a weight, then low rank for what the bits leave over.

`Q = mean|D| sign(D)`, one scale a tensor, takes what a long fine-tune adds everywhere; the leading
singular vectors of `D - Q`, in 16 bits, take the directions that it added most in. The rank is what
the ratio leaves after the bits: `out in (ratio - 1/16) / (out + in)`. No data is needed.

Paper: D-QRELO, arXiv:2604.16940, section 3.
Differs: ranks are rounded up, largest fraction first, only while all weights together keep the
ratio, which all rounded up would exceed; the singular values are split between the two factors, so
they take no bytes; vectors are stored exactly, where the paper keeps their largest entries: they
are a thousandth of the bytes, and the most sensitive of all.
"""

from pydantic import Field

from unicomp.compress.decompose import First, How
from unicomp.compress.method import DeltaMethod
from unicomp.kernels.delta import Layout


class Dqrelo(DeltaMethod):
    """Options of D-QRELO as published."""

    first: First = Field(
        "one-bit", description="which part is fitted first; the other takes what it leaves"
    )

    def layouts(self) -> tuple[Layout, ...]:
        """Return one plane with one scale, and factors of 16 bits."""
        return (Layout(1, False, 0, False),)

    def how(self, seed: int) -> How:
        """Return the paper's order, or the other."""
        return How(first=self.first, seed=seed)

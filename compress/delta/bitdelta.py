"""BitDelta: one bit a weight and one scale a tensor.

The sign of what the fine-tune added, times the mean magnitude: the scale of least squared error for
these signs. It takes a sixteenth of the 16-bit weights, whatever larger ratio is allowed.

Paper: BitDelta, arXiv:2402.10193, section 3.1.
Differs: embeddings and head are kept so too, since stored whole they alone exceed the ratio; list
them under `ignore` to keep them. The scales are not distilled.
"""

from unicomp.compress.decompose import How
from unicomp.compress.method import DeltaMethod
from unicomp.kernels.delta import Layout


class Bitdelta(DeltaMethod):
    """Options of BitDelta."""

    def layouts(self) -> tuple[Layout, ...]:
        """Return one plane with one scale."""
        return (Layout(1, False, 0, False),)

    def ranked(self) -> bool:
        """Say that no budget goes to factors."""
        return False

    def how(self, seed: int) -> How:
        """Return the paper's sign of zero: plus."""
        return How(zero_plus=True, seed=seed)

"""A quantized weight in memory: integer codes with their scales, before any on-disk layout.

`PackedTensor` is what a quantizer returns, what a format packs and unpacks, and what a kernel
multiplies with. One value convention everywhere, that of compressed-tensors: codes are signed,
`weight = (codes - zero_point) * scale`, and the zero point is absent when symmetric.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one weight is quantized.

    bits        2 to 8 bits per code
    group_size  input columns that share a scale; -1: one scale per output row
    symmetric   no zero point
    """

    bits: int
    group_size: int
    symmetric: bool = True

    @property
    def code_range(self) -> tuple[int, int]:
        """The least and the greatest code, both included."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Return how many groups a row of `in_features` columns has; the last may be shorter."""
        return 1 if self.group_size == -1 else -(-in_features // self.group_size)


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """One quantized linear weight.

    codes       int8 [out, in], within `scheme.code_range`
    scale       floating [out, groups], already rounded to the dtype it is stored in
    zero_point  int8 [out, groups], or None when symmetric
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the weight [out, in] that the codes stand for, computed in float32."""
        columns = self.codes.shape[1]
        size = columns if self.scheme.group_size == -1 else self.scheme.group_size
        group = torch.arange(columns, device=self.codes.device) // size
        weight = self.codes.float()
        if self.zero_point is not None:
            weight -= self.zero_point.float()[:, group]
        weight *= self.scale.float()[:, group]
        return weight.to(dtype)

    def rows(self, start: int, stop: int) -> "PackedTensor":
        """Return the output rows `start:stop` as views."""
        zero = None if self.zero_point is None else self.zero_point[start:stop]
        return PackedTensor(self.codes[start:stop], self.scale[start:stop], zero, self.scheme)

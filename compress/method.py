"""The three shapes of a compression method, and what a method may ask of its driver.

A method is a frozen set of options (its fields are the recipe's keys) and one function, `solve`.
It declares the statistics it needs and never hooks a model: the driver gathers each statistic
once for all who ask.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from unicomp.kernels.packed import PackedTensor, Scheme


class Need(StrEnum):
    """A statistic of a linear layer's input over the calibration tokens."""

    HESSIAN = "hessian"
    CROSS = "cross"


@dataclass(frozen=True, slots=True)
class Stats:
    """The statistics of one linear layer's input.

    tokens   how many tokens reached the layer
    hessian  float32 [in, in], mean of x.xT over those tokens; x comes from the compressed layers before
    cross    float32 [in, in], mean of (x_original - x).xT, x_original from the uncompressed model
    """

    tokens: int
    hessian: Tensor | None = None
    cross: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized weight and what is known of its error, row by row so that it can be split.

    Errors are squared output errors summed over tokens' mean: diag(E H ET), E = weight - dequantized.

    error      float32 [out], with the undamped hessian
    rounding   float32 [out], the same error of round-to-nearest on the same bits and groups
    reference  float32 [out], diag(W H WT), what the errors are relative to
    predicted  float32 [out], expected error from the pivots before any rounding; None without pivots
    clipped    int64 [out], codes that hit the end of the range
    damp       fraction of the mean diagonal that was added; None without a hessian
    """

    packed: PackedTensor
    error: Tensor
    rounding: Tensor
    reference: Tensor
    predicted: Tensor | None
    clipped: Tensor
    damp: float | None


class Method(BaseModel):
    """Options of a method; every field is a key of its recipe stage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    needs: ClassVar[frozenset[Need]] = frozenset()


class QuantizeMethod(Method):
    """A method of the verb `quantize`: one linear weight in, codes and scales out."""

    def solve(self, weight: Tensor, stats: Stats, scheme: Scheme, *, scale_dtype: object) -> Solution:
        """Quantize one weight; see the method's file."""
        raise NotImplementedError

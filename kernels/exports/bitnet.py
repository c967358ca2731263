"""Export to transformers' BitNet: ternary codes with one scale for each whole weight.

`--type` is the class of linear that reads the file: `autobitlinear` multiplies by the scale and
unpacks once at load, `bitlinear` divides by it and unpacks at every step. Groups or rows with
scales of their own do not fit: no code would say what they said, so they are refused, and a weight
whose rows four do not divide stays dense.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unicomp.kernels import bitnet
from unicomp.kernels.export import Codes, Verdict, words
from unicomp.kernels.export_folder import FolderExport
from unicomp.kernels.packed import PackedTensor
from unicomp.writer import Meta


class BitNet(FolderExport):
    """HF BitNet, packed offline."""

    name = "bitnet"
    types = bitnet.CLASSES

    def decide(
        self, weights: Sequence[Codes], kind: str | None, dtype: torch.dtype
    ) -> dict[str, Verdict]:
        """Return a verdict for every linear."""
        self.linear_class = kind or self.types[0]
        self.dtype = dtype
        return {weight.module: self._one(weight) for weight in weights}

    def _one(self, weight: Codes) -> Verdict:
        scheme = weight.scheme
        if scheme is None:
            return Verdict("fallback", "dense", "it is not quantized")
        if weight.expert or weight.transposed:
            what = "experts" if weight.expert else "Conv1D"
            return Verdict("refused", "", f"transformers' bitnet has no place for {what}")
        if not weight.ternary:
            why = f"bitnet holds codes -1, 0 and 1 only, not {words(scheme)}"
            return Verdict("refused", "", why)
        if not weight.one_scale:
            why = "bitnet has one scale for a whole weight, these codes have several"
            return Verdict("refused", "", why)
        if weight.shape[0] % 4:
            why = f"out_features {weight.shape[0]} is not a multiple of 4"
            return Verdict("fallback", "dense", why)
        if self.linear_class == "bitlinear":
            return Verdict("fallback", "ternary", "the scale is stored as its inverse, rounded")
        if self.dtype not in weight.exact_in:
            short = str(self.dtype).removeprefix("torch.")
            return Verdict("fallback", "ternary", f"the scale is rounded to {short}")
        return Verdict("exact", "ternary")

    def layout(self, weight: Codes) -> list[Meta]:
        """Return the two tensors of one weight."""
        rows, columns = weight.shape
        return [
            Meta(f"{weight.module}.weight", "U8", (rows // 4, columns)),
            Meta(f"{weight.module}.weight_scale", self.dtype_name(), (1,)),
        ]

    def pack(self, weight: Codes, packed: PackedTensor) -> dict[str, Tensor]:
        """Return the same two, filled."""
        scale = packed.scale.flatten()[:1]
        return {
            f"{weight.module}.weight": bitnet.pack(packed.codes),
            f"{weight.module}.weight_scale": bitnet.stored(scale, self.linear_class, self.dtype),
        }

    def config(self, kept: Sequence[Codes], dense: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`; dense linears are named whole."""
        return {
            "quant_method": "bitnet",
            "linear_class": self.linear_class,
            "quantization_mode": "offline",
            "use_rms_norm": False,
            "modules_to_not_convert": list(dense),
        }

"""Export to GPTQ, version 1 where all can be said in it and version 2 otherwise.

`--type v1` refuses what version 1 cannot say: zero points, and 3 bits, on which tools disagree.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from unicomp.kernels.export import Codes, Verdict
from unicomp.kernels.export_folder import FormatExport
from unicomp.kernels.formats import gptq


class Gptq(FormatExport):
    """GPTQModel's layout, version 1 or 2."""

    name = "gptq"
    types = ("v1", "v2")

    def decide(
        self, weights: Sequence[Codes], kind: str | None, dtype: torch.dtype
    ) -> dict[str, Verdict]:
        """Return a verdict for every linear; the version is one for the whole file."""
        found = super().decide(weights, kind, dtype)
        if not isinstance(self.format, gptq.Gptq):
            raise TypeError(f"`{self.format.name}` is not gptq")
        if kind == "v2":
            self.format = replace(self.format, v2=True)
        if kind == "v1" and self.format.v2:
            self.format = replace(self.format, v2=False)
            for weight in weights:
                scheme = self.schemes.get(weight.module)
                if scheme is not None and (not scheme.symmetric or scheme.bits == 3):
                    what = "3 bits" if scheme.symmetric else "zero points"
                    why = f"gptq version 1 cannot say {what} as all its readers do"
                    found[weight.module] = Verdict("refused", "", why)
        return found

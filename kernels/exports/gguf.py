"""Export to one GGUF file that llama.cpp runs: metadata, tokenizer and every tensor.

Codes go to the smallest type that holds them with their scales: ternary ones to TQ2_0, or TQ1_0
where `--type tq1_0` asks, others of up to four bits to Q4_0 and up to eight to Q8_0; a group may
span several blocks, which then repeat its scale. What no block divides or no type can say becomes
F16. With `--type` plain weights are rounded to that type by llama.cpp's own rules; codes are never
rounded a second time. Norms and biases are F32, embeddings and the head F16.

The `gguf` package writes the container. One tensor is in memory at a time.
"""

from collections.abc import Sequence

import torch

from unicomp.blocks import RANGES, SIZES
from unicomp.kernels.export import Codes, Export, Verdict

WIDEST = ("TQ1_0", "TQ2_0", "Q4_0", "Q8_0", "F16")


class Gguf(Export):
    """A `.gguf` file."""

    name = "gguf"
    types = ("f16", "q8_0", "q4_0", "tq2_0", "tq1_0")

    def decide(
        self, weights: Sequence[Codes], kind: str | None, dtype: torch.dtype
    ) -> dict[str, Verdict]:
        """Return a verdict for every linear; `stored` is the GGUF type."""
        return {one.module: self._one(one, kind and kind.upper()) for one in weights}

    def _one(self, weight: Codes, kind: str | None) -> Verdict:
        if weight.scheme is None:
            return self._plain(weight, kind)
        if kind == "F16":
            return Verdict("fallback", "F16", "codes are multiplied out, as `--type` asks")
        wanted = [kind] if kind is not None else ["TQ2_0", "Q4_0", "Q8_0"]
        reasons = {own: _refuses(weight, own) for own in wanted}
        taken = [own for own, reason in reasons.items() if reason is None]
        if taken:
            if torch.float16 not in weight.exact_in:
                return Verdict("fallback", taken[0], "scales are rounded to float16")
            return Verdict("exact", taken[0])
        if kind is not None:
            why = f"{reasons[kind]}, and codes are not rounded twice"
            return Verdict("refused", "", why)
        return Verdict("fallback", "F16", reasons["Q8_0"])

    def _plain(self, weight: Codes, kind: str | None) -> Verdict:
        if kind in (None, "F16"):
            return Verdict("fallback", "F16", "it is not quantized")
        size = SIZES[kind][0]
        if weight.shape[1] % size:
            why = f"in_features {weight.shape[1]} is not a multiple of {kind}'s block of {size}"
            return Verdict("fallback", "F16", why)
        return Verdict("fallback", kind, "rounded to the nearest, without calibration")


def _refuses(weight: Codes, kind: str) -> str | None:
    """Say why a type does not hold these codes; None: it does."""
    scheme = weight.scheme
    if scheme is None:
        raise ValueError(f"`{weight.module}` has no codes")
    size = SIZES[kind][0]
    if not scheme.symmetric:
        return f"{kind} has no zero points"
    if kind.startswith("TQ") and not weight.ternary:
        return f"{kind} holds codes -1, 0 and 1 only"
    low, high = scheme.code_range
    if not kind.startswith("TQ") and (low < RANGES[kind][0] or high > RANGES[kind][1]):
        return f"{kind} holds no codes of {scheme.bits} bits"
    if weight.shape[1] % size:
        return f"in_features {weight.shape[1]} is not a multiple of {kind}'s block of {size}"
    if not weight.one_scale and scheme.group_size != -1 and scheme.group_size % size:
        return f"group_size {scheme.group_size} is not a multiple of {kind}'s block of {size}"
    return None

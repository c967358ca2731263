"""GPTQ: the layout of GPTQModel and AutoGPTQ, which GPTQModel and vLLM run.

Per linear weight [out, in] with b bits and group size g, everything transposed:

    <m>.qweight  int32 [in*b/32, out]     codes, packed down the columns
    <m>.qzeros   int32 [in/g, out*b/32]   zero points, packed along the rows
    <m>.scales   float16 [in/g, out]
    <m>.g_idx    int32 [in]               the group of each input; here always i // g

Codes are unsigned, `weight = scales * (q - z)`, in the words of `kernels/packed.py`: a symmetric
weight has the same words here and in compressed-tensors, transposed. Symmetric z is 2^(bits-1).

Two conventions for z: version 1 (`checkpoint_format: gptq`) stores z - 1, version 2 (`gptq_v2`)
stores z. Version 1 cannot say z = 0, and tools disagree on its 3-bit fields, so it is written for
symmetric 2, 4 and 8 bits only: what every loader reads. One file has one convention.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from unicomp.kernels import loader_facts as facts
from unicomp.kernels.format import Format, Settled, Wish
from unicomp.kernels.packed import PackedTensor, Scheme, pack_words, unpack_words, words
from unicomp.kernels.targets import patterns
from unicomp.later import torch
from unicomp.writer import Meta

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 16, 32, 64, 128)
HEADS = ("lm_head", "embed_out")


@dataclass(frozen=True, slots=True)
class Gptq(Format):
    """The GPTQ layout.

    v2  zero points are stored as they are, not less one
    """

    name = "gptq"

    v2: bool = False

    def settle(self, wishes: Sequence[Wish], loaders: Iterable[str]) -> Settled:
        """Decide each linear's storage; vLLM runs symmetric 4 and 8 bits alone."""
        vllm = "vllm" in set(loaders)
        schemes: dict[str, Scheme | None] = {}
        why: dict[str, str] = {}
        for wish in wishes:
            scheme = wish.scheme
            reason = None if scheme is None else self.refuses(wish.shape, scheme)
            if scheme is not None and reason is not None:
                channel = replace(scheme, group_size=-1)
                stored = self.refuses(wish.shape, channel) is None
                scheme = channel if stored else None
                reason += ": per channel" if stored else ""
            refuses = None if scheme is None else _vllm_refuses(wish.shape, scheme)
            if vllm and refuses is not None:
                scheme, reason = None, f"vLLM: {refuses}"
            schemes[wish.module] = scheme
            if reason is not None:
                why[wish.module] = reason
        kept = [scheme for scheme in schemes.values() if scheme is not None]
        v2 = any(not scheme.symmetric or scheme.bits == 3 for scheme in kept)
        return Settled(replace(self, v2=v2), schemes, why)

    def reading(self, config: Mapping[str, Any]) -> Self:
        """Return the instance for a file, by its `checkpoint_format`."""
        return replace(self, v2=config.get("checkpoint_format") == "gptq_v2")

    def refuses(self, shape: tuple[int, int], scheme: Scheme) -> str | None:
        """Say why not: bits or groups that no kernel has, or rows that do not fill whole words."""
        if scheme.bits not in BITS:
            return f"gptq has no {scheme.bits} bits, only 2, 3, 4 and 8"
        if scheme.group_size not in GROUP_SIZES:
            return f"gptq kernels have no group_size {scheme.group_size}, only 16, 32, 64 and 128"
        for what, size in (("in_features", shape[1]), ("out_features", shape[0])):
            if size * scheme.bits % 32:
                return f"{what} {size} does not fill whole words of {scheme.bits}-bit codes"
        if scheme.group_size != -1 and shape[1] % scheme.group_size:
            return f"in_features {shape[1]} is not a multiple of group_size {scheme.group_size}"
        return None

    def scale_dtype(self, dtype: str) -> str:
        """Return float16, whatever the model's dtype."""
        return "F16"

    def layout(self, module: str, shape: tuple[int, int], scheme: Scheme, dtype: str) -> list[Meta]:
        """Return the tensors of one weight [out, in]."""
        out, columns = shape
        groups = scheme.groups(columns)
        return [
            Meta(f"{module}.qweight", "I32", (words(columns, scheme.bits), out)),
            Meta(f"{module}.qzeros", "I32", (groups, words(out, scheme.bits))),
            Meta(f"{module}.scales", self.scale_dtype(dtype), (groups, out)),
            Meta(f"{module}.g_idx", "I32", (columns,)),
        ]

    def pack(self, module: str, packed: PackedTensor) -> dict[str, Tensor]:
        """Return the stored tensors; the scale must be float16."""
        scheme = packed.scheme
        if not self.v2 and (not scheme.symmetric or scheme.bits == 3):
            raise ValueError(f"`{module}`: gptq version 1 cannot say {scheme}")
        columns = packed.codes.shape[1]
        zero = packed.zero_point
        if zero is None:
            zero = torch.zeros(packed.scale.shape, dtype=torch.int8, device=packed.codes.device)
        size = columns if scheme.group_size == -1 else scheme.group_size
        return {
            f"{module}.qweight": pack_words(packed.codes, scheme.bits).T.contiguous(),
            f"{module}.qzeros": pack_words(zero.T - (0 if self.v2 else 1), scheme.bits),
            f"{module}.scales": packed.scale.T.contiguous(),
            f"{module}.g_idx": torch.arange(columns, dtype=torch.int32) // size,
        }

    def unpack(
        self,
        module: str,
        read: Callable[[str], Tensor],
        shape: tuple[int, int],
        scheme: Scheme,
    ) -> PackedTensor:
        """Return codes, scale and zero point of one weight [out, in]."""
        codes = unpack_words(read(f"{module}.qweight").T, scheme.bits, shape[1])
        scale = read(f"{module}.scales").T.contiguous()
        zero = None
        if not scheme.symmetric:
            zero = self.zero_points(read(f"{module}.qzeros"), scheme.bits, shape[0])
        return PackedTensor(codes, scale, zero, scheme)

    def zero_points(self, qzeros: Tensor, bits: int, out: int) -> Tensor:
        """Return signed zero points, int8 [out, groups], from their words [groups, out*bits/32].

        A version 1 field of all ones is z = 0, less one: no quantizer makes z = 2^bits.
        """
        stored = unpack_words(qzeros, bits, out).T.contiguous()
        if self.v2:
            return stored
        low, high = Scheme(bits, -1).code_range
        return torch.where(stored == high, low, stored + 1).to(torch.int8)

    def config(self, schemes: Mapping[str, Scheme], dense: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`: the commonest scheme, and `dynamic` for the others."""
        common = Counter(schemes.values()).most_common(1)[0][0]
        everything = [*schemes, *dense]
        dynamic: dict[str, Any] = {}
        for scheme in dict.fromkeys(schemes.values()):
            if scheme != common:
                members = [module for module, own in schemes.items() if own == scheme]
                own = {"bits": scheme.bits, "group_size": scheme.group_size}
                own |= {"sym": scheme.symmetric}
                dynamic |= {f"+:{entry}": own for entry in _regexes(members, everything)}
        inside = [module for module in dense if module not in HEADS]
        dynamic |= {f"-:{entry}": {} for entry in _regexes(inside, everything)}
        convention = "gptq_v2" if self.v2 else "gptq"
        return {
            "quant_method": "gptq",
            "bits": common.bits,
            "group_size": common.group_size,
            "sym": common.symmetric,
            "desc_act": False,
            "lm_head": False,
            "method": "gptq",
            "format": convention,
            "checkpoint_format": convention,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["unicomp"], "static_groups": True, "true_sequential": True},
        } | ({"dynamic": dynamic} if dynamic else {})

    def scheme(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """Read one module's scheme: the first matching `dynamic` entry, over the common one."""
        if module in HEADS and not config.get("lm_head"):
            return None
        own = dict(config)
        for entry, changes in (config.get("dynamic") or {}).items():
            if re.match(entry.removeprefix("-:").removeprefix("+:"), module):
                if entry.startswith("-:"):
                    return None
                own |= changes
                break
        return Scheme(own["bits"], own.get("group_size", -1), bool(own.get("sym", True)))

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return `quantize_config.json`, where GPTQModel looks first."""
        return {"quantize_config.json": json.dumps(config, indent=2) + "\n"}


def _vllm_refuses(shape: tuple[int, int], scheme: Scheme) -> str | None:
    for fact in (facts.VLLM_GPTQ_WIDTH, facts.VLLM_GPTQ_ZERO_POINTS):
        if fact.wrong(shape, scheme):
            return fact.why
    return None


def _regexes(members: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Return `patterns` as plain regular expressions."""
    return [
        entry.removeprefix("re:") if entry.startswith("re:") else f"^{re.escape(entry)}$"
        for entry in patterns(members, everything)
    ]

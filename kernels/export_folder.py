"""Formats that are a folder in Hugging Face layout: what the writer of the folder asks of them.

`decide` comes first: it fixes the writing (version, class of linear), which the others then use.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from unicomp.checkpoint import DTYPES
from unicomp.kernels import format as formats
from unicomp.kernels.export import Codes, Export, Verdict, words
from unicomp.kernels.format import Format, Wish
from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.writer import Meta


class FolderExport(Export):
    """A format whose weights are safetensors and whose scheme stands in config.json."""

    dtype: torch.dtype = torch.float32

    @abstractmethod
    def layout(self, weight: Codes) -> list[Meta]:
        """Return the tensors that `pack` will give for a weight that is kept."""

    @abstractmethod
    def pack(self, weight: Codes, packed: PackedTensor) -> dict[str, Tensor]:
        """Return the tensors to store for a weight that is kept."""

    @abstractmethod
    def config(self, kept: Sequence[Codes], dense: Sequence[str]) -> dict[str, Any]:
        """Return the value of `quantization_config`; `dense` are all other linear modules."""

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return further files, name to text."""
        return {}

    def dtype_name(self) -> str:
        """Return the model's dtype as safetensors writes it."""
        return next(name for name, own in DTYPES.items() if own == self.dtype)


class FormatExport(FolderExport):
    """A format that `quantize` writes too: the same class packs for both."""

    format: Format
    schemes: dict[str, Scheme]

    def decide(
        self, weights: Sequence[Codes], kind: str | None, dtype: torch.dtype
    ) -> dict[str, Verdict]:
        """Return a verdict for every linear, by the format's own rules for transformers."""
        self.dtype = dtype
        wishes = [
            Wish(one.module, one.shape, one.scheme, one.transposed, one.expert) for one in weights
        ]
        settled = formats.find(self.name).settle(wishes, ["transformers"])
        self.format = settled.format
        self.schemes = {}
        stored = DTYPES[self.format.scale_dtype(self.dtype_name())]
        found = {}
        for one in weights:
            scheme = settled.schemes[one.module]
            if one.scheme is None:
                found[one.module] = Verdict("fallback", "dense", "it is not quantized")
            elif scheme is None or not _same(one, scheme):
                why = settled.why.get(one.module, "the format has no place for it")
                why = why.removesuffix(": per channel")
                found[one.module] = Verdict("fallback", "dense", why)
            else:
                self.schemes[one.module] = scheme
                why_not = None
                if stored not in one.exact_in:
                    why_not = f"scales are rounded to {str(stored).removeprefix('torch.')}"
                kept = "exact" if why_not is None else "fallback"
                found[one.module] = Verdict(
                    "exact" if kept == "exact" else "fallback", words(one.scheme), why_not
                )
        return found

    def layout(self, weight: Codes) -> list[Meta]:
        """Return the tensors of one weight."""
        scheme = self.schemes[weight.module]
        return self.format.layout(weight.module, weight.shape, scheme, self.dtype_name())

    def pack(self, weight: Codes, packed: PackedTensor) -> dict[str, Tensor]:
        """Return the same, filled; scales in the dtype that is stored."""
        scale = packed.scale.to(DTYPES[self.format.scale_dtype(self.dtype_name())])
        own = replace(packed, scale=scale, scheme=self.schemes[weight.module])
        return self.format.pack(weight.module, own)

    def config(self, kept: Sequence[Codes], dense: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`."""
        return self.format.config({one.module: self.schemes[one.module] for one in kept}, dense)

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return further files of the format."""
        return self.format.extra_files(config)


def _same(weight: Codes, scheme: Scheme) -> bool:
    """Say whether codes keep their meaning in another writing: a row may be called one group."""
    own = weight.scheme
    if own is None:
        return False
    whole = weight.shape[1]
    sizes = [whole if one.group_size == -1 else one.group_size for one in (own, scheme)]
    return (own.bits, own.symmetric, sizes[0]) == (scheme.bits, scheme.symmetric, sizes[1])

"""compressed-tensors `pack-quantized`: what transformers and vLLM load, the default format.

Per linear weight [out, in] with b bits and group size g:

    <m>.weight_packed      int32 [out, ceil(in*b/32)]   rows of codes, `kernels/packed.py`
    <m>.weight_scale       model dtype [out, in/g], or [out, 1] per channel
    <m>.weight_shape       int64 [2] = (out, in)
    <m>.weight_zero_point  int32 [ceil(out*b/32), in/g], packed down the rows; asymmetric only

Codes of 3, 5, 6 and 7 bits straddle words. compressed-tensors before 0.18 wrote them otherwise
under the same name; only the dense layout is written here, and the version says so.

Three writings besides, each because a stock loader (transformers 5.23 with compressed-tensors
0.20, tried for each) takes the plain one wrongly or not at all; `settle` chooses:

* Groups as blocks, `strategy: block` with `block_structure: [1, g]`: the last group may be
  shorter, and zero points are stored raw, int8 [out, ceil(in/g)]. vLLM does not take it.
* `dequantize: true`, read by transformers alone: packed zero points load only with it, and with
  it all linears must share one scheme.
* Conv1D (GPT-2) is stored as the model holds it, [in, out], in blocks [g, 1], dequantized at load.

`targets` and `ignore` are exact: with one scheme, class `Linear` and every dense linear ignored,
the form that every loader knows; with several, only anchored patterns and names, since vLLM tries
a class name before it takes a fused q/k/v apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from unicomp.errors import UnsupportedError
from unicomp.kernels import loader_facts as facts
from unicomp.kernels.format import Format, Settled, Wish
from unicomp.kernels.packed import PackedTensor, Scheme, pack_words, unpack_words, words
from unicomp.kernels.targets import CLASSES, matches, patterns
from unicomp.later import torch
from unicomp.writer import Meta

if TYPE_CHECKING:
    from torch import Tensor

# The release whose files these are, byte for byte; 0.18 made odd widths dense.
VERSION = "0.20.0"


@dataclass(frozen=True, slots=True)
class CompressedTensors(Format):
    """The `pack-quantized` layout of compressed-tensors 0.18 and later.

    block       modules whose groups are written as blocks
    tallest     the most input features of a Conv1D; 0: the model has plain linears
    dequantize  transformers makes the weights dense at load
    """

    name = "compressed-tensors"

    block: frozenset[str] = frozenset()
    tallest: int = 0
    dequantize: bool = False

    def settle(self, wishes: Sequence[Wish], loaders: Iterable[str]) -> Settled:
        """Decide each linear's storage; the rules are the loaders', see the module's docstring."""
        settling = _Settling(frozenset(loaders) or frozenset({"transformers"}))
        settling.schemes = {wish.module: wish.scheme for wish in wishes}
        settling.vllm_refuses(wishes)
        settling.conv1d([wish for wish in wishes if wish.transposed])
        settling.experts([wish for wish in wishes if wish.expert])
        plain = [wish for wish in wishes if not wish.transposed and not wish.expert]
        settling.fused(plain)
        settling.plain(plain)
        own = replace(
            self,
            block=frozenset(settling.block),
            tallest=max((wish.shape[1] for wish in wishes if wish.transposed), default=0),
            dequantize=settling.dequantize,
        )
        return Settled(own, settling.schemes, settling.why, tuple(settling.stacked))

    def reading(self, config: Mapping[str, Any]) -> Self:
        """Return the instance for a file; blocks down the rows are what only Conv1D has."""
        blocks = [
            (group.get("weights") or {}).get("block_structure") or [1, 1]
            for group in config.get("config_groups", {}).values()
        ]
        tallest = max((down for down, along in blocks if along == 1), default=0)
        return replace(self, tallest=tallest if tallest > 1 else 0)

    def refuses(self, shape: tuple[int, int], scheme: Scheme) -> str | None:
        """Say why the plain writing cannot: bits outside 2..8, or a group that does not divide."""
        if not 2 <= scheme.bits <= 8:
            return f"bits {scheme.bits} is not within 2..8"
        if scheme.group_size != -1 and shape[1] % scheme.group_size:
            return f"in_features {shape[1]} is not a multiple of group_size {scheme.group_size}"
        return None

    def scale_dtype(self, dtype: str) -> str:
        """Return the model's own dtype: loaders create the scale in it, and would round to it."""
        return dtype if dtype in ("F32", "F16") else "BF16"

    def layout(self, module: str, shape: tuple[int, int], scheme: Scheme, dtype: str) -> list[Meta]:
        """Return the tensors of one weight [out, in]."""
        out, columns = shape
        groups = scheme.groups(columns)
        name = self.scale_dtype(dtype)
        rows, stored = (columns, out) if self.tallest else (out, columns)
        grid = (groups, out) if self.tallest else (out, groups)
        tensors = [
            Meta(f"{module}.weight_packed", "I32", (rows, words(stored, scheme.bits))),
            Meta(f"{module}.weight_scale", name, grid),
            Meta(f"{module}.weight_shape", "I64", (2,)),
        ]
        if not scheme.symmetric and self._raw(module):
            tensors.append(Meta(f"{module}.weight_zero_point", "I8", grid))
        elif not scheme.symmetric:
            packed = (words(out, scheme.bits), groups)
            tensors.append(Meta(f"{module}.weight_zero_point", "I32", packed))
        return tensors

    def pack(self, module: str, packed: PackedTensor) -> dict[str, Tensor]:
        """Return the stored tensors; the scale keeps its dtype, which must be `scale_dtype`'s."""
        codes, scale, zero = packed.codes, packed.scale, packed.zero_point
        if self.tallest:
            codes, scale = codes.T, scale.T
            zero = None if zero is None else zero.T
        tensors = {
            f"{module}.weight_packed": pack_words(codes, packed.scheme.bits),
            f"{module}.weight_scale": scale.contiguous(),
            f"{module}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }
        if zero is not None and not self._raw(module):
            zero = pack_words(zero.T, packed.scheme.bits).T
        if zero is not None:
            tensors[f"{module}.weight_zero_point"] = zero.contiguous()
        return tensors

    def unpack(
        self,
        module: str,
        read: Callable[[str], Tensor],
        shape: tuple[int, int],
        scheme: Scheme,
    ) -> PackedTensor:
        """Return codes, scale and zero point of one weight [out, in]."""
        stored = shape[0] if self.tallest else shape[1]
        codes = unpack_words(read(f"{module}.weight_packed"), scheme.bits, stored)
        scale = read(f"{module}.weight_scale")
        zero = None
        if not scheme.symmetric:
            zero = read(f"{module}.weight_zero_point")
            if zero.dtype == torch.int32:
                zero = unpack_words(zero.T, scheme.bits, shape[0]).T
        if self.tallest:
            codes, scale = codes.T, scale.T
            zero = None if zero is None else zero.T
        zero = None if zero is None else zero.contiguous()
        scale = scale.reshape(shape[0], -1).contiguous()
        return PackedTensor(codes.contiguous(), scale, zero, scheme)

    def config(self, schemes: Mapping[str, Scheme], dense: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`: one group per way of storing, in order of use."""
        ways: dict[tuple[Scheme, bool], list[str]] = {}
        for module, scheme in schemes.items():
            ways.setdefault((scheme, module in self.block), []).append(module)
        # Tied heads are Linear modules too, and gpt_neox calls its head otherwise on disk.
        dense = list(dict.fromkeys([*dense, *({"lm_head"} - set(schemes))]))
        everything = [*schemes, *dense]
        groups: dict[str, Any] = {}
        for (scheme, block), members in ways.items():
            kind = "Conv1D" if self.tallest else "Linear"
            groups[f"group_{len(groups)}"] = {
                "format": "pack-quantized",
                "targets": [kind] if len(ways) == 1 else patterns(members, everything),
                "weights": self._weights(scheme, block),
                "input_activations": None,
                "output_activations": None,
            }
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "version": VERSION,
            "config_groups": groups,
            "ignore": patterns(dense, everything),
            "kv_cache_scheme": None,
        }
        return config | ({"dequantize": True} if self.dequantize else {})

    def scheme(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """Read one module's scheme; names go before patterns, patterns before classes."""
        group = find_group(config, module)
        weights = None if group is None else group.get("weights")
        if weights is None:
            return None
        if weights.get("type", "int") != "int":
            raise UnsupportedError(f"`{module}`: weights of type `{weights['type']}` are no codes")
        size = weights.get("group_size") or -1
        if weights.get("block_structure"):
            size = max(weights["block_structure"])
        return Scheme(weights["num_bits"], size, bool(weights.get("symmetric", True)))

    def _raw(self, module: str) -> bool:
        """Say whether zero points are stored unpacked: compressed-tensors does so for blocks."""
        return self.tallest > 0 or module in self.block

    def _weights(self, scheme: Scheme, block: bool) -> dict[str, Any]:
        size = scheme.group_size
        strategy: dict[str, Any] = {"strategy": "group", "group_size": size}
        if self.tallest:
            down = self.tallest if size == -1 else size
            strategy = {"strategy": "block", "block_structure": [down, 1]}
        elif block:
            strategy = {"strategy": "block", "block_structure": [1, size]}
        elif size == -1:
            strategy = {"strategy": "channel", "group_size": None}
        kept = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric}
        return {**kept, **strategy, "dynamic": False}


def find_group(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """Return the config group that a linear module belongs to, as compressed-tensors chooses.

    An exact name goes before a pattern and a pattern before a class name, whatever their order.
    """
    if any(matches(module, entry) for entry in config.get("ignore") or []):
        return None
    found: dict[int, Mapping[str, Any]] = {}
    for group in config.get("config_groups", {}).values():
        for entry in group["targets"]:
            if matches(module, entry):
                pattern, kind = entry.startswith("re:"), entry in CLASSES
                found.setdefault(2 if kind else 1 if pattern else 0, group)
    return found[min(found)] if found else None


@dataclass(slots=True)
class _Settling:
    """The rules of the loaders, applied one kind of linear after another."""

    loaders: frozenset[str]
    schemes: dict[str, Scheme | None] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    block: set[str] = field(default_factory=set)
    stacked: list[str] = field(default_factory=list)
    dequantize: bool = False

    @property
    def vllm(self) -> bool:
        return "vllm" in self.loaders

    @property
    def transformers(self) -> bool:
        return "transformers" in self.loaders

    def keep(self, wishes: Iterable[Wish], why: str) -> None:
        """Leave these dense; those that the recipe ignores need no reason."""
        for wish in wishes:
            if self.schemes[wish.module] is not None:
                self.schemes[wish.module] = None
                self.why[wish.module] = why

    def wanted(self, wishes: Iterable[Wish]) -> list[Wish]:
        return [wish for wish in wishes if self.schemes[wish.module] is not None]

    def common(self, wishes: Iterable[Wish]) -> Scheme | None:
        """Return the scheme of the most weights."""
        weights: Counter[Scheme] = Counter()
        for wish in wishes:
            scheme = self.schemes[wish.module]
            if scheme is not None:
                weights[scheme] += wish.shape[0] * wish.shape[1]
        return max(weights, key=weights.__getitem__) if weights else None

    def vllm_refuses(self, wishes: Iterable[Wish]) -> None:
        """Leave dense what vLLM takes in no writing."""
        for fact in (facts.VLLM_HALF_WORDS, facts.VLLM_ZERO_POINTS) if self.vllm else ():
            wrong = [w for w in self.wanted(wishes) if fact.wrong(w.shape, self._scheme(w))]
            self.keep(wrong, f"vLLM: {fact.why}")

    def conv1d(self, wishes: list[Wish]) -> None:
        """Conv1D loads in transformers only dequantized at load, and then with one scheme."""
        wanted = self.wanted(wishes)
        if not wanted:
            return
        if self.vllm:
            self.keep(wanted, "vLLM takes no packed Conv1D from compressed-tensors; gptq would do")
            return
        self._one_scheme(wanted, "Conv1D")
        self.dequantize = True

    def _one_scheme(self, wanted: list[Wish], what: str) -> None:
        common = self.common(wanted)
        others = [wish for wish in wanted if self.schemes[wish.module] != common]
        self.keep(others, f"transformers takes one scheme for all {what} here, and it is another's")

    def experts(self, wishes: list[Wish]) -> None:
        """Packed experts share one symmetric scheme, and a layer's are packed all or none."""
        layers: dict[str, list[Wish]] = {}
        for wish in wishes:
            path = wish.module.rpartition(".experts.")[0] + ".experts"
            layers.setdefault(path, []).append(wish)
        if any(not scheme.symmetric for scheme in self._schemes(wishes)):
            self.keep(wishes, "loaders drop the zero points of packed experts")
        common = self.common(wishes)
        for path, members in layers.items():
            own = {self.schemes[wish.module] for wish in members}
            if own != {common}:
                self.keep(
                    members, "loaders take one scheme for all packed experts, and all of a layer"
                )
            if own != {common} or common is None:
                self.stacked.append(path)
        packed = self.wanted(wishes)
        ragged = [wish for wish in packed if self._ragged(wish)]
        if ragged and (self.vllm or self._fills_words(packed)):
            reason = f"{self._undivided(ragged[0])} of `{ragged[0].module}`: per channel"
            self._per_channel(packed, reason)
        elif ragged:
            self._as_blocks(packed, None)  # all experts alike, though some are even
            self._as_blocks(ragged, f"{self._undivided(ragged[0])}: a shorter last group")
        if not self.transformers or not any(self.schemes.values()):
            self.stacked = []

    def fused(self, wishes: list[Wish]) -> None:
        """VLLM holds q, k and v as one module, and gate and up: they take the finest's scheme."""
        if not self.vllm:
            return
        for members in self._neighbours(wishes):
            own_schemes = [self.schemes[wish.module] for wish in members]
            if len(set(own_schemes)) == 1:
                continue
            if None in own_schemes:
                self.keep(members, "vLLM fuses it with a neighbour that stays dense")
                continue
            finest = max(self._schemes(members), key=_fineness)
            for wish in members:
                if self.schemes[wish.module] != finest:
                    self.schemes[wish.module] = finest
                    self.why[wish.module] = "vLLM fuses it with a neighbour of this scheme"

    def plain(self, wishes: list[Wish]) -> None:
        """Linears mix freely while symmetric; packed zero points want one scheme for all."""
        wanted = self.wanted(wishes)
        symmetric = [wish for wish in wanted if self._scheme(wish).symmetric]
        shifted = [wish for wish in wanted if not self._scheme(wish).symmetric]
        for wish in symmetric:
            if self._ragged(wish) and (self.vllm or self._fills_words([wish])):
                self._per_channel([wish], f"{self._undivided(wish)}: per channel")
            elif self._ragged(wish):
                self._as_blocks([wish], f"{self._undivided(wish)}: a shorter last group")
        if not shifted:
            return
        ragged = [wish for wish in shifted if self._ragged(wish)]
        schemes = set(self._schemes(shifted))
        mixed = bool(symmetric or ragged or len(schemes) > 1)
        if mixed and not self.vllm:
            for wish in shifted:
                ragged_here = self._ragged(wish)
                if self._scheme(wish).group_size == -1:
                    self._whole_rows(wish)
                why = f"{self._undivided(wish)}: a shorter last group" if ragged_here else None
                self._as_blocks([wish], why)
            return
        for wish in ragged:
            self._per_channel([wish], f"{self._undivided(wish)}: per channel")
        if self.transformers:
            self._one_scheme(wanted, "linears with packed zero points")
        self.dequantize = not mixed or self.transformers

    def _neighbours(self, wishes: Iterable[Wish]) -> list[list[Wish]]:
        """Return the linears that vLLM holds as one, in lists."""
        parents: dict[tuple[str, int], list[Wish]] = {}
        for wish in wishes:
            parent, _, own = wish.module.rpartition(".")
            for index, names in enumerate(facts.FUSED):
                if own in names:
                    parents.setdefault((parent, index), []).append(wish)
        return list(parents.values())

    def _scheme(self, wish: Wish) -> Scheme:
        scheme = self.schemes[wish.module]
        if scheme is None:
            raise ValueError(f"`{wish.module}` is dense")
        return scheme

    def _schemes(self, wishes: Iterable[Wish]) -> list[Scheme]:
        return [scheme for wish in wishes if (scheme := self.schemes[wish.module]) is not None]

    def _ragged(self, wish: Wish) -> bool:
        size = self._scheme(wish).group_size
        return size != -1 and wish.shape[1] % size != 0

    def _undivided(self, wish: Wish) -> str:
        size = self._scheme(wish).group_size
        return f"in_features {wish.shape[1]} is not a multiple of group_size {size}"

    def _fills_words(self, wishes: Iterable[Wish]) -> bool:
        """Say whether rows end with a whole word, without which vLLM takes no packed linear."""
        return not any(
            facts.VLLM_HALF_WORDS.wrong(wish.shape, self._scheme(wish)) for wish in wishes
        )

    def _per_channel(self, wishes: Iterable[Wish], why: str) -> None:
        for wish in wishes:
            self.schemes[wish.module] = replace(self._scheme(wish), group_size=-1)
            self.why[wish.module] = why

    def _as_blocks(self, wishes: Iterable[Wish], why: str | None) -> None:
        for wish in wishes:
            self.block.add(wish.module)
            if why is not None:
                self.why[wish.module] = why

    def _whole_rows(self, wish: Wish) -> None:
        """Make a row one block: what a channel is, for a writing that has only blocks."""
        self.schemes[wish.module] = replace(self._scheme(wish), group_size=wish.shape[1])


def _fineness(scheme: Scheme) -> tuple[int, float, bool]:
    size = float("inf") if scheme.group_size == -1 else scheme.group_size
    return scheme.bits, -size, not scheme.symmetric

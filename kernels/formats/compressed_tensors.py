"""compressed-tensors `pack-quantized`: what transformers and vLLM load, the default format.

Per linear weight [out, in] with b bits and group size g:

    <m>.weight_packed      int32 [out, ceil(in*b/32)]   rows of codes, `kernels/packed.py`
    <m>.weight_scale       model dtype [out, in/g], or [out, 1] per channel
    <m>.weight_shape       int64 [2] = (out, in)
    <m>.weight_zero_point  int32 [ceil(out*b/32), in/g], packed down the rows; asymmetric only

Codes of 3, 5, 6 and 7 bits straddle words. compressed-tensors before 0.18 wrote them otherwise
under the same name; only the dense layout is written here, and the version says so.

`targets` and `ignore` are exact: with one scheme, class `Linear` and every dense linear ignored,
the form that every loader knows; with several, only anchored patterns and names, since vLLM tries
a class name before it takes a fused q/k/v apart. Each list is checked against all module names.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unicomp.checkpoint import DTYPES
from unicomp.errors import UnsupportedError
from unicomp.kernels.format import Format
from unicomp.kernels.packed import PackedTensor, Scheme, pack_words, unpack_words, words
from unicomp.writer import Meta

# The release whose files these are, byte for byte; 0.18 made odd widths dense.
VERSION = "0.20.0"


class CompressedTensors(Format):
    """The `pack-quantized` layout of compressed-tensors 0.18 and later."""

    name = "compressed-tensors"

    def refuses(self, shape: tuple[int, int], scheme: Scheme) -> str | None:
        """Say why not: bits outside 2..8, or a group that does not divide the columns."""
        if not 2 <= scheme.bits <= 8:
            return f"bits {scheme.bits} is not within 2..8"
        if scheme.group_size != -1 and shape[1] % scheme.group_size:
            return f"in_features {shape[1]} is not a multiple of group_size {scheme.group_size}"
        return None

    def scale_dtype(self, dtype: str) -> torch.dtype:
        """Return the model's own dtype: loaders create the scale in it, and would round to it."""
        found = DTYPES[dtype]
        return found if found in (torch.float32, torch.float16) else torch.bfloat16

    def layout(self, module: str, shape: tuple[int, int], scheme: Scheme, dtype: str) -> list[Meta]:
        """Return the tensors of one weight [out, in]."""
        out, columns = shape
        groups = scheme.groups(columns)
        scale = next(name for name, kind in DTYPES.items() if kind == self.scale_dtype(dtype))
        tensors = [
            Meta(f"{module}.weight_packed", "I32", (out, words(columns, scheme.bits))),
            Meta(f"{module}.weight_scale", scale, (out, groups)),
            Meta(f"{module}.weight_shape", "I64", (2,)),
        ]
        if not scheme.symmetric:
            shape = (words(out, scheme.bits), groups)
            tensors.append(Meta(f"{module}.weight_zero_point", "I32", shape))
        return tensors

    def pack(self, module: str, packed: PackedTensor) -> dict[str, Tensor]:
        """Return the stored tensors; the scale keeps its dtype, which must be `scale_dtype`'s."""
        tensors = {
            f"{module}.weight_packed": pack_words(packed.codes, packed.scheme.bits),
            f"{module}.weight_scale": packed.scale.contiguous(),
            f"{module}.weight_shape": torch.tensor(packed.codes.shape, dtype=torch.int64),
        }
        if packed.zero_point is not None:
            columns = pack_words(packed.zero_point.T.contiguous(), packed.scheme.bits)
            tensors[f"{module}.weight_zero_point"] = columns.T.contiguous()
        return tensors

    def unpack(
        self,
        module: str,
        read: Callable[[str], Tensor],
        shape: tuple[int, int],
        scheme: Scheme,
    ) -> PackedTensor:
        """Return codes, scale and zero point of one weight [out, in]."""
        codes = unpack_words(read(f"{module}.weight_packed"), scheme.bits, shape[1])
        scale = read(f"{module}.weight_scale")
        zero = None
        if not scheme.symmetric:
            stored = read(f"{module}.weight_zero_point")
            zero = unpack_words(stored.T.contiguous(), scheme.bits, shape[0]).T.contiguous()
        return PackedTensor(codes, scale.reshape(shape[0], -1), zero, scheme)

    def config(self, schemes: Mapping[str, Scheme], dense: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`: one group per distinct scheme, in order of use."""
        distinct = list(dict.fromkeys(schemes.values()))
        everything = [*schemes, *dense]
        groups = {}
        for index, scheme in enumerate(distinct):
            members = [module for module, own in schemes.items() if own == scheme]
            targets = ["Linear"] if len(distinct) == 1 else patterns(members, everything)
            groups[f"group_{index}"] = {
                "format": "pack-quantized",
                "targets": targets,
                "weights": _weights(scheme),
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "version": VERSION,
            "config_groups": groups,
            "ignore": patterns(dense, everything),
            "kv_cache_scheme": None,
        }

    def scheme(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """Read one module's scheme; names go before patterns, patterns before `Linear`."""
        if any(_matches(module, entry) for entry in config.get("ignore") or []):
            return None
        found: Mapping[str, Any] | None = None
        for rank in (_is_name, _is_pattern, _is_class):
            for group in config.get("config_groups", {}).values():
                if any(rank(entry) and _matches(module, entry) for entry in group["targets"]):
                    found = found or group
        if found is None or found.get("weights") is None:
            return None
        weights = found["weights"]
        if weights.get("type", "int") != "int":
            raise UnsupportedError(f"`{module}`: weights of type `{weights['type']}` are not codes")
        group_size = weights.get("group_size")
        symmetric = bool(weights.get("symmetric", True))
        return Scheme(weights["num_bits"], group_size if group_size else -1, symmetric)


def patterns(members: Iterable[str], everything: Iterable[str]) -> list[str]:
    r"""Return the shortest entries that match exactly `members` among `everything`.

    A module without a number in its name is listed by name. The others become `re:` patterns with
    an anchored end, in which a layer or expert number is `\d+` where all agree and a choice where
    not. They start at the word before the first number, so that they also hold for the model
    without its head, unless that would match others.
    """
    wanted = list(dict.fromkeys(members))
    others = set(everything) - set(wanted)
    mine, alike = _by_template(wanted), _by_template([*wanted, *others])
    entries = []
    for template, numbers in mine.items():
        if numbers == {()}:
            entries.append(template)
            continue
        for choice in _choices(numbers, alike[template]):
            pieces = [re.escape(piece) for piece in template.split("#")]
            full = "".join(map("".join, zip(pieces, [*choice, ""], strict=True)))
            head = re.escape(template.split("#")[0].removesuffix(".").rpartition(".")[0] + ".")
            short = r".*\b" + full.removeprefix(head)
            loose = any(re.match(short + "$", module) for module in others)
            entries.append(f"re:^{full}$" if loose else f"re:{short}$")
    missed = [module for module in wanted if not any(_matches(module, e) for e in entries)]
    caught = [module for module in others if any(_matches(module, e) for e in entries)]
    if missed or caught:
        raise ValueError(f"patterns {entries} miss {missed} and catch {caught}")
    return entries


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def _by_template(modules: Iterable[str]) -> dict[str, set[tuple[str, ...]]]:
    """Return name with `#` for its numbers -> the numbers it occurs with."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for module in modules:
        found.setdefault(_NUMBER.sub("#", module), set()).add(tuple(_NUMBER.findall(module)))
    return found


def _choices(mine: set[tuple[str, ...]], alike: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return regex parts, one per number, that together match `mine` among `alike`."""
    if mine == alike:
        return [(r"\d+",) * len(next(iter(mine)))]
    if len(next(iter(mine))) == 1:
        return [(_choice({head for (head,) in mine}, {head for (head,) in alike}),)]
    heads: dict[tuple[tuple[str, ...], ...], set[str]] = {}
    for head in {numbers[0] for numbers in mine}:
        rest = _choices(_tails(mine, head), _tails(alike, head))
        heads.setdefault(tuple(rest), set()).add(head)
    known = {numbers[0] for numbers in alike}
    return [
        (_choice(same, known), *tail) for tails, same in sorted(heads.items()) for tail in tails
    ]


def _tails(numbers: set[tuple[str, ...]], head: str) -> set[tuple[str, ...]]:
    return {entry[1:] for entry in numbers if entry[0] == head}


def _choice(wanted: set[str], known: set[str]) -> str:
    """Return a regex for `wanted` among `known` numbers, by what it names or what it leaves out."""
    if wanted == known:
        return r"\d+"
    rest = known - wanted
    few = wanted if len(wanted) <= len(rest) else rest
    listed = "|".join(sorted(few, key=int))
    listed = f"(?:{listed})" if len(few) > 1 else listed
    return listed if few is wanted else rf"(?!{listed}\.)\d+"


def _weights(scheme: Scheme) -> dict[str, Any]:
    channel = scheme.group_size == -1
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else scheme.group_size,
        "dynamic": False,
    }


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:")


def _is_class(entry: str) -> bool:
    return entry == "Linear"


def _is_name(entry: str) -> bool:
    return not _is_pattern(entry) and not _is_class(entry)


def _matches(module: str, entry: str) -> bool:
    """Match as compressed-tensors does: patterns from the start, names whole, `Linear` always."""
    if _is_pattern(entry):
        return re.match(entry.removeprefix("re:"), module) is not None
    return entry in (module, "Linear")

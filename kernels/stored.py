"""Which quantized weights of a checkpoint can stay packed, and their codes.

Kernels multiply with codes, and exports write them elsewhere; both ask here. What has to be dense
is given with its reason.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable

import torch

from unicomp.errors import CheckpointError
from unicomp.kernels import bitnet
from unicomp.kernels import format as formats
from unicomp.kernels.dense import DenseSource
from unicomp.kernels.formats.compressed_tensors import CompressedTensors, find_group
from unicomp.kernels.formats.gptq import Gptq
from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.models import ARCHITECTURES


class Stored:
    """Sorts the quantized weights of a checkpoint into packed and dense, and reads the packed.

    linears   names of the weights that stay packed, but for experts
    mixtures  `<layer>.<experts>.gate_up_proj`, the first of the two parameters that transformers
              has for a layer's experts -> (gate, up, down) names of each, where all stay packed
    dense     reason -> how many are dequantized for it
    coded     names of all whose codes can be read, experts included
    """

    def __init__(self, source: DenseSource) -> None:
        self.checkpoint = source.checkpoint
        config = self.checkpoint.config
        self.config = config.get("quantization_config") or config.get("compression_config") or {}
        row = ARCHITECTURES.get(str(config.get("model_type")))
        self.conv1d = row is not None and row.conv1d
        self.experts = None if row is None else row.experts
        self.shapes = {name: source.tensors[name].shape for name in source.readers}
        method = self.config.get("quant_method")
        self.format = None
        if method in formats.formats():
            self.format = formats.find(method).reading(self.config)
        self.bitnet = method == bitnet.METHOD
        reasons = {name: self._refusal(name) for name in source.readers}
        taken = {name for name, reason in reasons.items() if reason is None}
        self.coded = frozenset(taken)
        self.mixtures = self._mixtures(source.tensors, taken)
        inside = {name for all_ in self.mixtures.values() for names in all_ for name in names}
        for name in taken - inside:
            if ".experts." in name:
                reasons[name] = "experts are 3-D parameters, and not all of the layer's are packed"
        self.linears = [
            name for name, reason in reasons.items() if reason is None and name not in inside
        ]
        self.dense = dict(Counter(reason for reason in reasons.values() if reason is not None))

    @property
    def any(self) -> bool:
        """Whether a weight stays packed."""
        return bool(self.linears or self.mixtures)

    def shape_of_experts(self, mixture: str) -> tuple[int, int, int]:
        """Return experts, hidden and inner width of a mixture."""
        members = self.mixtures[mixture]
        inner, hidden = self.shapes[members[0][0]]
        return len(members), hidden, inner

    def _mixtures(
        self, names: Iterable[str], taken: Collection[str]
    ) -> dict[str, list[tuple[str, ...]]]:
        if self.experts is None:
            return {}
        inside = rf"(.+)\.{re.escape(self.experts.disk)}\.(\d+)\.\w+\.weight"
        found: dict[str, set[int]] = {}
        for name in names:
            if place := re.fullmatch(inside, name):
                found.setdefault(place[1], set()).add(int(place[2]))
        mixtures = {}
        for layer, numbers in found.items():
            root = f"{layer}.{self.experts.disk}"
            members = [
                tuple(f"{root}.{number}.{own}.weight" for own in self.experts.names)
                for number in range(len(numbers))
            ]
            whole = all(name in taken for member in members for name in member)
            shapes = {tuple(self.shapes[name] for name in member) for member in members if whole}
            if len(shapes) == 1:
                mixtures[f"{layer}.{self.experts.path}.gate_up_proj"] = members
        return mixtures

    def read(self, name: str) -> PackedTensor:
        """Return the codes, scales and zero points of a weight, with checked shapes and values."""
        module = name.removesuffix(".weight")
        if self.bitnet:
            codes = bitnet.unpack(self.checkpoint.read(name))
            factor = bitnet.factor(self.checkpoint.read(f"{name}_scale"), self.config)
            if not bool(factor.isfinite().all()):
                raise self._broken(module, "scales are NaN or infinite")
            scale = factor.expand(codes.shape[0], 1).contiguous()
            return PackedTensor(codes, scale, None, Scheme(2, -1))
        if self.format is None:
            raise ValueError(f"`{name}` is not packed")
        scheme = self.format.scheme(self.config, module)
        if scheme is None:
            raise ValueError(f"`{name}` is not packed")
        shape = self._shape(name)
        found = self.format.unpack(module, self.checkpoint.read, shape, scheme)
        grid = (shape[0], scheme.groups(shape[1]))
        zero = found.zero_point
        shapes = [found.scale.shape] if zero is None else [found.scale.shape, zero.shape]
        if any(tuple(own) != grid for own in shapes):
            raise self._broken(module, f"scales or zero points are not {list(grid)}")
        low, high = scheme.code_range
        if zero is not None and (int(zero.min()) < low or int(zero.max()) > high):
            raise self._broken(module, f"zero points are not within {low}..{high}")
        if not bool(found.scale.isfinite().all()):
            raise self._broken(module, "scales are NaN or infinite")
        return found

    def _shape(self, name: str) -> tuple[int, int]:
        rows, columns = self.shapes[name]
        return (columns, rows) if self.conv1d else (rows, columns)

    def _refusal(self, name: str) -> str | None:
        """Say why a weight has to be dense; None: kernels take it."""
        module = name.removesuffix(".weight")
        if self.bitnet:
            return None
        if isinstance(self.format, Gptq):
            return self._gptq(module, name)
        if isinstance(self.format, CompressedTensors):
            return self._compressed(module, self.format)
        return f"`{self.config.get('quant_method')}` has no codes that kernels take"

    def _gptq(self, module: str, name: str) -> str | None:
        scheme = Gptq().scheme(self.config, module)
        order = f"{module}.g_idx"
        if scheme is None or order not in self.checkpoint.tensors:
            return None
        columns = self._shape(name)[1]
        size = columns if scheme.group_size == -1 else scheme.group_size
        sorted_ = torch.arange(columns) // size
        same = torch.equal(self.checkpoint.read(order).long(), sorted_)
        return None if same else "its columns are in another order than their groups"

    def _compressed(self, module: str, own: CompressedTensors) -> str | None:
        tensors = self.checkpoint.tensors
        group = find_group(self.config, module)
        weights = {} if group is None else group.get("weights") or {}
        if f"{module}.weight_packed" not in tensors or weights.get("type", "int") != "int":
            return "it is not stored as packed integers"
        if not weights:
            return "no target of its `quantization_config` names it"
        if not 2 <= weights["num_bits"] <= 8:
            return f"kernels take 2 to 8 bits, not {weights['num_bits']}"
        if f"{module}.weight_g_idx" in tensors:
            return "its columns are in another order than their groups"
        down = (weights.get("block_structure") or [1, 1])[0]
        whole = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
        if whole == "tensor" or self.conv1d != bool(own.tallest) or (down != 1 and not self.conv1d):
            return "rows share scales"
        version = re.match(r"(\d+)\.(\d+)", str(self.config.get("version", "")))
        dated = version is not None and (int(version[1]), int(version[2])) < (0, 18)
        if dated and 32 % weights["num_bits"]:  # words held whole codes then
            return "its words are those of compressed-tensors before 0.18"
        return None

    def _broken(self, module: str, what: str) -> CheckpointError:
        shards = {
            info.shard
            for name, info in self.checkpoint.tensors.items()
            if name.rpartition(".")[0] == module
        }
        files = ", ".join(f"`{self.checkpoint.folder / shard}`" for shard in sorted(shards))
        return CheckpointError(
            f"{files}: `{module}`: {what}",
            hint="the file is damaged, or its `quantization_config` is another model's",
        )

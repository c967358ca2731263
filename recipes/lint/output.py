"""What a loader will find in an output: its config, and every linear as it is stored.

A plan says what it will write, and a folder is there: both are a config.json and the names, dtypes
and shapes of tensors, so that the same rules speak of both. Of a folder, only what is 16 bytes a
linear is read besides: `weight_shape`, and the scale of a ternary weight.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnsupportedError
from unicomp.hub import Source
from unicomp.kernels import format as formats
from unicomp.kernels.packed import Scheme
from unicomp.models import ARCHITECTURES

HEADS = ("lm_head", "embed_out")
# What makes a module's tensors codes: suffix -> the quant_method that writes it.
PACKED = {"weight_packed": "compressed-tensors", "qweight": "gptq"}
# What only the dropped sparse formats of compressed-tensors have.
SPARSE = ("compressed", "bitmask", "row_offsets", "scale_packed", "meta")


class Shaped(Protocol):
    """A tensor's header."""

    @property
    def dtype(self) -> str:
        """As safetensors names it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One linear as it is stored.

    shape   (out, in) of the weight, as far as the file says
    packed  its tensors are codes; False: a plain weight
    scheme  what the config says of it; None: that it is plain
    way     the config's own words for it: the `weights` of its group, or the whole config
    codes   shape of the codes; None where it is plain
    scales  shape of the scales
    scale   the value of a single scale, where it was read
    """

    module: str
    shape: tuple[int, int]
    packed: bool
    scheme: Scheme | None
    way: Mapping[str, Any] = field(default_factory=dict)
    codes: tuple[int, ...] | None = None
    scales: tuple[int, ...] | None = None
    scale: float | None = None

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.module.rpartition(".")[2]

    @property
    def parent(self) -> str:
        """Its name without the last part."""
        return self.module.rpartition(".")[0]

    @property
    def expert(self) -> bool:
        """It belongs to one expert of many."""
        return ".experts." in self.module


@dataclass(frozen=True)
class Output:
    """A checkpoint as a loader finds it.

    tensors  name -> dtype and shape
    known    module -> (out, in), where more is known than tensors show
    scales   module -> the value of a ternary weight's scale, where it was read
    gguf     it is what a GGUF file was unpacked to
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Shaped]
    known: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    gguf: bool = False

    @cached_property
    def quantization(self) -> Mapping[str, Any]:
        """The `quantization_config`; empty where there is none."""
        found = self.config.get("quantization_config") or self.config.get("compression_config")
        return found if isinstance(found, Mapping) else {}

    @property
    def method(self) -> str | None:
        """The `quant_method`; None: weights are plain."""
        return str(self.quantization["quant_method"]) if self.quantization else None

    @property
    def tied(self) -> bool:
        """The head shares the embedding's weight."""
        return bool(self.config.get("tie_word_embeddings"))

    @property
    def transposed(self) -> bool:
        """Linears are Conv1D, stored [in, out]."""
        row = ARCHITECTURES.get(str(self.config.get("model_type")))
        return row is not None and row.conv1d

    @cached_property
    def linears(self) -> tuple[Stored, ...]:
        """Every linear: what is packed, and every plain matrix that a loader may fuse or cut.

        In the order of layers, whatever that of the tensors in plan or file.
        """
        return tuple(sorted(self._linears(), key=lambda one: numbered(one.module)))

    @property
    def packed(self) -> Iterator[Stored]:
        """The linears whose tensors are codes."""
        return (one for one in self.linears if one.packed)

    def _linears(self) -> Iterator[Stored]:
        for name, tensor in self.tensors.items():
            module, _, suffix = name.rpartition(".")
            if suffix in PACKED:
                yield self._codes(module, tensor, PACKED[suffix])
            elif suffix == "weight" and len(tensor.shape) == 2:
                ternary = tensor.dtype == "U8" and self.method == "bitnet"
                yield self._ternary(module, tensor) if ternary else self._plain(module, tensor)

    def _codes(self, module: str, tensor: Shaped, writer: str) -> Stored:
        way = self._way(module)
        scheme = self._scheme(module)
        bits = 4 if scheme is None else scheme.bits
        rows, columns = (*tensor.shape, 0)[:2]
        shape = (rows, columns * 32 // bits)
        scales = self.tensors.get(f"{module}.weight_scale")
        if writer == "gptq":
            order = self.tensors.get(f"{module}.g_idx")
            shape = (columns, order.shape[0] if order is not None else rows * 32 // bits)
            scales = self.tensors.get(f"{module}.scales")
        shape = self.known.get(module, shape)
        found = None if scales is None else scales.shape
        return Stored(module, shape, True, scheme, way, tensor.shape, found)

    def _ternary(self, module: str, tensor: Shaped) -> Stored:
        scales = self.tensors.get(f"{module}.weight_scale")
        return Stored(
            module,
            self.known.get(module, (4 * tensor.shape[0], tensor.shape[1])),
            True,
            Scheme(2, -1),
            self.quantization,
            tensor.shape,
            None if scales is None else scales.shape,
            self.scales.get(module),
        )

    def _plain(self, module: str, tensor: Shaped) -> Stored:
        rows, columns = tensor.shape
        shape = (columns, rows) if self.transposed else (rows, columns)
        return Stored(module, shape, False, self._scheme(module), self._way(module))

    def _way(self, module: str) -> Mapping[str, Any]:
        if self.method != "compressed-tensors":
            return self.quantization
        from unicomp.kernels.formats.compressed_tensors import find_group

        return (find_group(self.quantization, module) or {}).get("weights") or {}

    def _scheme(self, module: str) -> Scheme | None:
        if self.method not in PACKED.values():
            return None
        try:
            return formats.find(str(self.method)).scheme(self.quantization, module)
        except (UnsupportedError, KeyError, TypeError):
            return None  # codes of another kind than ours: rules of the config speak of them


def numbered(name: str) -> list[tuple[int, str]]:
    """Return what puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def of_source(source: Source) -> Output:
    """Return what a model holds; CheckpointError where it is no whole checkpoint."""
    found = of_checkpoint(Checkpoint.open(source.folder))
    return replace(found, gguf=source.id.endswith(".gguf"))


def of_checkpoint(checkpoint: Checkpoint) -> Output:
    """Return what an opened checkpoint holds."""
    tensors = checkpoint.tensors
    known: dict[str, tuple[int, int]] = {}
    scales: dict[str, float] = {}
    for name, info in tensors.items():
        module, _, suffix = name.rpartition(".")
        if suffix == "weight_shape" and info.shape == (2,):
            first, second = (int(size) for size in checkpoint.read(name))
            known[module] = (first, second)
        elif suffix == "weight_scale" and info.shape == (1,):
            scales[module] = float(checkpoint.read(name).float())
    found = Output(checkpoint.config, tensors, known, scales)
    if not found.transposed:
        return found
    turned = {module: (out, columns) for module, (columns, out) in known.items()}
    return Output(checkpoint.config, tensors, turned, scales)

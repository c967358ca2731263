"""Plain weights, whatever a checkpoint is quantized with.

`open_dense` shows a checkpoint as if it had never been quantized: the same names and shapes that
the plain model has, each weight dequantized when it is read, rows by rows where asked. What it
cannot read rightly it refuses by name. Dequantization is loud: `notes` goes into the manifest,
since an error that was made before stays in whatever is made of these weights.

    compressed-tensors  pack-quantized, int-, naive- and float-quantized; groups, channels, blocks
    gptq                versions 1 and 2, 2, 3, 4 and 8 bits, any g_idx
    fp8                 blocks with `weight_scale_inv`, as DeepSeek-V3 writes them
    bitnet              transformers' ternary weights, packed offline, both classes of linears
    mxfp4               gpt-oss experts: `*_blocks`, `*_scales`; arXiv:2310.10537 for the values

All arithmetic is float32 with one rounding to the dtype of the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unicomp.checkpoint import DTYPES, TORCH_NAMES, Checkpoint
from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.kernels import bitnet
from unicomp.kernels.formats.compressed_tensors import find_group
from unicomp.kernels.formats.gptq import BITS, Gptq
from unicomp.kernels.packed import unpack_words, words
from unicomp.later import torch
from unicomp.models import ARCHITECTURES
from unicomp.writer import Meta

if TYPE_CHECKING:
    from torch import Tensor

Reader = Callable[[int, int], "Tensor"]
"""Reads rows start..stop of a weight."""


@dataclass(frozen=True, slots=True)
class DenseSource:
    """The plain tensors of a checkpoint.

    config   config.json without its `quantization_config`
    tensors  by name, in the order of the checkpoint; dtype and shape of what `read` returns
    notes    what the user must hear: how the weights were quantized before
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    tensors: Mapping[str, Meta]
    notes: tuple[str, ...]
    readers: Mapping[str, Reader]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read one tensor, or rows of it (a part of dimension 0, step 1)."""
        reader = self.readers.get(name)
        if reader is None:
            return self.checkpoint.read(name, rows)
        start, stop, step = (rows or slice(None)).indices(self.tensors[name].shape[0])
        if step != 1:
            raise ValueError(f"rows {rows} of `{name}`")
        return reader(start, max(start, stop))


def open_dense(checkpoint: Checkpoint, *, dtype: str | None = None) -> DenseSource:
    """Show a checkpoint's weights dense.

    dtype  of dequantized weights, as safetensors names it; default: the model's own, from
           config.json, else bfloat16. Weights that are stored plain keep theirs.

    Raises UnsupportedError, naming the method and the file, for a quantization that is not read
    here, and CheckpointError where tensors and config do not fit each other.
    """
    config = dict(checkpoint.config)
    quantization = config.pop("quantization_config", None) or config.pop("compression_config", None)
    if quantization is None:
        tensors = {
            info.name: Meta(info.name, info.dtype, info.shape)
            for info in checkpoint.tensors.values()
        }
        return DenseSource(checkpoint, config, tensors, (), {})
    path = checkpoint.folder / "config.json"
    method = str(quantization.get("quant_method") if isinstance(quantization, dict) else None)
    if method not in _FAMILIES:
        known = ", ".join(f"`{name}`" for name in _FAMILIES)
        raise UnsupportedError(
            f"`{path}`: weights quantized by `{method}` cannot be read",
            hint=f"start from the unquantized model; of quantized ones {known} can be read",
        )
    family = _FAMILIES[method](checkpoint, quantization, dtype or _own_dtype(config))
    try:
        family.find()
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"`{path}`: `quantization_config` is not what `{method}` writes: {error!r}",
            hint="take config.json from the original checkpoint",
        ) from error
    tensors = {}
    for info in checkpoint.tensors.values():
        for meta in family.instead.get(info.name, [Meta(info.name, info.dtype, info.shape)]):
            tensors[meta.name] = meta
    return DenseSource(checkpoint, config, tensors, (family.note(),), family.readers)


def _own_dtype(config: Mapping[str, Any]) -> str:
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return next((name for name in ("F32", "F16", "BF16") if TORCH_NAMES[name] == named), "BF16")


class _Family:
    """One way of quantizing: finds its weights in the headers and makes a reader for each.

    instead  stored tensor -> what is shown in its place; an empty list hides it
    """

    def __init__(self, checkpoint: Checkpoint, config: dict[str, Any], dtype: str) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.dtype = dtype
        self.instead: dict[str, list[Meta]] = {}
        self.readers: dict[str, Reader] = {}
        self.seen: dict[str, int] = {}

    def find(self) -> None:
        """Fill `instead` and `readers`."""
        raise NotImplementedError

    def note(self) -> str:
        """Say what was found, for the user."""
        method = self.config["quant_method"]
        ways = ", ".join(f"{count} of {way}" for way, count in self.seen.items()) or "none"
        kind = TORCH_NAMES[self.dtype]
        return (
            f"the model is already quantized ({method}; weights: {ways}): they are dequantized to "
            f"{kind} first, and their error stays in the result"
        )

    def show(
        self, name: str, shape: tuple[int, ...], reader: Reader, stored: list[str], way: str
    ) -> None:
        """Show a dense weight in the place of the tensors that store it."""
        self.seen[way] = self.seen.get(way, 0) + 1
        for tensor in stored:
            self.instead[tensor] = []
        self.instead[stored[0]] = [Meta(name, self.dtype, shape)]
        self.readers[name] = reader

    def hide(self, pattern: str) -> None:
        """Hide tensors that only quantized inference needs."""
        for name in self.checkpoint.tensors:
            if re.search(pattern, name):
                self.instead.setdefault(name, [])

    def shape(self, name: str, like: str, *wanted: tuple[int, ...]) -> tuple[int, ...]:
        """Return a stored tensor's shape, which must be one of those wanted, where any is."""
        info = self.checkpoint.tensors.get(name)
        if info is None:
            raise CheckpointError(
                f"`{self.checkpoint.folder}`: tensor `{name}` is missing beside `{like}`",
                hint="download the checkpoint again",
            )
        if wanted and info.shape not in wanted:
            listed = " or ".join(str(list(shape)) for shape in wanted)
            raise CheckpointError(
                f"`{self.checkpoint.folder / info.shard}`: `{name}` has shape {list(info.shape)}, "
                f"which does not fit `{like}`: expected {listed}",
                hint="config.json's quantization_config may be another model's",
            )
        return info.shape

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a stored tensor."""
        return self.checkpoint.read(name, rows)

    def optional(self, name: str) -> str:
        """Return the name if the tensor is there, else nothing."""
        return name if name in self.checkpoint.tensors else ""

    def unsupported(self, what: str) -> UnsupportedError:
        """Return the refusal of something in this quantization."""
        return UnsupportedError(
            f"`{self.checkpoint.folder / 'config.json'}`: {what} cannot be read "
            f"(quant_method `{self.config.get('quant_method')}`)",
            hint="start from the unquantized model",
        )


class _CompressedTensors(_Family):
    """Weights in the formats of compressed-tensors that hold integers or 8-bit floats."""

    def find(self) -> None:
        for key in ("sparsity_config", "transform_config"):
            section = self.config.get(key) or {}
            if section.get("config_groups") or section.get("format") not in (None, "dense"):
                raise self.unsupported(f"`{key}`")
        for name in list(self.checkpoint.tensors):
            if name.endswith(".weight_packed"):
                self._packed(name.removesuffix(".weight_packed"))
            elif name.endswith(".weight_scale"):
                module = name.removesuffix(".weight_scale")
                if f"{module}.weight_packed" not in self.checkpoint.tensors:
                    self._plain(module)
        self.hide(r"\.(input|output|k|v|q)_(scale|zero_point)$")

    def _packed(self, module: str) -> None:
        weights = self._weights(module, "pack-quantized")
        bits = weights["num_bits"]
        if bits not in range(1, 9) or weights.get("type", "int") != "int":
            raise self.unsupported(f"`{module}` packed in {bits} bits of {weights.get('type')}")
        stored = self.shape(f"{module}.weight_packed", module)
        self.shape(f"{module}.weight_shape", module, (2,))
        rows, columns = map(int, self.read(f"{module}.weight_shape").tolist())
        old = self._straddles(bits)
        across = -(-columns // (32 // bits)) if old else words(columns, bits)
        if columns < 1 or stored != (rows, across):
            raise CheckpointError(
                f"`{self.checkpoint.folder}`: `{module}.weight_packed` has shape {list(stored)}, "
                f"which does not hold a weight [{rows}, {columns}] of {bits} bits",
                hint="the file is damaged, or its `quantization_config` is another model's",
            )

        def codes(start: int, stop: int) -> Tensor:
            packed = self.read(f"{module}.weight_packed", slice(start, stop))
            return _unpack(packed, bits, columns, old)

        names = ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"]
        self._add(module, weights, (rows, columns), codes, [*names, "weight_g_idx"], old)

    def _straddles(self, bits: int) -> bool:
        """Say whether the file has the layout before 0.18, without codes across words."""
        version = re.match(r"(\d+)\.(\d+)", str(self.config.get("version", "")))
        dated = version is not None and (int(version[1]), int(version[2])) < (0, 18)
        return dated and 32 % bits != 0

    def _plain(self, module: str) -> None:
        """Find a weight that is stored under its own name, as int8 or as 8-bit floats."""
        weights = self._weights(
            module, "int-quantized", "naive-quantized", "float-quantized", "dense"
        )
        shape = self.shape(f"{module}.weight", f"{module}.weight_scale")
        kind = self.checkpoint.tensors[f"{module}.weight"].dtype
        if kind not in ("I8", "F8_E4M3", "F8_E5M2") or len(shape) != 2:
            raise self.unsupported(f"`{module}.weight` of dtype {kind} and shape {list(shape)}")

        def values(start: int, stop: int) -> Tensor:
            return self.read(f"{module}.weight", slice(start, stop))

        names = ["weight", "weight_scale", "weight_zero_point", "weight_g_idx"]
        self._add(module, weights, (shape[0], shape[1]), values, names, False)

    def _weights(self, module: str, *formats: str) -> Mapping[str, Any]:
        groups = list(self.config.get("config_groups", {}).values())
        group = find_group(self.config, module)
        if group is None and len(groups) == 1:
            group = groups[0]  # names of experts on disk need not be those of the loaded model
        if group is None or not group.get("weights"):
            raise CheckpointError(
                f"`{self.checkpoint.folder}`: `{module}` is stored quantized, and no entry of "
                "`quantization_config` says how",
                hint="config.json may be another model's",
            )
        stored = group.get("format") or self.config.get("format")
        if stored not in formats:
            raise self.unsupported(f"format `{stored}` of `{module}`")
        found: Mapping[str, Any] = group["weights"]
        return found

    def _add(
        self,
        module: str,
        weights: Mapping[str, Any],
        shape: tuple[int, int],
        values: Reader,
        names: list[str],
        old: bool,
    ) -> None:
        rows, columns = shape
        down, along = self._block(weights, shape)
        grid = (-(-rows // down), -(-columns // along))
        flat = ((), (1,), grid) if grid == (1, 1) else (grid,)
        self.shape(f"{module}.weight_scale", module, *flat)
        shift = not weights.get("symmetric", True)
        zeros = f"{module}.weight_zero_point"
        bits = weights["num_bits"]
        if shift:
            height = -(-rows // (32 // bits)) if old else words(rows, bits)
            self.shape(zeros, module, *flat, (height, grid[1]))
        order = (
            f"{module}.weight_g_idx" if f"{module}.weight_g_idx" in self.checkpoint.tensors else ""
        )
        if order:
            self.shape(order, module, (columns,))

        def read(start: int, stop: int) -> Tensor:
            weight = values(start, stop).float()
            upper, lower = start // down, max(-(-stop // down), start // down)
            scale = self.read(f"{module}.weight_scale").reshape(grid)[upper:lower]
            zero = None
            if shift:
                stored = self.read(zeros)
                if stored.dtype == torch.int32:
                    stored = _unpack(stored.T.contiguous(), bits, rows, old).T
                zero = stored.reshape(grid)[upper:lower]
            place = torch.arange(start, stop) // down - upper
            group = None
            if order:
                index = self.read(order)
                group = index.long() if int(index.min()) >= 0 else None  # -1: never filled in
            dense = _scaled(weight, scale, zero, place, along, group)
            if self.config.get("dequantize") or ".experts." in module:
                # These transformers 5 dequantizes before it converts: in the scale's own dtype.
                dense = dense.to(scale.dtype)
            return dense.to(DTYPES[self.dtype])

        present = [f"{module}.{name}" for name in names]
        present = [name for name in present if name in self.checkpoint.tensors]
        kind = "floats" if weights.get("type") == "float" else "bits"
        size = weights.get("group_size") or weights.get("block_structure") or "none"
        way = f"{bits} {kind}, {weights.get('strategy')}"
        way += f" {size}" if weights.get("strategy") in ("group", "block") else ""
        self.show(f"{module}.weight", shape, read, present, way)

    def _block(self, weights: Mapping[str, Any], shape: tuple[int, int]) -> tuple[int, int]:
        """Return the rows and columns that share a scale."""
        strategy = weights.get("strategy")
        size = int(weights.get("group_size") or 0)
        if strategy == "block":
            down, along = weights["block_structure"]
            return int(down), int(along)
        if size > 0 and strategy in ("group", None):
            return 1, size
        if strategy == "channel" or (strategy is None and size == -1):
            return 1, shape[1]
        if strategy in ("tensor", None):
            return shape
        raise self.unsupported(f"strategy `{strategy}`")


class _Gptq(_Family):
    """Weights as AutoGPTQ and GPTQModel write them."""

    def find(self) -> None:
        stored = self.config.get("checkpoint_format") or self.config.get("format") or "gptq"
        if stored not in ("gptq", "gptq_v2"):
            raise self.unsupported(f"checkpoint_format `{stored}`")
        if self.config.get("pack_dtype", "int32") != "int32":
            raise self.unsupported(f"pack_dtype `{self.config['pack_dtype']}`")
        layout = Gptq(v2=stored == "gptq_v2")
        for name in list(self.checkpoint.tensors):
            if name.endswith(".qweight"):
                self._weight(name.removesuffix(".qweight"), layout)

    def _weight(self, module: str, layout: Gptq) -> None:
        scheme = layout.scheme(self.config, module)
        if scheme is None:
            raise CheckpointError(
                f"`{self.checkpoint.folder}`: `{module}` is stored quantized, and "
                "`quantization_config` leaves it out under `dynamic`",
                hint="config.json may be another model's",
            )
        bits = scheme.bits
        if bits not in BITS:
            raise self.unsupported(f"gptq with {bits} bits")
        if bits == 3 and not layout.v2 and not scheme.symmetric:
            raise self.unsupported("asymmetric 3-bit gptq of version 1 (no two tools agree on it)")
        height, out = self.shape(f"{module}.qweight", module)
        order = self.optional(f"{module}.g_idx")
        columns = self.shape(order, module)[0] if order else height * 32 // bits
        self.shape(f"{module}.qweight", module, (words(columns, bits), out))
        groups = self.shape(f"{module}.scales", module)[0]
        self.shape(f"{module}.scales", module, (groups, out))
        self.shape(f"{module}.qzeros", module, (groups, words(out, bits)))
        size = columns if scheme.group_size == -1 else scheme.group_size

        def read(start: int, stop: int) -> Tensor:
            packed = self.read(f"{module}.qweight")[:, start:stop].T.contiguous()
            weight = unpack_words(packed, bits, columns).float()
            scale = self.read(f"{module}.scales").T[start:stop]
            zero = None
            if not scheme.symmetric:
                zeros = layout.zero_points(self.read(f"{module}.qzeros"), bits, out)
                zero = zeros[start:stop]
            group = self.read(order).long() if order else None
            if group is not None and (int(group.min()) < 0 or int(group.max()) >= groups):
                raise CheckpointError(
                    f"`{self.checkpoint.folder}`: `{order}` names groups outside 0..{groups - 1}",
                    hint="the file is damaged: download it again",
                )
            dense = _scaled(weight, scale, zero, torch.arange(stop - start), size, group)
            return dense.to(DTYPES[self.dtype])

        row = ARCHITECTURES.get(str(self.checkpoint.config.get("model_type")))
        shape: tuple[int, int] = (out, columns)
        reader: Reader = read
        if row is not None and row.conv1d:
            shape, reader = (columns, out), _transposed(read, out)
        present = [f"{module}.{name}" for name in ("qweight", "qzeros", "scales", "g_idx")]
        present = [name for name in present if name in self.checkpoint.tensors]
        self.show(f"{module}.weight", shape, reader, present, f"{bits} bits, group {size}")


class _BitNet(_Family):
    """Ternary weights with one scale each; what their activations are rounded to is not undone."""

    def find(self) -> None:
        if self.config.get("use_rms_norm"):
            raise self.unsupported("`use_rms_norm`")
        if self.config.get("linear_class", "bitlinear") not in bitnet.CLASSES:
            raise self.unsupported(f"linear_class `{self.config['linear_class']}`")
        for name in list(self.checkpoint.tensors):
            if name.endswith(".weight_scale"):
                self._weight(name.removesuffix("_scale"), name)
        if not self.readers:
            raise self.unsupported("a file without packed weights (quantization_mode `online`)")

    def _weight(self, weight: str, scales: str) -> None:
        shape = self.shape(weight, scales)
        kind = self.checkpoint.tensors[weight].dtype
        if kind != "U8" or len(shape) != 2:
            raise self.unsupported(f"`{weight}` of dtype {kind} and shape {list(shape)}")
        self.shape(scales, weight, (1,), ())

        def read(start: int, stop: int) -> Tensor:
            codes = bitnet.unpack(self.read(weight))[start:stop]
            scale = bitnet.factor(self.read(scales), self.config)
            return (codes.float() * scale).to(DTYPES[self.dtype])

        self.show(weight, (4 * shape[0], shape[1]), read, [weight, scales], "ternary, one scale")


class _Fp8(_Family):
    """8-bit floats with a scale for every block, stored as its inverse by name but a factor."""

    def find(self) -> None:
        for name, info in self.checkpoint.tensors.items():
            if not name.endswith("_scale_inv"):
                continue
            weight = name.removesuffix("_scale_inv")
            shape = self.shape(weight, name)
            kind = self.checkpoint.tensors[weight].dtype
            if kind != "F8_E4M3" or len(shape) != 2:
                raise self.unsupported(f"`{weight}` of dtype {kind} and shape {list(shape)}")
            self._weight(weight, (shape[0], shape[1]), name, info.dtype)
        left = [
            name
            for name, info in self.checkpoint.tensors.items()
            if info.dtype.startswith("F8_E4M3") and name not in self.instead
        ]
        if left:
            raise CheckpointError(
                f"`{self.checkpoint.folder}`: `{left[0]}` is stored in 8 bits without a "
                "`_scale_inv` beside it",
                hint="download the checkpoint again",
            )
        self.hide(r"\.(activation|input)_scale$")

    def _weight(self, weight: str, shape: tuple[int, int], scales: str, kind: str) -> None:
        size = self.config.get("weight_block_size")
        down, along = size or shape
        grid = (-(-shape[0] // down), -(-shape[1] // along))
        self.shape(scales, weight, *(((), (1,), grid) if grid == (1, 1) else (grid,)))

        def read(start: int, stop: int) -> Tensor:
            values = self.read(weight, slice(start, stop)).float()
            scale = self.read(scales).reshape(grid)
            if kind == "U8":  # the exponent alone, biased by 127
                scale = torch.exp2(scale.float() - 127)
            place = torch.arange(start, stop) // down
            return _scaled(values, scale, None, place, along, None).to(DTYPES[self.dtype])

        way = f"8-bit floats, blocks {down}x{along}" if size else "8-bit floats, one scale"
        self.show(weight, shape, read, [weight, scales], way)


class _Mxfp4(_Family):
    """Experts of 4-bit floats (e2m1) in blocks of 32 with a power of two, transposed on disk."""

    def find(self) -> None:
        for name in list(self.checkpoint.tensors):
            if name.endswith("_blocks"):
                self._experts(name.removesuffix("_blocks"))

    def _experts(self, weight: str) -> None:
        blocks, scales = f"{weight}_blocks", f"{weight}_scales"
        stored = self.shape(blocks, blocks)
        if len(stored) != 4 or stored[3] != 16 or self.checkpoint.tensors[blocks].dtype != "U8":
            raise self.unsupported(f"`{blocks}` of shape {list(stored)}")
        experts, out, groups, _ = stored
        self.shape(scales, blocks, (experts, out, groups))

        def read(start: int, stop: int) -> Tensor:
            parts = [self._expert(blocks, scales, index) for index in range(start, stop)]
            empty = torch.empty((0, groups * 32, out), dtype=DTYPES[self.dtype])
            return torch.stack(parts) if parts else empty

        shape = (experts, groups * 32, out)
        self.show(weight, shape, read, [blocks, scales], "4-bit floats, blocks of 32")

    def _expert(self, blocks: str, scales: str, index: int) -> Tensor:
        pairs = self.read(blocks, slice(index, index + 1))[0]
        power = self.read(scales, slice(index, index + 1))[0].float() - 127
        codes = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2).int()
        values = torch.tensor(_E2M1)[codes] * torch.exp2(power)[..., None]
        return values.flatten(-2).T.contiguous().to(DTYPES[self.dtype])


_E2M1 = [sign * v for sign in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]
"""Value of every 4-bit float: a sign, two bits of exponent, one of mantissa."""

_FAMILIES: Mapping[str, type[_Family]] = {
    "compressed-tensors": _CompressedTensors,
    "gptq": _Gptq,
    "bitnet": _BitNet,
    "fp8": _Fp8,
    "mxfp4": _Mxfp4,
}


def _scaled(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    place: Tensor,
    along: int,
    group: Tensor | None,
) -> Tensor:
    """Return (weight - zero) * scale in float32; `weight` is used up.

    weight  float32 [rows, columns]
    scale   [down, across], and zero likewise
    place   int64 [rows], the scale's row for each
    along   columns that share a scale, unless `group`, int64 [columns], gives each its own
    """
    rows, columns = weight.shape
    if group is None and columns % along == 0:
        blocks = weight.view(rows, columns // along, along)
        if zero is not None:
            blocks -= zero.float()[place][:, :, None]
        blocks *= scale.float()[place][:, :, None]
        return weight
    if group is None:
        group = torch.arange(columns) // along
    if zero is not None:
        weight -= zero.float()[place][:, group]
    weight *= scale.float()[place][:, group]
    return weight


def _unpack(packed: Tensor, bits: int, count: int, old: bool) -> Tensor:
    """Return signed codes from words: dense ones, or those of compressed-tensors before 0.18.

    Before, a word held as many whole codes as fit, and its top bits stayed empty.
    """
    if not old:
        return unpack_words(packed, bits, count)
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    codes = (packed[..., None] >> shifts) & ((1 << bits) - 1)
    return (codes.flatten(-2)[:, :count] - (1 << (bits - 1))).to(torch.int8)


def _transposed(read: Reader, rows: int) -> Reader:
    """Return a reader of the transposed weight: all of it is read for any part."""
    return lambda start, stop: read(0, rows).T[start:stop].contiguous()

"""The model that is trained: read from a checkpoint, written back in the layout it came in.

What the checkpoint stores plain is trained in float32 and rounded to its dtype at the end. What it
stores packed is trained through its rounding (`straight_through.py`), and packed again by the
format that it was read with, so that the new files hold exactly what was trained. A weight with as
many zeros as a pruned one keeps them.

The names on disk must be those of the transformers model, up to its prefix, but for experts
(`experts.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unicomp.checkpoint import DTYPES, Checkpoint
from unicomp.compress.distill.training.experts import separate
from unicomp.compress.distill.training.straight_through import (
    Quantized,
    Scales,
    attach,
    quantizers,
)
from unicomp.errors import UnsupportedError
from unicomp.kernels import format as formats
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.kernels.format import Format
from unicomp.kernels.load import build
from unicomp.kernels.packed import PackedTensor
from unicomp.models import ARCHITECTURES

PRUNED = 0.05  # share of zeros from which on they are meant, as in `quantize`


@dataclass(frozen=True, slots=True)
class Student:
    """A model in training.

    model    float32, in training mode
    source   its plain tensors as they were
    places   name of a plain weight -> path of its module or parameter in the model
    packed   module on disk -> path in the model, of those that are packed
    layout   the format that packs them; None: nothing is packed
    adapters the model with low-rank adapters, where only these are trained
    """

    model: PreTrainedModel
    source: DenseSource
    places: dict[str, str]
    packed: dict[str, str]
    layout: Format | None
    adapters: Any | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The files that it was read from."""
        return self.source.checkpoint

    def read_packed(self, module: str) -> PackedTensor:
        """Return the codes and scales of a packed weight as they were before training."""
        return _read(self.source, self.layout, module)

    @torch.no_grad()
    def settle(self) -> None:
        """Add adapters to their weights, and round plain parameters to the dtype they have."""
        if self.adapters is not None:
            self.adapters.merge_and_unload()
        parameters = _parameters(self.model)
        done = set(self.packed)
        for name, path in self.places.items():
            if name.removesuffix(".weight") not in done:
                value = parameters[path]
                value.copy_(value.to(DTYPES[self.source.tensors[name].dtype]))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the checkpoint as it is stored after training."""
        parameters = _parameters(self.model)
        rounded = quantizers(self.model)
        stored = set()
        for module, path in self.packed.items():
            quantized, shadow = rounded[path]
            if self.layout is None:
                raise ValueError("packed weights without a format")
            packed = quantized.packed(shadow)
            parts = self.layout.pack(module, packed)
            zero, place = packed.zero_point, f"{module}.weight_zero_point"
            words = zero is not None and parts[place].dtype == torch.int32
            if zero is not None and words and self.checkpoint.tensors[place].dtype == "I8":
                parts[place] = zero  # stored one by one, not in words
            stored |= set(parts)
            yield from parts.items()
        for name, info in self.checkpoint.tensors.items():
            if name in stored:
                continue
            if name in self.places:
                value = parameters[self.places[name]].detach()
                yield name, value.to(DTYPES[info.dtype])
            else:
                yield name, self.checkpoint.read(name)


def open_student(
    checkpoint: Checkpoint, *, scales: Scales = "learned", teacher: DenseSource | None = None
) -> Student:
    """Read a student for training.

    scales   of packed weights: learned, or of ternary ones the mean magnitude of their group
    teacher  where it is given, and has a weight of the same shape, the shadows of packed weights
             begin with the teacher's values; else with what their codes stand for

    Raises UnsupportedError for a checkpoint whose weights cannot be told apart in the model.
    """
    source = open_dense(checkpoint, dtype="F32")
    model = build(source, dtype=torch.float32)
    layout = layout_of(source)
    places = _places(model, source)
    student = Student(model, source, places, {}, layout)
    for name in source.readers:
        module = name.removesuffix(".weight")
        path = places[name].removesuffix(".weight")
        linear = model.get_submodule(path)
        quantized, start = shadowed(source, layout, module, scales, teacher)
        attach(linear, quantized, start)
        student.packed[module] = path
    _keep_zeros(model, places, student)
    model.train()
    return student


def layout_of(source: DenseSource) -> Format | None:
    """Return the format that packs a student's weights; None where none is packed.

    Raises UnsupportedError for a quantization that is not trained.
    """
    if not source.readers:
        return None
    config = source.checkpoint.config.get("quantization_config") or {}
    method = config.get("quant_method")
    if method not in formats.formats():
        raise UnsupportedError(
            f"a student quantized by `{method}` cannot be trained",
            hint="start from one that unicomp packed, or from the plain model",
        )
    return formats.find(method).reading(config)


def shadowed(
    source: DenseSource,
    layout: Format | None,
    module: str,
    scales: Scales,
    teacher: DenseSource | None,
) -> tuple[Quantized, Tensor]:
    """Return what a packed weight is trained through, and its shadow, float32 [out, in].

    Raises UnsupportedError where it is not made of codes in groups.
    """
    packed = _read(source, layout, module)
    quantized = Quantized(
        packed,
        codes=_codes(packed),
        scales=scales if _ternary(packed) else "learned",
        keep_zeros=not _ternary(packed) and _sparse(packed.codes),
        transposed=_transposed(source),
    )
    name = f"{module}.weight"
    if teacher is None or not _alike(teacher, name, source):
        return quantized, packed.dequantize()
    start = teacher.read(name).float()
    return quantized, start.T if _transposed(source) else start


def _alike(teacher: DenseSource, name: str, like: DenseSource) -> bool:
    found = teacher.tensors.get(name)
    return found is not None and tuple(found.shape) == tuple(like.tensors[name].shape)


def _transposed(source: DenseSource) -> bool:
    """Tell whether the model holds the weights of its linears [in, out]."""
    row = ARCHITECTURES.get(str(source.config["model_type"]))
    return row is not None and row.conv1d


def _read(source: DenseSource, layout: Format | None, module: str) -> PackedTensor:
    config = source.checkpoint.config.get("quantization_config") or {}
    scheme = None if layout is None else layout.scheme(config, module)
    if layout is None or scheme is None:
        raise UnsupportedError(
            f"`{module}` is quantized in a way that cannot be trained",
            hint="start from codes of 2 to 8 bits in groups, or from the plain model",
        )
    rows, columns = source.tensors[f"{module}.weight"].shape
    if _transposed(source):
        rows, columns = columns, rows
    return layout.unpack(module, source.checkpoint.read, (rows, columns), scheme)


def _ternary(packed: PackedTensor) -> bool:
    """Tell whether two-bit codes leave out -2, as those of ternary weights do."""
    plain = packed.scheme.bits == 2 and packed.zero_point is None
    return plain and int(packed.codes.min()) > packed.scheme.code_range[0]


def _codes(packed: PackedTensor) -> tuple[int, int]:
    return (-1, 1) if _ternary(packed) else packed.scheme.code_range


def _sparse(values: Tensor) -> bool:
    """Tell whether zeros are in a pattern: half of four neighbours, or a share that was made."""
    return float((values == 0).float().mean()) >= 0.4


def _places(model: nn.Module, source: DenseSource) -> dict[str, str]:
    """Return name on disk -> name of the model's parameter; all of the model's must be found."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    found = separate(model, source)
    parameters = _parameters(model)
    for name, meta in source.tensors.items():
        for path in (name, prefix + name, name.removeprefix(prefix)):
            if name in found:
                break
            if path in parameters and tuple(parameters[path].shape) == tuple(meta.shape):
                found[name] = path
    named = {id(parameters[path]) for path in found.values()}
    lost = [path for path, value in parameters.items() if id(value) not in named]
    if lost:
        raise UnsupportedError(
            f"cannot train weights of `{source.config['model_type']}`: the model's parameter "
            f"`{lost[0]}` has no tensor of its own in the checkpoint",
            hint="distillation takes models whose weights are stored one by one",
        )
    return found


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters, by the names that they have without parametrizations."""
    found = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        if name.endswith(".factor"):
            continue
        found[name.replace("parametrizations.weight.original", "weight")] = value
    return found


def _keep_zeros(model: nn.Module, places: dict[str, str], student: Student) -> None:
    """Let zeros of pruned plain linears have no gradient: they then stay zero."""
    parameters = _parameters(model)
    for name, path in places.items():
        value = parameters[path]
        module = model.get_submodule(path.rpartition(".")[0]) if path.endswith(".weight") else None
        if name.removesuffix(".weight") in student.packed:
            continue
        if not isinstance(module, nn.Linear | Conv1D) or value.dim() != 2:
            continue
        keep_zeros(value)


def keep_zeros(weight: nn.Parameter) -> None:
    """Let the zeros of a weight that has as many as a pruned one have no gradient."""
    if float((weight == 0).float().mean()) >= PRUNED:
        weight.register_hook(_masked(weight.detach() != 0))


def _masked(kept: Tensor) -> Any:
    return lambda gradient: gradient * kept

"""What a checkpoint holds, from its headers only: weights by kind, how each is stored, bytes.

A weight may be stored as several tensors (codes, scales, zero points); it is counted once, under
the name and with the shape that it has when dense.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod

from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnsupportedError
from unicomp.kernels import format as formats
from unicomp.kernels.dense import open_dense
from unicomp.kernels.packed import Scheme
from unicomp.models import ARCHITECTURES, Model, TensorShape, describe


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight as the model sees it.

    kind    embedding, linear, expert, head, norm, bias, router; other where that is not known
    shape   when dense
    scheme  how it is quantized, in one of our formats, else None
    dtypes  of the tensors that store it, sorted, as safetensors names them
    bytes   of those tensors
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    dtypes: tuple[str, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Inventory:
    """Everything that the headers show.

    params        parameters of the dense model; None where the quantization is not ours to read
    tied          whether the head is the embedding; None where the architecture is not known
    quantization  config.json's `quant_method`, else None
    """

    weights: tuple[Weight, ...]
    params: int | None
    bytes: int
    tied: bool | None
    quantization: str | None


def take(checkpoint: Checkpoint) -> Inventory:
    """Work out what a checkpoint holds; a quantization that we cannot read shows as stored."""
    shapes: Mapping[str, TensorShape] = checkpoint.tensors
    known = False
    with suppress(UnsupportedError):
        shapes, known = open_dense(checkpoint).tensors, True
    config = checkpoint.config
    model = None
    if known and config["model_type"] in ARCHITECTURES:
        model = describe(config, shapes)
    kinds = {} if model is None else _kinds(model)
    schemes = _schemes(checkpoint, shapes)
    weights = []
    for name, (size, dtypes) in _stored(checkpoint, shapes).items():
        shape = tuple(shapes[name].shape)
        kind = kinds.get(name, "other")
        weights.append(Weight(name, kind, shape, schemes.get(name), dtypes, size))
    return Inventory(
        weights=tuple(weights),
        params=sum(prod(weight.shape) for weight in weights) if known else None,
        bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        tied=None if model is None else model.tied,
        quantization=(config.get("quantization_config") or {}).get("quant_method"),
    )


def _kinds(model: Model) -> dict[str, str]:
    kinds = dict(model.roles)
    for linear in model.linears():
        kinds[linear.part.tensor] = "linear" if linear.expert is None else "expert"
    return kinds


def _stored(
    checkpoint: Checkpoint, shapes: Mapping[str, TensorShape]
) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Return weight -> bytes and dtypes of the tensors that store it."""
    parts: dict[str, list[str]] = {}
    for name in checkpoint.tensors:
        if name not in shapes:
            parts.setdefault(name.rpartition(".")[0], []).append(name)
    found = {}
    for name in shapes:
        own = [name] if name in checkpoint.tensors else []
        infos = [checkpoint.tensors[n] for n in own + parts.get(name.removesuffix(".weight"), [])]
        dtypes = tuple(sorted({info.dtype for info in infos}))
        found[name] = (sum(info.nbytes for info in infos), dtypes)
    return found


def _schemes(checkpoint: Checkpoint, shapes: Mapping[str, TensorShape]) -> dict[str, Scheme]:
    """Return the scheme of every weight that is stored in one of our formats."""
    config = checkpoint.config.get("quantization_config") or {}
    if config.get("quant_method") not in formats.formats():
        return {}
    layout = formats.find(config["quant_method"])
    found = {}
    for name in shapes:
        if name in checkpoint.tensors or not name.endswith(".weight"):
            continue
        scheme = layout.scheme(config, name.removesuffix(".weight"))
        if scheme is not None:
            found[name] = scheme
    return found

"""A checkpoint -> a transformers model that runs on its packed weights.

transformers makes the module tree and places what is not quantized, as in `load.py`. Every weight
that kernels can multiply with is first a placeholder, one zero seen at every place, so that its
module is found by whatever name transformers gives it; then the module makes way for a
`PackedLinear`, one weight after the other: read, laid out in panels, dropped. The dense model is
never in memory, and a file of N bytes takes little more than N to load.

What no kernel takes is dequantized, as `load.py` does it, and `Loaded` says which and why:

* experts of a layer of which not all are packed: transformers holds them as two 3-D parameters
* 8- and 4-bit floats, columns in another order than their groups (`g_idx`), scales that several
  rows share, words of compressed-tensors before 0.18
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unicomp import hub, machine
from unicomp.checkpoint import DTYPES, Checkpoint
from unicomp.errors import UnsupportedError
from unicomp.kernels import attention
from unicomp.kernels import backend as backends
from unicomp.kernels.blocked import Compute
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.kernels.linear import DenseLinear, PackedLinear, check_compute
from unicomp.kernels.load import build
from unicomp.kernels.norm import RMSNorm
from unicomp.kernels.packed_experts import PackedExperts
from unicomp.kernels.stored import Stored
from unicomp.writer import Meta

FREED_MAX = 64 << 20
"""Bytes of codes that loading frees before it sees to it that the system has them back."""
FEW_TOKENS = 4
"""Up to as many at once, torch's operators are too short for more than one thread."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """How a model was loaded, for reports.

    id            of the checkpoint, as in a record
    backend       what multiplies packed weights; None: no weight is packed
    isa           the instruction set of the C extension, where that is what multiplies
    missing       why the C extension is not there, if it is not
    packed        linears that are packed
    packed_bytes  bytes of their panels
    dequantized   reason -> how many quantized weights are dense for it
    seconds       the loading took
    """

    id: str
    dtype: str
    compute: Compute
    backend: str | None
    isa: str | None
    missing: str | None
    packed: int
    packed_bytes: int
    dequantized: Mapping[str, int]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return all of it for a JSON result."""
        return asdict(self)


def load(
    path: str | Path,
    *,
    device: str | None = None,
    backend: str | None = None,
    compute: Compute = "int8",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a model whose quantized linears stay packed, in evaluation mode.

    path     a folder, a Hub id `org/name[@revision]`, or `builtin:NAME`
    device   where to compute; packed weights run on `cpu`, the default
    backend  of `kernels/backend.py`; default: `UNICOMP_BACKEND`, else the best there is
    compute  `int8` rounds activations per token and group; `exact` leaves them as they are
    dtype    of activations and of all that is not packed; default: the model's own

    An unquantized checkpoint loads as it is. How it was loaded: `loaded(model)`.

    Raises CheckpointError, naming file and tensor, for a checkpoint that is broken, and
    UnsupportedError for a device, backend or dtype that there is not.
    """
    began = time.monotonic()
    check_compute(compute)
    source = hub.resolve(str(path))
    checkpoint = Checkpoint.open(source.folder)
    kind = dtype or _own_dtype(checkpoint)
    name = next((name for name, own in DTYPES.items() if own == kind), None)
    if name not in ("F32", "F16", "BF16"):
        raise UnsupportedError(f"a model cannot be loaded as {kind}", hint="use bfloat16")
    target = torch.device(device or "cpu").type
    dense = open_dense(checkpoint, dtype=name)
    stored = Stored(dense)
    chosen = backends.choose(backend, target) if stored.any or target != "cpu" else None
    zeros = {name: torch.zeros((), dtype=kind) for name in [*stored.linears, *stored.mixtures]}
    network = build(_with_placeholders(dense, stored, zeros), dtype=kind)

    freed = 0

    def packed(name: str, bias: Tensor | None) -> PackedLinear:
        nonlocal freed
        found = PackedLinear.from_packed(stored.read(name), bias, compute=compute, backend=chosen)
        freed += found.in_features * found.out_features
        if freed > FREED_MAX:
            freed = 0
            machine.return_freed_memory()
        return found

    places = _places(network, zeros)
    if places and kind == torch.bfloat16:  # before there are panels: a weight may move
        for place, other in list(network.named_modules()):
            if type(other) is nn.Linear and place not in places.values():
                network.set_submodule(place, DenseLinear.of(other))
    for name, place in places.items():
        old: Any = network.get_submodule(place)
        new: nn.Module
        if name in stored.mixtures:
            members = [[packed(own, None) for own in names] for names in stored.mixtures[name]]
            new = PackedExperts(members, old.act_fn)
        else:
            new = packed(name, old.bias)
        network.set_submodule(place, new.eval())
    layers = [own for own in network.modules() if isinstance(own, PackedLinear)]
    known: Any = network  # attributes that its class does not declare
    if layers and network.config._attn_implementation == "sdpa":
        network.set_attn_implementation(attention.NAME)
    if chosen == "cpu" and layers:
        for place, other in list(network.named_modules()):
            if (norm := RMSNorm.of(other)) is not None:
                network.set_submodule(place, norm)
        network.register_forward_pre_hook(_begin_step, with_kwargs=True)
        network.register_forward_hook(_end_step, always_call=True)
    if layers:
        known.save_pretrained = _refuse_saving
    known.unicomp_loaded = Loaded(
        id=source.id,
        dtype=str(kind).removeprefix("torch."),
        compute=compute,
        backend=chosen,
        isa=None if chosen is None else backends.isa(chosen),
        missing=None if chosen is None else backends.missing(),
        packed=len(layers),
        packed_bytes=sum(own.packed.numel() for own in layers),
        dequantized=stored.dense,
        seconds=time.monotonic() - began,
    )
    return network


def _begin_step(model: nn.Module, args: tuple[Any, ...], words: dict[str, Any]) -> None:
    """Before a step of a few tokens, let torch compute on one thread: see `cpu.take_cores`."""
    given = args[0] if args else words.get("input_ids", words.get("inputs_embeds"))
    if torch.compiler.is_compiling() or not isinstance(given, Tensor):
        return
    if given.shape[:2].numel() <= FEW_TOKENS:
        backends.take_cores()


def _end_step(*_: object) -> None:
    if not torch.compiler.is_compiling():
        backends.return_cores()


def loaded(model: nn.Module) -> Loaded:
    """Return how a model was loaded; ValueError if it did not come from `load`."""
    found = getattr(model, "unicomp_loaded", None)
    if not isinstance(found, Loaded):
        raise ValueError("this model was not loaded by unicomp")
    return found


def _with_placeholders(
    source: DenseSource, stored: Stored, zeros: Mapping[str, Tensor]
) -> DenseSource:
    """Return a source that reads one zero, expanded, for each of these weights and mixtures.

    Experts are shown as the two parameters that transformers holds, or it would stack them.
    """
    readers, tensors = dict(source.readers), dict(source.tensors)

    def show(name: str, shape: tuple[int, ...], zero: Tensor) -> None:
        tensors[name] = Meta(name, "F32", shape)
        readers[name] = partial(_expanded, zero.expand(shape))

    for name in stored.linears:
        show(name, source.tensors[name].shape, zeros[name])
    for name, members in stored.mixtures.items():
        for own in (own for member in members for own in member):
            del tensors[own], readers[own]
        count, hidden, inner = stored.shape_of_experts(name)
        show(name, (count, 2 * inner, hidden), zeros[name])
        down = name.removesuffix("gate_up_proj") + "down_proj"
        show(down, (count, hidden, inner), torch.zeros_like(zeros[name]))
    return replace(source, readers=readers, tensors=tensors)


def _expanded(zeros: Tensor, start: int, stop: int) -> Tensor:
    return zeros[start:stop]


def _places(model: PreTrainedModel, zeros: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name -> the module that holds its placeholder, in the order of the model."""
    names = {zero.data_ptr(): name for name, zero in zeros.items()}
    found = {}
    for path, module in model.named_modules():
        linear = isinstance(module, nn.Linear | Conv1D)
        weight = getattr(module, "weight" if linear else "gate_up_proj", None)
        if isinstance(weight, Tensor) and weight.data_ptr() in names:
            found[names[weight.data_ptr()]] = path
    for name in zeros:
        if name not in found:
            raise UnsupportedError(
                f"`{name}` is packed, and the model keeps it in no module of its own",
                hint="load it dense, with transformers",
            )
    return found


def _own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the dtype that config.json names, else that of the first tensor of floats."""
    config = checkpoint.config
    named = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    stored = [info.dtype for info in checkpoint.tensors.values()]
    kinds = [name for name, own in DTYPES.items() if str(own) == f"torch.{named}"] + stored
    plain = [name for name in kinds if name in ("F32", "F16", "BF16")]
    return DTYPES[plain[0]] if plain else torch.bfloat16


def _refuse_saving(*_: object, **__: object) -> None:
    raise UnsupportedError(
        "a model that runs packed cannot be saved by transformers",
        hint="copy the checkpoint's folder, or save the model's `state_dict`",
    )

"""Which tensors are which: decoder layers, linears, experts, embeddings, norms and ties.

One row of `ARCHITECTURES` describes a model type: where its decoder layers are, and the linears of
a layer in the order in which they compute, those that read the same input side by side. Everything
else (calibration, plans, formats) works from this table and from tensor names and shapes; nothing
here loads a weight or imports torch. A weight is `[out, in]` everywhere in unicomp; only GPT-2's
`Conv1D` stores `[in, out]`, and only this file and the reader of a layer know it.

Differs: transformers 5 keeps experts as 3-D parameters in memory while most files hold one 2-D
tensor per expert; unicomp speaks of one 2-D linear per expert, whatever the file holds.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

from unicomp.errors import CheckpointError, UnsupportedError


class TensorShape(Protocol):
    """What this file needs to know of a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape as stored."""


Steps = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of a mixture-of-experts layer.

    path      the module that holds them in the transformers model, inside a layer
    disk      the same on disk
    names     (gate, up, down) of one expert on disk: `<disk>.<index>.<name>.weight`
    router    the module that picks experts, inside a layer; one row an expert
    """

    path: str
    disk: str
    names: tuple[str, str, str]
    router: str


@dataclass(frozen=True, slots=True)
class Architecture:
    """One model type.

    layers    module path of the decoder layers in the causal model
    steps     the linears of a layer in order of computation; a step's linears share one input.
              Steps come in pairs: what the first of a pair gives reaches the rest of the layer only
              through what the second reads
    experts   the experts, which replace the last two steps in layers that have them
    disk      (module, disk) name pairs where a file names a part of a layer otherwise
    conv1d    weights are stored [in, out]
    legacy    tensors that old files hold and no model wants
    """

    layers: str
    steps: Steps
    experts: Experts | None = None
    disk: tuple[tuple[str, str], ...] = ()
    conv1d: bool = False
    legacy: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA: Steps = (
    _QKV,
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_PHI3: Steps = (
    ("self_attn.qkv_proj",),
    ("self_attn.o_proj",),
    ("mlp.gate_up_proj",),
    ("mlp.down_proj",),
)
_GPT2: Steps = (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",))
_NEOX: Steps = (
    ("attention.query_key_value",),
    ("attention.dense",),
    ("mlp.dense_h_to_4h",),
    ("mlp.dense_4h_to_h",),
)
_OPT: Steps = (_QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",))
_LAYERS = "model.layers"

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(_LAYERS, _LLAMA),
    "mistral": Architecture(_LAYERS, _LLAMA),
    "qwen2": Architecture(_LAYERS, _LLAMA),
    "qwen3": Architecture(_LAYERS, _LLAMA),
    "gemma2": Architecture(_LAYERS, _LLAMA),
    "gemma3_text": Architecture(_LAYERS, _LLAMA),
    "olmo2": Architecture(_LAYERS, _LLAMA),
    "phi3": Architecture(_LAYERS, _PHI3),
    "gpt2": Architecture(
        "transformer.h",
        _GPT2,
        conv1d=True,
        legacy=(r"\.attn\.bias$", r"\.attn\.masked_bias$"),
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        _NEOX,
        legacy=(r"\.attention\.(bias|masked_bias)$", r"\.rotary_emb\.inv_freq$"),
    ),
    "opt": Architecture("model.decoder.layers", _OPT),
    "mixtral": Architecture(
        _LAYERS,
        _LLAMA,
        experts=Experts("mlp.experts", "block_sparse_moe.experts", ("w1", "w3", "w2"), "mlp.gate"),
        disk=(("mlp.", "block_sparse_moe."),),
    ),
    "qwen3_moe": Architecture(
        _LAYERS,
        _LLAMA,
        experts=Experts(
            "mlp.experts", "mlp.experts", ("gate_proj", "up_proj", "down_proj"), "mlp.gate"
        ),
    ),
}


class Part(NamedTuple):
    """Where on disk a weight lies: a whole tensor, or rows of one expert of a 3-D tensor.

    tensor  name on disk
    expert  index in the first dimension of a 3-D tensor, else None
    rows    rows inside that expert's matrix, else None
    """

    tensor: str
    expert: int | None = None
    rows: tuple[int, int] | None = None


class Linear(NamedTuple):
    """One linear of a decoder layer.

    module      its name in a checkpoint, without `.weight`
    inner       its name inside the layer as calibration runs it (experts as separate linears)
    shape       (out, in)
    part        where its weight is read from
    transposed  stored [in, out]
    expert      index of its expert, else None
    """

    module: str
    inner: str
    shape: tuple[int, int]
    part: Part
    transposed: bool = False
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer.

    steps   in order of computation; in a step, each inner tuple shares one input
    others  inner parameter name -> where it is read from, for all that is no linear (norms,
            biases, routers)
    """

    index: int
    steps: tuple[tuple[tuple[Linear, ...], ...], ...]
    others: Mapping[str, Part]

    def linears(self) -> Iterator[Linear]:
        """Yield every linear, in order of computation."""
        for step in self.steps:
            for shared in step:
                yield from shared


@dataclass(frozen=True, slots=True)
class Model:
    """A causal language model as its checkpoint names it.

    type    config.json's model_type
    layers  the decoder layers
    names   name on disk -> name in the output, for every tensor that is no linear of a layer
    roles   the same names on disk -> what the tensor is, in a word
    tied    lm_head shares the embedding's weight
    """

    type: str
    architecture: Architecture
    layers: tuple[Layer, ...]
    names: Mapping[str, str]
    roles: Mapping[str, str]
    tied: bool

    def linears(self) -> Iterator[Linear]:
        """Yield every linear of every layer, in order of computation."""
        for layer in self.layers:
            yield from layer.linears()


@dataclass(slots=True)
class _Names:
    """Finds tensors under the names that files give them."""

    tensors: Mapping[str, TensorShape]
    architecture: Architecture
    prefix: str
    places: dict[str, list[str]] = field(default_factory=dict)
    """number of a layer -> its tensors' names: a look through all of them for each is quadratic"""
    own: dict[str, str] = field(default_factory=dict)
    """name -> the same, the very string of `tensors`, of which there need not be two"""

    def __post_init__(self) -> None:
        inner = re.escape(self.architecture.layers.removeprefix(self.prefix))
        numbered = re.compile(rf"(?:{re.escape(self.prefix)})?{inner}\.(\d+)\.")
        for name in self.tensors:
            self.own[name] = name
            if found := numbered.match(name):
                self.places.setdefault(found[1], []).append(name)

    def disk(self, layer: int, inner: str) -> str:
        """Return the canonical checkpoint name of a part of a layer."""
        for module, disk in self.architecture.disk:
            if inner.startswith(module):
                inner = disk + inner.removeprefix(module)
        return f"{self.architecture.layers}.{layer}.{inner}"

    def find(self, canonical: str) -> str | None:
        """Return the name under which the file holds a canonical name, with or without prefix."""
        return self.own.get(canonical) or self.own.get(canonical.removeprefix(self.prefix))

    def need(self, canonical: str) -> str:
        """Return the same, or say that the tensor is missing."""
        found = self.find(canonical)
        if found is None:
            raise CheckpointError(
                f"tensor `{canonical}` is missing from the checkpoint",
                hint="config.json promises a layer or a linear that the weight files lack; "
                "download the checkpoint again, or mend `num_hidden_layers`",
            )
        return found


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the row of this config's model type.

    Raises UnsupportedError, naming the architecture, where there is none.
    """
    model_type = config.get("model_type")
    found = ARCHITECTURES.get(str(model_type))
    if found is None:
        classes = ", ".join(config.get("architectures") or []) or "no class named"
        raise UnsupportedError(
            f"unsupported architecture: model_type `{model_type}` ({classes})",
            hint="supported: " + ", ".join(sorted(ARCHITECTURES)),
        )
    return found


def describe(config: Mapping[str, Any], tensors: Mapping[str, TensorShape]) -> Model:
    """Work out what every tensor of a checkpoint is, from its config and its tensors' names.

    config   config.json
    tensors  name on disk -> anything with a `shape`

    Raises UnsupportedError for an unknown model type, CheckpointError for a missing tensor.
    """
    row = architecture(config)
    count = config.get("num_hidden_layers", config.get("n_layer"))
    if not isinstance(count, int) or count < 1:
        raise CheckpointError(
            f"config.json: `num_hidden_layers` should be a positive number, got `{count}`",
            hint="the config does not fit its model_type; take it from the original checkpoint",
        )
    names = _Names(tensors, row, prefix=row.layers.split(".")[0] + ".")
    layers = tuple(_layer(names, index) for index in range(count))
    legacy = re.compile("|".join(row.legacy))
    rest: dict[str, str] = {}
    roles: dict[str, str] = {}
    linear_tensors = {linear.part.tensor for layer in layers for linear in layer.linears()}
    for name in tensors:
        if name in linear_tensors or legacy.search(name):
            continue
        canonical = _canonical(name, names.prefix)
        rest[name] = canonical
        roles[name] = _role(canonical, row)
    head = any(role == "head" for role in roles.values())
    tied = bool(config.get("tie_word_embeddings", _TIED.get(str(config["model_type"]), not head)))
    return Model(str(config["model_type"]), row, layers, rest, roles, tied)


# What transformers assumes where config.json is silent about `tie_word_embeddings`.
_TIED = {"gpt2": True, "opt": True, "gemma2": True, "gemma3_text": True}
_HEADS = ("lm_head.", "embed_out.")


def _canonical(name: str, prefix: str) -> str:
    return name if name.startswith((prefix, *_HEADS)) else prefix + name


def _role(name: str, row: Architecture) -> str:
    if name.startswith(_HEADS):
        return "head"
    if name.endswith(".bias"):
        return "bias"
    if name.startswith(row.layers + "."):
        if re.search(r"norm|ln_\d", name):
            return "norm"
        return "router" if name.endswith("gate.weight") else "other"
    if re.search(r"norm|ln_f", name):
        return "norm"
    return "embedding"


def _layer(names: _Names, index: int) -> Layer:
    row = names.architecture
    root = f"{row.layers}.{index}."
    expert_steps = _expert_steps(names, index)
    plain = row.steps[:-2] if expert_steps else row.steps
    steps: list[tuple[tuple[Linear, ...], ...]] = [
        (tuple(_linear(names, index, inner) for inner in shared),) for shared in plain
    ]
    steps += expert_steps
    weights = {linear.part.tensor for step in steps for shared in step for linear in shared}
    legacy = re.compile("|".join(row.legacy))
    others: dict[str, Part] = {}
    for prefix in {root, root.removeprefix(names.prefix)}:
        for name in names.places.get(str(index), ()):
            if name.startswith(prefix) and name not in weights and not legacy.search(name):
                inner = name.removeprefix(prefix)
                for module, disk in row.disk:
                    if inner.startswith(disk):
                        inner = module + inner.removeprefix(disk)
                others[inner] = Part(name)
    return Layer(index, tuple(steps), others)


def _linear(names: _Names, index: int, inner: str) -> Linear:
    module = names.disk(index, inner)
    tensor = names.need(module + ".weight")
    shape = _two(tensor, names.tensors[tensor].shape)
    turned = names.architecture.conv1d
    return Linear(module, inner, shape[::-1] if turned else shape, Part(tensor), turned)


def _two(tensor: str, shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of a matrix, itself if it is a tuple: it is kept for every tensor."""
    if len(shape) != 2:
        raise CheckpointError(
            f"tensor `{tensor}` should have 2 dimensions, has shape {list(shape)}",
            hint="the weight files do not fit config.json's model_type",
        )
    return cast(tuple[int, int], tuple(shape))


def _expert_steps(names: _Names, index: int) -> list[tuple[tuple[Linear, ...], ...]]:
    """Return the two steps of a layer's experts: (gate, up) of each, then down of each."""
    experts = names.architecture.experts
    if experts is None:
        return []
    root = f"{names.architecture.layers}.{index}"
    gate, up, down = experts.names
    fused = names.find(f"{root}.{experts.path}.gate_up_proj")
    separate = names.find(f"{root}.{experts.disk}.0.{gate}.weight")
    if fused is None and separate is None:
        if names.find(f"{root}.mlp.down_proj.weight") is not None:
            return []  # a dense layer among sparse ones (qwen3_moe's mlp_only_layers)
        names.need(f"{root}.{experts.disk}.0.{gate}.weight")
    # A file in the layout of memory names the router as the model does.
    router = names.find(f"{root}.{experts.router}.weight")
    router = router or names.need(names.disk(index, experts.router) + ".weight")
    count = names.tensors[router].shape[0]
    first: list[tuple[Linear, ...]] = []
    second: list[tuple[Linear, ...]] = []
    for expert in range(count):

        def linear(name: str, stacked: str, half: int | None, expert: int = expert) -> Linear:
            module = f"{root}.{experts.disk}.{expert}.{name}"
            inner = sys.intern(f"{experts.path}.{expert}.{name}")  # the same in every layer
            if fused is None:
                tensor = names.need(module + ".weight")
                shape = _two(tensor, names.tensors[tensor].shape)
                return Linear(module, inner, shape, Part(tensor), expert=expert)
            tensor = names.need(f"{root}.{experts.path}.{stacked}")
            _, rows, columns = names.tensors[tensor].shape
            if half is None:
                return Linear(module, inner, (rows, columns), Part(tensor, expert), expert=expert)
            span = (half * rows // 2, (half + 1) * rows // 2)
            return Linear(
                module, inner, (rows // 2, columns), Part(tensor, expert, span), expert=expert
            )

        first.append((linear(gate, "gate_up_proj", 0), linear(up, "gate_up_proj", 1)))
        second.append((linear(down, "down_proj", None),))
    return [tuple(first), tuple(second)]


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens that a model was made to read at once; None: its config says none."""
    for part in (config, config.get("text_config") or {}):
        for name in ("max_position_embeddings", "n_positions"):
            if isinstance(part.get(name), int):
                return int(part[name])
    return None

"""Which axis of which tensor is what, so that a model can be made smaller along it.

Structured pruning keeps some hidden channels, FFN channels, heads, experts or layers. A dimension
of a tensor is one or several runs of such units: the rows of `q_proj` are heads of `head_dim` rows
each, those of phi3's `qkv_proj` are heads, then KV heads twice, those of a router are experts. What
stays of each axis then says what stays of every tensor, and the config says the new sizes; the
result is an ordinary checkpoint of the same architecture.

A query head belongs to a KV head; both are chosen so that every KV head keeps as many query heads.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.models import Layer, Linear, Model
from unicomp.writer import Meta


class Axis(StrEnum):
    """What can be made fewer inside a layer, or throughout the model (hidden)."""

    HIDDEN = "hidden"
    FFN = "ffn"
    HEADS = "heads"
    KV_HEADS = "kv_heads"
    EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Run:
    """Part of a dimension: every unit of an axis in order, `rows` rows each."""

    axis: Axis
    rows: int = 1


Dimension = tuple[Run, ...]
"""The runs that make up a dimension; empty: it stays as it is."""


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model.

    ffn         channels between the MLP's linears, of a dense layer
    expert_ffn  the same of an expert; 0 where there are none
    experts     of a layer; 0 where there are none
    head_dim    channels of a head; never cut
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int = 0
    expert_ffn: int = 0

    def to_json(self) -> dict[str, int]:
        """Return the sizes that this model has, by name."""
        names: tuple[str, ...] = ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim")
        names += ("experts", "expert_ffn") if self.experts else ()
        return {name: getattr(self, name) for name in names if getattr(self, name)}

    def size(self, axis: Axis, expert: bool = False) -> int:
        """Return how many units an axis has."""
        if axis is Axis.FFN and expert:
            return self.expert_ffn
        return int(getattr(self, axis.value))


@dataclass(frozen=True, slots=True)
class Place:
    """One stored tensor and what its dimensions are.

    layer   index of its layer, None outside
    expert  index of its expert where a file has a tensor for each; None otherwise
    stack   its first dimension is the experts, each with FFN channels of its own
    inside  of an expert: its FFN channels are an expert's
    """

    meta: Meta
    layer: int | None
    dims: tuple[Dimension, ...]
    expert: int | None = None
    stack: bool = False
    inside: bool = False

    def shape(self, sizes: Shape) -> tuple[int, ...]:
        """Return its shape in a model of these sizes."""
        return tuple(
            sum(sizes.size(run.axis, self.inside) * run.rows for run in dim) if dim else old
            for dim, old in zip(self.dims, self.meta.shape, strict=True)
        )


# The key of config.json for each size, the first that the model's type has.
_KEYS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "ffn": ("intermediate_size", "ffn_dim", "n_inner"),
    "experts": ("num_local_experts", "num_experts"),
    "expert_ffn": ("moe_intermediate_size", "intermediate_size"),
}
# In these `hidden / heads` is the size of a head, and no key of the config says otherwise.
FUSED_HEADS = frozenset({"gpt2", "gpt_neox", "opt"})
# In these the embedding is multiplied by the root of the hidden size, which follows the config.
ROOT_SCALED = frozenset({"gemma2", "gemma3_text"})
# In these what attention and MLP give is normed before it is added.
NORMED_AFTER = frozenset({"gemma2", "gemma3_text", "olmo2"})

# Stock transformers refuses a hidden size of these that the heads do not divide, head_dim or not.
DIVIDED = frozenset({"llama", "gemma2", "gemma3_text"})


class Axes:
    """The axes of one model's tensors, and its sizes."""

    def __init__(
        self, config: Mapping[str, Any], model: Model, tensors: Mapping[str, Meta]
    ) -> None:
        """Read the sizes.

        config  config.json, without any quantization_config

        Raises CheckpointError where the config does not say them.
        """
        self.config = config
        self.model = model
        self.tensors = tensors
        self.sizes = self._sizes()
        self.places = {place.meta.name: place for place in self._places()}
        # Layers that may be left out: all of the kind of which there are most. The others have
        # other sizes, and a plan says the parameters before it knows which layers go.
        kinds: dict[bool, list[int]] = {}
        for layer in model.layers:
            kinds.setdefault(routed(layer), []).append(layer.index)
        self.loose = max(kinds.values(), key=len)
        self._alike = self._groups()

    def key(self, size: str) -> str | None:
        """Return the config's key for a size; None: the model's type has none."""
        if size == "kv_heads" and self.model.type in FUSED_HEADS:
            return None
        if size == "ffn" and self.model.type == "gpt2":
            return "n_inner"
        return next((key for key in _KEYS[size] if key in self.config), None)

    def _number(self, size: str, otherwise: int | None = None) -> int:
        key = self.key(size)
        value = None if key is None else self.config[key]
        value = otherwise if value is None else value
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(
                f"config.json does not say the model's {size.replace('_', ' ')}",
                hint="take config.json from the original checkpoint",
            )
        return value

    def _sizes(self) -> Shape:
        layer = self.model.layers[0]
        if self.config.get("word_embed_proj_dim", None) not in (
            None,
            self.config.get("hidden_size"),
        ):
            raise UnsupportedError(
                "embeddings of another width (`word_embed_proj_dim`) than the layers cannot be cut",
                hint="quantize the model, or make zeros by `sparsegpt`",
            )
        hidden, heads = self._number("hidden"), self._number("heads")
        head_dim = layer.steps[1][0][0].shape[1] // heads
        dense = [one for one in self.model.layers if not routed(one)]
        sparse = [one for one in self.model.layers if routed(one)]
        return Shape(
            layers=len(self.model.layers),
            hidden=hidden,
            ffn=dense[0].steps[3][0][0].shape[1] if dense else 0,
            heads=heads,
            kv_heads=self._number("kv_heads", heads),
            head_dim=head_dim,
            experts=len(sparse[0].steps[3]) if sparse else 0,
            expert_ffn=sparse[0].steps[3][0][0].shape[1] if sparse else 0,
        )

    def _places(self) -> Iterator[Place]:
        """Yield every tensor; CheckpointError where one is not as the sizes say."""
        seen = set()
        for place in self._found():
            if place.meta.name in seen:
                continue
            seen.add(place.meta.name)
            if place.shape(self.sizes) != tuple(place.meta.shape):
                raise CheckpointError(
                    f"`{place.meta.name}` has shape {list(place.meta.shape)}, by config.json's "
                    f"sizes it should have {list(place.shape(self.sizes))}",
                    hint="layers of different sizes cannot be pruned by structure",
                )
            yield place

    def _found(self) -> Iterator[Place]:
        for layer in self.model.layers:
            for linear in layer.linears():
                yield self._linear(layer, linear)
            rows = {one.inner: self._rows(layer, one) for one in layer.linears()}
            for inner, part in layer.others.items():
                meta = self.tensors[part.tensor]
                yield Place(meta, layer.index, self._other(inner, meta, rows))
        for name in self.model.names:
            role, meta = self.model.roles[name], self.tensors[name]
            dims: list[Dimension] = [()] * len(meta.shape)
            if self.model.names[name].startswith(self.model.architecture.layers + "."):
                continue
            if role != "head" or len(meta.shape) == 2:  # all but the bias of a head
                dims[-1] = (Run(Axis.HIDDEN),)
            yield Place(meta, None, tuple(dims))

    def _linear(self, layer: Layer, linear: Linear) -> Place:
        meta = self.tensors[linear.part.tensor]
        rows, columns = self._rows(layer, linear), self._columns(layer, linear)
        if linear.part.expert is not None:
            both = rows if linear.part.rows is None else rows * 2
            dims: tuple[Dimension, ...] = ((Run(Axis.EXPERTS),), both, columns)
            return Place(meta, layer.index, dims, stack=True, inside=True)
        dims = (columns, rows) if linear.transposed else (rows, columns)
        inside = linear.expert is not None
        return Place(meta, layer.index, dims, linear.expert, inside=inside)

    def _step(self, layer: Layer, linear: Linear) -> int:
        return next(i for i, step in enumerate(layer.steps) for shared in step if linear in shared)

    def _rows(self, layer: Layer, linear: Linear) -> Dimension:
        step, dim = self._step(layer, linear), self.sizes.head_dim
        if step in (1, 3):
            return (Run(Axis.HIDDEN),)
        if step == 2:
            fused = linear.inner.endswith("gate_up_proj")
            return (Run(Axis.FFN),) * (2 if fused else 1)
        query, key = Run(Axis.HEADS, dim), Run(Axis.KV_HEADS, dim)
        leaf = linear.inner.rpartition(".")[2]
        if leaf == "query_key_value":
            return (Run(Axis.HEADS, 3 * dim),)
        if leaf in ("c_attn", "qkv_proj"):
            return (query, key, key)
        return (query,) if leaf == "q_proj" else (key,)

    def _columns(self, layer: Layer, linear: Linear) -> Dimension:
        step = self._step(layer, linear)
        if step == 1:
            return (Run(Axis.HEADS, self.sizes.head_dim),)
        return (Run(Axis.FFN),) if step == 3 else (Run(Axis.HIDDEN),)

    def _other(
        self, inner: str, meta: Meta, rows: Mapping[str, Dimension]
    ) -> tuple[Dimension, ...]:
        """Return the dimensions of what is no linear: biases, norms, the router."""
        owner, _, leaf = inner.rpartition(".")
        if leaf == "bias" and owner in rows:
            return (rows[owner],)
        experts = self.model.architecture.experts
        if experts is not None and owner == experts.router:
            return ((Run(Axis.EXPERTS),), (Run(Axis.HIDDEN),))
        if owner.endswith("q_norm") and meta.shape[0] == self.sizes.heads * self.sizes.head_dim:
            return (((Run(Axis.HEADS, self.sizes.head_dim)),),)
        width = self.sizes.kv_heads * self.sizes.head_dim
        if owner.endswith("k_norm") and meta.shape[0] == width != self.sizes.head_dim:
            return ((Run(Axis.KV_HEADS, self.sizes.head_dim),),)
        if owner.endswith(("q_norm", "k_norm")):
            return ((),)
        return ((Run(Axis.HIDDEN),),) if len(meta.shape) == 1 else ((),) * len(meta.shape)

    def fits(self, sizes: Shape) -> bool:
        """Tell whether stock transformers takes a model of this type with these sizes."""
        return self.model.type not in DIVIDED or sizes.hidden % sizes.heads == 0

    def check(self, sizes: Shape) -> None:
        """Refuse sizes that stock transformers would refuse to load."""
        if not self.fits(sizes):
            raise UnsupportedError(
                f"transformers takes no `{self.model.type}` whose {sizes.heads} heads do not "
                f"divide its {sizes.hidden} hidden channels",
                hint=f"use {sizes.hidden // sizes.heads * sizes.heads} hidden channels, or other "
                "heads",
            )

    def params(self, sizes: Shape) -> int:
        """Return the parameters of the model at these sizes: elements of all stored tensors."""
        return sum(count * math.prod(meta.shape) for count, meta, _ in self._tally(sizes))

    def nbytes(self, sizes: Shape) -> int:
        """Return the bytes of all tensors of the model at these sizes."""
        return sum(count * meta.nbytes for count, meta, _ in self._tally(sizes))

    def _tally(self, sizes: Shape) -> Iterator[tuple[int, Meta, bool]]:
        """Yield how many tensors are alike, one of them in the smaller model, and if experts'."""
        gone = self.sizes.layers - sizes.layers
        for place, (always, loose) in self._alike.items():
            count = always + loose // max(len(self.loose), 1) * (len(self.loose) - gone)
            if place.expert is not None:
                count = count // self.sizes.experts * sizes.experts
            yield count, place.meta._replace(shape=place.shape(sizes)), place.inside

    def _groups(self) -> dict[Place, tuple[int, int]]:
        """Return one of all tensors alike -> how many stand in layers that stay, and in others."""
        found: dict[Place, tuple[int, int]] = {}
        for place in self.places.values():
            expert = None if place.expert is None else 0
            one = replace(place, meta=place.meta._replace(name=""), layer=None, expert=expert)
            always, loose = found.get(one, (0, 0))
            free = place.layer in self.loose
            found[one] = (always + (not free), loose + free)
        return found

    def read_bytes(self, sizes: Shape) -> int:
        """Return the bytes that one token reads: all but the embedding, or it where tied.

        Of experts those that a token is sent to.
        """
        chosen = min(int(self.config.get("num_experts_per_tok") or 0), sizes.experts)
        experts = sum(n * meta.nbytes for n, meta, inside in self._tally(sizes) if inside)
        tables = 0
        for name, place in self.places.items():
            table = self.model.roles.get(name) == "embedding"
            if table and (not self.model.tied or "pos" in name or "wpe" in name):
                tables += place.meta._replace(shape=place.shape(sizes)).nbytes
        idle = experts - experts * chosen // max(sizes.experts, 1)
        return self.nbytes(sizes) - tables - idle

    def of_layer(self, layer: int) -> list[Place]:
        """Return the tensors of a layer."""
        return [place for place in self.places.values() if place.layer == layer]

    def some(self, count: int) -> tuple[int, ...]:
        """Return so many layers: those that must stay, and the first of the others."""
        loose, everything = self.loose, range(self.sizes.layers)
        extra = len(everything) - count
        gone = set(loose[len(loose) - extra :]) if extra else set()
        return tuple(layer for layer in everything if layer not in gone)

    def metas(self, sizes: Shape, kept: tuple[int, ...] | None = None) -> list[Meta]:
        """Return every tensor of the smaller model, in the order of the source."""
        layers = self.some(sizes.layers) if kept is None else kept
        numbers = {old: new for new, old in enumerate(layers)}
        found = []
        for name in self.tensors:
            place = self.places.get(name)
            if place is None or (place.layer is not None and place.layer not in numbers):
                continue
            if place.expert is not None and place.expert >= sizes.experts:
                continue
            new = name
            if place.layer is not None:
                new = renamed(name, place.layer, numbers[place.layer])
            found.append(Meta(new, place.meta.dtype, place.shape(sizes)))
        return found

    def rewritten(self, sizes: Shape, kept: tuple[int, ...]) -> dict[str, Any]:
        """Return config.json of the smaller model.

        kept  the layers that stay, as the source counts them
        """
        config = dict(self.config)
        for size in _KEYS:
            key = self.key(size)
            if key is not None and getattr(sizes, size) != getattr(self.sizes, size):
                config[key] = getattr(sizes, size)
        if "word_embed_proj_dim" in config:
            config["word_embed_proj_dim"] = sizes.hidden
        if self.model.type not in FUSED_HEADS:
            config["head_dim"] = sizes.head_dim
        if sizes.experts and sizes.experts < int(config.get("num_experts_per_tok") or 0):
            config["num_experts_per_tok"] = sizes.experts
        if len(kept) < self.sizes.layers:
            config |= _layer_lists(self.model, self.config, kept)
        return config


def routed(layer: Layer) -> bool:
    """Tell whether a layer has experts."""
    return layer.steps[-1][0][0].expert is not None


def renamed(name: str, old: int, new: int) -> str:
    """Return a tensor's name with another number for its layer."""
    return name.replace(f".{old}.", f".{new}.", 1) if f".{old}." in name else name


def _layer_lists(model: Model, config: Mapping[str, Any], kept: tuple[int, ...]) -> dict[str, Any]:
    """Return what config.json says of single layers, for those that stay."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("scale_attn_by_inverse_layer_idx"):
        raise UnsupportedError(
            "attention is scaled by the layer's number (`scale_attn_by_inverse_layer_idx`): "
            "layers cannot be left out",
            hint="prune by `width`",
        )
    settings = CONFIG_MAPPING[model.type].from_dict(dict(config))
    count = len(model.layers)
    found: dict[str, Any] = {}
    for key in {"layer_types", *(key for key in config if "layer" in key)}:
        value = getattr(settings, key, None)
        if isinstance(value, list) and len(value) == count and key != "mlp_only_layers":
            found[key] = [value[index] for index in kept]
    if "mlp_only_layers" in config:
        dense = [new for new, old in enumerate(kept) if not routed(model.layers[old])]
        found |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return found

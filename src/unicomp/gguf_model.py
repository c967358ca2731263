"""A model as a GGUF file names it: metadata, tensor names and the order of rows, both ways.

A GGUF file says of a model what `config.json` says, under keys that start with its architecture's
name, and calls each tensor otherwise. llama.cpp rotates neighbouring rows of a head's queries and
keys in its `llama` architecture where transformers rotates the two halves, so there the rows of q
and k lie in another order; in the others they do not.

`gguf_architectures.py` has a row for each model type: what llama.cpp computes for it is compared
with transformers by a test each.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.gguf_architectures import ROWS, STACKS, Row

_ELSE = {"num_key_value_heads": "num_attention_heads", "num_experts": "num_local_experts"}
"""Key of config.json -> the one to read where it is absent."""

_NO_WORD = {
    "opt": "llama.cpp has no architecture for it",
}
"""Model type that unicomp runs -> why it is not written."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint stands in a GGUF file.

    name    of the tensor there
    heads   heads whose rows change their order; 0: rows stay
    expert  index along the first dimension of a stack of experts, else None
    fused   heads whose q, k and v lie beside one another here, one after another there; 0: none
    shift   what is added to its values
    """

    name: str
    heads: int = 0
    expert: int | None = None
    fused: int = 0
    shift: float = 0.0

    def order(self, rows: int) -> list[int] | None:
        """Return, for each row in the file, its row in the checkpoint; None: they stay."""
        if self.heads:
            return row_order(rows, self.heads)
        if self.fused:
            size = rows // (3 * self.fused)
            return [
                (3 * head + part) * size + index
                for part in range(3)
                for head in range(self.fused)
                for index in range(size)
            ]
        return None


def row(config: Mapping[str, Any]) -> Row:
    """Return the row of a model; UnsupportedError where there is none, with the reason."""
    kind = str(config.get("model_type"))
    if kind not in ROWS:
        why = _NO_WORD.get(kind, "it is not written yet")
        raise UnsupportedError(
            f"gguf: model_type `{kind}`: {why}",
            hint=f"these are written: {', '.join(ROWS)}; else use `--format compressed-tensors`",
        )
    return ROWS[kind]


def metadata(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the model's keys of a GGUF file, and what the reader of it must hear.

    config   config.json

    Raises UnsupportedError for what llama.cpp would compute otherwise.
    """
    own = row(config)
    kind = str(config["model_type"])
    notes: list[str] = []
    found: dict[str, Any] = {}
    for key, name in own.numbers.items():
        value = config.get(name)
        if value is None and name in _ELSE:
            value = config.get(_ELSE[name])
        if value is None and name == "n_inner":
            value = 4 * config["n_embd"]
        if value is None and key.endswith("softcapping"):
            raise _otherwise(f"llama.cpp wants `{name}`, which this model has not")
        if value is None:
            raise CheckpointError(
                f"config.json has no `{name}`", hint="take it from the original checkpoint"
            )
        real = key.endswith(("epsilon", "softcapping"))
        found[key] = float(value) if real else int(value)
    activation, known = own.activation
    if config.get(activation, known.split()[0]) not in known.split():
        raise _otherwise(
            f"llama.cpp computes {known.split()[0]} for `{kind}`, not `{config[activation]}`"
        )
    if why := _otherwise_computed(config, own):
        raise _otherwise(why)
    if kind == "gpt_neox":
        found["use_parallel_residual"] = bool(config.get("use_parallel_residual", True))
        if config.get("hidden_act", "gelu") == "gelu":
            notes.append("llama.cpp computes gelu by tanh, up to 5e-4 from the exact one")
    window = config.get("sliding_window")
    if own.windows or (kind.startswith("qwen") and not config.get("use_sliding_window")):
        window = None
    if window and window < found["context_length"]:
        found["context_length"] = int(window)
        notes.append(
            f"llama.cpp has no sliding window for `{kind}`: the context is said to be {window} "
            "tokens, within which both compute the same"
        )
    if own.rope:
        head = head_size(config)
        found |= {"attention.key_length": head, "attention.value_length": head}
        found |= {"rope.dimension_count": int(head * _rotated(config)), **_rope(config)}
    return {f"{own.name}.{key}": value for key, value in found.items()}, notes


def _otherwise(why: str) -> UnsupportedError:
    return UnsupportedError(f"gguf: {why}", hint="use `--format compressed-tensors`")


def _otherwise_computed(config: Mapping[str, Any], own: Row) -> str | None:
    """Say what llama.cpp would compute otherwise; None: nothing that is known."""
    kind = str(config["model_type"])
    if kind == "qwen3_moe":
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            return "llama.cpp wants experts in every layer of qwen3_moe"
        if not config.get("norm_topk_prob"):
            return "llama.cpp normalizes the weights of chosen experts, this model does not"
    if kind == "gpt2" and (
        config.get("scale_attn_by_inverse_layer_idx") or not config.get("scale_attn_weights", True)
    ):
        return "llama.cpp divides the attention of gpt2 by the root of a head's size, and no more"
    if kind == "gpt_neox":
        if not config.get("attention_bias", True):
            return "llama.cpp wants biases in the attention of gpt_neox"
        if config.get("tie_word_embeddings"):
            return "llama.cpp wants a head of its own in gpt_neox"
    if not own.windows:
        return None
    layers = int(config["num_hidden_layers"])
    meant = _layer_types(own, layers)
    if list(config.get("layer_types") or meant) != meant:
        return f"llama.cpp looks back without a window in each {own.windows}th layer of `{kind}`"
    if config.get("use_bidirectional_attention"):
        return "llama.cpp looks back only"
    if config.get("tie_word_embeddings") is False:
        return f"llama.cpp has no head for `{kind}` but the embedding"
    head = head_size(config)
    if layers in _BY_WIDTH[kind] or float(config.get("query_pre_attn_scalar", head)) != head:
        return f"llama.cpp divides queries of this `{kind}` by another root than this model"
    return None


def _layer_types(own: Row, layers: int) -> list[str]:
    return [
        "full_attention" if index % own.windows == own.windows - 1 else "sliding_attention"
        for index in range(layers)
    ]


_BY_WIDTH = {"gemma2": {46}, "gemma3_text": {62}}
"""Layers of the models (27B) whose queries llama.cpp divides by the root of hidden size a head."""


def head_size(config: Mapping[str, Any]) -> int:
    """Return the values of one head of attention."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_factors(config: Mapping[str, Any]) -> list[float] | None:
    """Return what Llama 3 divides each rotation's frequency by; None: nothing.

    Source: the `llama3` scaling of transformers' `rope_parameters`; llama.cpp reads it from the
    tensor `rope_freqs.weight`.
    """
    if not row(config).rope:
        return None
    rope, theta = _rope_parameters(config)
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    head = head_size(config)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    context, factor = float(rope["original_max_position_embeddings"]), float(rope["factor"])
    found = []
    for index in range(0, head, 2):
        turns = context * theta ** (-index / head) / (2 * math.pi)
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def _rope_parameters(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], float]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta") or config.get("rope_theta") or _THETA
    return rope, float(theta)


_THETA = 10000.0
"""The base of rotations where nothing is said, here and in llama.cpp."""


def _rotated(config: Mapping[str, Any]) -> float:
    """Return the share of a head that is rotated."""
    rope, _ = _rope_parameters(config)
    for found in (rope, config):
        for name in ("partial_rotary_factor", "rotary_pct"):
            if found.get(name) is not None:
                return float(found[name])
    return _NEOX_SHARE if config.get("model_type") == "gpt_neox" else 1.0


_NEOX_SHARE = 0.25
"""What transformers takes for GPT-NeoX where config.json does not say."""


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope, theta = _rope_parameters(config)
    kind = str(rope.get("rope_type", rope.get("type")) or "default")
    found: dict[str, Any] = {"rope.freq_base": theta}
    local = (config.get("rope_parameters") or {}).get("sliding_attention")
    if local is not None or config.get("rope_local_base_freq"):
        near = local or {"rope_theta": config["rope_local_base_freq"]}
        if near.get("rope_type", "default") != "default":
            raise _otherwise("llama.cpp scales no rotation of layers with a window")
        found["rope.freq_base_swa"] = float(near["rope_theta"])
    if kind in ("default", "llama3"):
        return found
    if kind == "linear":
        scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        return found | scaling
    raise UnsupportedError(
        f"gguf: rope scaling `{kind}` is not written yet",
        hint="`default`, `linear` and `llama3` are",
    )


def place(name: str, config: Mapping[str, Any]) -> Place:
    """Return where a tensor with a canonical name, `model.layers.0...weight`, stands.

    Raises UnsupportedError for one that llama.cpp does not know.
    """
    module, _, kind = name.rpartition(".")
    own = row(config)
    shift = own.shift if kind == "weight" and module.endswith("norm") else 0.0
    if module in own.outside:
        return Place(f"{own.outside[module]}.{kind}", shift=shift)
    if layer := re.fullmatch(rf"{re.escape(own.root)}\.(\d+)\.(.+)", module):
        number, inner = layer.groups()
        if inner in own.inside:
            heads = fused = 0
            if own.interleaved and inner.endswith((".q_proj", ".k_proj")):
                said = "num_attention_heads" if inner.endswith(".q_proj") else "num_key_value_heads"
                heads = int(config.get(said) or config["num_attention_heads"])
            if inner == own.fused:
                fused = int(config["num_attention_heads"])
            name = f"blk.{number}.{own.inside[inner]}.{kind}"
            return Place(name, heads, fused=fused, shift=shift)
        if expert := re.fullmatch(r".*\.experts\.(\d+)\.(\w+)", inner):
            return Place(f"blk.{number}.{STACKS[expert[2]]}.{kind}", expert=int(expert[1]))
    raise UnsupportedError(
        f"gguf: llama.cpp has no place for `{name}`", hint="use `--format compressed-tensors`"
    )


def original(name: str, kind: str) -> tuple[str, bool]:
    """Return a GGUF tensor's name in a checkpoint of this model type, `{}` for the expert.

    The second value says whether it is a stack of experts.
    """
    stem, _, suffix = name.rpartition(".")
    own = ROWS[kind]
    for theirs, ours in own.outside.items():
        if stem == ours:
            return f"{theirs}.{suffix}", False
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        root = f"{own.root}.{layer[1]}"
        mixtral = kind == "mixtral"
        for part, stack in STACKS.items():
            if layer[2] == stack and part.startswith("w") == mixtral:
                block = "block_sparse_moe" if mixtral else "mlp"
                return f"{root}.{block}.experts.{{}}.{part}.{suffix}", True
        for theirs, ours in own.inside.items():
            if layer[2] == ours:
                return f"{root}.{theirs}.{suffix}", False
    raise UnsupportedError(
        f"gguf: tensor `{name}` has no place in a model of type `{kind}`", hint=_ELSEWHERE
    )


_ELSEWHERE = "use the safetensors checkpoint that the file was made from"


def kind_of(fields: Mapping[str, Any]) -> str:
    """Return the model type that a GGUF file's metadata describes; UnsupportedError if unknown."""
    arch = str(fields.get("general.architecture"))
    experts = bool(fields.get(f"{arch}.expert_count"))
    for kind, own in ROWS.items():
        if own.name == arch and ("expert_count" in own.numbers) == experts:
            return kind
    known = dict.fromkeys(own.name for own in ROWS.values())
    what = f"architecture `{arch}`" + (" with experts" if experts and arch in known else "")
    raise UnsupportedError(
        f"gguf: {what} is not read yet",
        hint=f"these are: {', '.join(known)}",
    )


def config(fields: Mapping[str, Any], tied: bool, freqs: list[float] | None) -> dict[str, Any]:
    """Return config.json of the model that a GGUF file's metadata describes.

    fields  metadata, key -> plain value
    tied    the file has no tensor `output.weight`
    freqs   the values of `rope_freqs.weight`, where it is there

    Raises UnsupportedError for an architecture or a setting that is not read, CheckpointError for
    metadata that are not there.
    """
    kind = kind_of(fields)
    own = ROWS[kind]
    said = {key.removeprefix(f"{own.name}."): value for key, value in fields.items()}
    activation, known = own.activation
    found: dict[str, Any] = {
        "architectures": [own.model],
        "model_type": kind,
        activation: known.split()[0],
        "tie_word_embeddings": tied,
        "dtype": "float16",
        "pad_token_id": None,  # else phi3 has one of its own, beyond a small vocabulary
    }
    defaults = {
        "vocab_size": len(fields.get("tokenizer.ggml.tokens") or []),
        "attention.head_count_kv": said.get("attention.head_count"),
    }
    for key, name in own.numbers.items():
        found[name] = _number(own, key, said.get(key, defaults.get(key)))
    window = said.get("attention.sliding_window")
    if window and kind == "olmo2":
        raise UnsupportedError(
            "gguf: `olmo2` with windows, which is OLMo 3, is not read yet", hint=_ELSEWHERE
        )
    if window and kind == "phi3":
        found["sliding_window"] = window
    if own.rope:
        heads = found["num_attention_heads"]
        found["head_dim"] = said.get("attention.key_length", found["hidden_size"] // heads)
        found["rope_parameters"] = _read_rope(said, own, found["head_dim"])
    if own.windows:
        layers = found["num_hidden_layers"]
        found["layer_types"] = _layer_types(own, layers)
        wide = layers in _BY_WIDTH[kind]
        divisor = found["hidden_size"] // heads if wide else found["head_dim"]
        found["query_pre_attn_scalar"] = divisor
    if freqs is not None:
        _llama3(found, freqs)
    if kind == "qwen3_moe":
        found |= {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
    if kind == "gpt_neox":
        found["use_parallel_residual"] = bool(said.get("use_parallel_residual", True))
        if tied:
            raise CheckpointError("gguf: the file has no tensor `output.weight`", hint=_AGAIN)
    for token in ("bos", "eos", "padding"):
        if (number := fields.get(f"tokenizer.ggml.{token}_token_id")) is not None:
            found[f"{'pad' if token == 'padding' else token}_token_id"] = number
    return found


_AGAIN = "it is damaged, or made by a tool that left it out: make it again"


def _number(own: Row, key: str, value: Any) -> int | float:
    """Return one of a file's numbers as config.json has it."""
    if value is None:
        raise CheckpointError(f"gguf: the file has no `{own.name}.{key}`", hint=_AGAIN)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnsupportedError(
            f"gguf: `{own.name}.{key}` is no number but {type(value).__name__}: layers that "
            "differ in it are not read yet",
            hint=_ELSEWHERE,
        )
    # A float32 such as 1e-5 has more digits as a float64 than were meant.
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _read_rope(said: Mapping[str, Any], own: Row, head: int) -> dict[str, Any]:
    """Return `rope_parameters`.

    said  metadata, the architecture's without its name
    head  values of a head
    """
    rope: dict[str, Any] = {"rope_type": "default"}
    rope["rope_theta"] = float(said.get("rope.freq_base", _THETA))
    turned = int(said.get("rope.dimension_count", head))
    if own.partial:
        rope["partial_rotary_factor"] = turned / head
    elif turned != head:
        raise UnsupportedError(
            f"gguf: `{own.name}` that rotates {turned} of a head's {head} values is not read yet",
            hint=_ELSEWHERE,
        )
    scaling = said.get("rope.scaling.type", "none")
    if scaling == "linear":
        factor = _number(own, "rope.scaling.factor", said.get("rope.scaling.factor"))
        rope |= {"rope_type": "linear", "factor": float(factor)}
    elif scaling != "none":
        raise UnsupportedError(f"gguf: rope scaling `{scaling}` is not read yet", hint=_ELSEWHERE)
    if not own.near:
        return rope
    near = float(said.get("rope.freq_base_swa", own.near))
    return {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": near},
    }


def _llama3(config: dict[str, Any], freqs: list[float]) -> None:
    """Put Llama 3's scaling into a config, if these are its factors with its usual settings."""
    rope = config["rope_parameters"] | {
        "rope_type": "llama3",
        "factor": round(max(freqs), 4),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config["rope_parameters"] = rope
    meant = rope_factors(config) or []
    near = zip(meant, freqs, strict=False)
    if len(meant) != len(freqs) or any(abs(a - b) > 1e-4 * b for a, b in near):
        raise UnsupportedError(
            "gguf: the factors in `rope_freqs.weight` are not those of Llama 3", hint=_ELSEWHERE
        )


def row_order(rows: int, heads: int) -> list[int]:
    """Return, for each row of q or k in a GGUF file of `llama`, its row in the checkpoint."""
    size = rows // heads
    half = size // 2
    return [
        head * size + part * half + index
        for head in range(heads)
        for index in range(half)
        for part in range(2)
    ]

"""A model as a GGUF file names it: metadata, tensor names and the order of rows, both ways.

A GGUF file says of a model what `config.json` says, under keys that start with its architecture's
name, and calls each tensor otherwise. llama.cpp rotates neighbouring rows of a head's queries and
keys in its `llama` architecture where transformers rotates the two halves, so there the rows of q
and k lie in another order; in the others they do not.

Six model types: what llama.cpp computes for them is compared with transformers by a test each.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unicomp.errors import CheckpointError, UnsupportedError

ARCHITECTURES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
}
"""config.json's `model_type` -> `general.architecture`."""

_NUMBERS: Mapping[str, str] = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
"""Key of the file, after the architecture's name -> key of config.json."""

_ELSE = {"num_key_value_heads": "num_attention_heads", "num_experts": "num_local_experts"}
"""Key of config.json -> the one to read where it is absent."""

_EXPERTS: Mapping[str, Mapping[str, str]] = {
    "mixtral": {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "qwen3_moe": {
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
}

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_STACKS = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor of a checkpoint stands in a GGUF file.

    name    of the tensor there
    heads   heads whose rows change their order; 0: rows stay
    expert  index along the first dimension of a stack of experts, else None
    """

    name: str
    heads: int = 0
    expert: int | None = None


def architecture(config: Mapping[str, Any]) -> str:
    """Return `general.architecture`; UnsupportedError where the model is none of the table's."""
    found = ARCHITECTURES.get(str(config.get("model_type")))
    if found is None:
        raise UnsupportedError(
            f"gguf: model_type `{config.get('model_type')}` is not written yet",
            hint=f"these are: {', '.join(ARCHITECTURES)}; else use `--format compressed-tensors`",
        )
    return found


def metadata(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the model's keys of a GGUF file, and what the reader of it must hear.

    config   config.json

    Raises UnsupportedError for what llama.cpp would compute otherwise.
    """
    arch = architecture(config)
    kind = str(config["model_type"])
    notes: list[str] = []
    found: dict[str, Any] = {}
    for key, name in {**_NUMBERS, **_EXPERTS.get(kind, {})}.items():
        value = config.get(name)
        if value is None and name in _ELSE:
            value = config.get(_ELSE[name])
        if value is None:
            raise CheckpointError(
                f"config.json has no `{name}`", hint="take it from the original checkpoint"
            )
        found[key] = float(value) if key.endswith("epsilon") else int(value)
    if config.get("hidden_act", "silu") != "silu":
        raise UnsupportedError(
            f"gguf: llama.cpp computes silu for `{kind}`, not `{config['hidden_act']}`",
            hint="use `--format compressed-tensors`",
        )
    sparse_step = config.get("decoder_sparse_step", 1)
    if kind == "qwen3_moe" and (config.get("mlp_only_layers") or sparse_step != 1):
        raise UnsupportedError(
            "gguf: llama.cpp wants experts in every layer of qwen3_moe",
            hint="use `--format compressed-tensors`",
        )
    if kind == "qwen3_moe" and not config.get("norm_topk_prob"):
        raise UnsupportedError(
            "gguf: llama.cpp normalizes the weights of chosen experts, this model does not",
            hint="use `--format compressed-tensors`",
        )
    window = config.get("sliding_window")
    if kind.startswith("qwen") and not config.get("use_sliding_window"):
        window = None
    if window and window < found["context_length"]:
        found["context_length"] = int(window)
        notes.append(
            f"llama.cpp has no sliding window for `{kind}`: the context is said to be {window} "
            "tokens, within which both compute the same"
        )
    head = head_size(config)
    found |= {"attention.key_length": head, "attention.value_length": head}
    found |= {"rope.dimension_count": head, **_rope(config)}
    return {f"{arch}.{key}": value for key, value in found.items()}, notes


def head_size(config: Mapping[str, Any]) -> int:
    """Return the values of one head of attention."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_factors(config: Mapping[str, Any]) -> list[float] | None:
    """Return what Llama 3 divides each rotation's frequency by; None: nothing.

    Source: the `llama3` scaling of transformers' `rope_parameters`; llama.cpp reads it from the
    tensor `rope_freqs.weight`.
    """
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
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    return rope, float(theta)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    rope, theta = _rope_parameters(config)
    kind = str(rope.get("rope_type", rope.get("type")) or "default")
    found: dict[str, Any] = {"rope.freq_base": theta}
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
    if module in _OUTSIDE:
        return Place(f"{_OUTSIDE[module]}.{kind}")
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module):
        number, inner = layer.groups()
        if inner in _INSIDE:
            heads = 0
            if architecture(config) == "llama" and inner.endswith((".q_proj", ".k_proj")):
                own = "num_attention_heads" if inner.endswith(".q_proj") else "num_key_value_heads"
                heads = int(config.get(own) or config["num_attention_heads"])
            return Place(f"blk.{number}.{_INSIDE[inner]}.{kind}", heads)
        if expert := re.fullmatch(r".*\.experts\.(\d+)\.(\w+)", inner):
            return Place(f"blk.{number}.{_STACKS[expert[2]]}.{kind}", expert=int(expert[1]))
    raise UnsupportedError(
        f"gguf: llama.cpp has no place for `{name}`", hint="use `--format compressed-tensors`"
    )


def original(name: str, kind: str) -> tuple[str, bool]:
    """Return a GGUF tensor's name in a checkpoint of this model type, `{}` for the expert.

    The second value says whether it is a stack of experts.
    """
    stem, _, suffix = name.rpartition(".")
    for theirs, ours in _OUTSIDE.items():
        if stem == ours:
            return f"{theirs}.{suffix}", False
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        root = f"model.layers.{layer[1]}"
        mixtral = kind == "mixtral"
        for part, stack in _STACKS.items():
            if layer[2] == stack and part.startswith("w") == mixtral:
                block = "block_sparse_moe" if mixtral else "mlp"
                return f"{root}.{block}.experts.{{}}.{part}.{suffix}", True
        for theirs, ours in _INSIDE.items():
            if layer[2] == ours and (ours != "ffn_gate_inp" or theirs.startswith("b") == mixtral):
                return f"{root}.{theirs}.{suffix}", False
    raise UnsupportedError(
        f"gguf: tensor `{name}` has no place in a model of type `{kind}`",
        hint="use the safetensors checkpoint that the file was made from",
    )


def config(fields: Mapping[str, Any], tied: bool, freqs: list[float] | None) -> dict[str, Any]:
    """Return config.json of the model that a GGUF file's metadata describes.

    fields  metadata, key -> plain value
    tied    the file has no tensor `output.weight`
    freqs   the values of `rope_freqs.weight`, where it is there

    Raises UnsupportedError for an architecture or a setting that is not read, CheckpointError for
    metadata that are not there.
    """
    arch = str(fields.get("general.architecture"))
    experts = bool(fields.get(f"{arch}.expert_count"))
    kinds = {"llama": "mixtral" if experts else "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
    kind = (kinds | {"qwen3moe": "qwen3_moe"}).get(arch)
    if kind is None:
        raise UnsupportedError(
            f"gguf: architecture `{arch}` is not read yet",
            hint=f"these are: {', '.join(sorted(set(ARCHITECTURES.values())))}",
        )
    classes = {"llama": "Llama", "mixtral": "Mixtral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    found: dict[str, Any] = {
        "architectures": [f"{classes.get(kind, 'Qwen3Moe')}ForCausalLM"],
        "model_type": kind,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "dtype": "float16",
    }
    defaults: dict[str, Any] = {"vocab_size": len(fields.get("tokenizer.ggml.tokens") or [])}
    defaults["attention.head_count_kv"] = fields.get(f"{arch}.attention.head_count")
    for key, name in {**_NUMBERS, **_EXPERTS.get(kind, {})}.items():
        value = fields.get(f"{arch}.{key}", defaults.get(key))
        if value is None:
            raise CheckpointError(
                f"gguf: the file has no `{arch}.{key}`", hint="it is damaged, or made by a tool "
                "that left it out: make it again",
            )  # fmt: skip
        # A float32 such as 1e-5 has more digits as a float64 than were meant.
        found[name] = float(f"{value:.6g}") if isinstance(value, float) else value
    heads = found["num_attention_heads"]
    found["head_dim"] = fields.get(f"{arch}.attention.key_length", found["hidden_size"] // heads)
    rope: dict[str, Any] = {"rope_type": "default"}
    rope["rope_theta"] = float(fields.get(f"{arch}.rope.freq_base", 10000.0))
    scaling = fields.get(f"{arch}.rope.scaling.type", "none")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": fields[f"{arch}.rope.scaling.factor"]}
    elif scaling != "none":
        raise UnsupportedError(
            f"gguf: rope scaling `{scaling}` is not read yet",
            hint="use the safetensors checkpoint that the file was made from",
        )
    found["rope_parameters"] = rope
    if freqs is not None:
        _llama3(found, freqs)
    if kind == "qwen3_moe":
        found |= {"norm_topk_prob": True, "mlp_only_layers": [], "decoder_sparse_step": 1}
    for token in ("bos", "eos", "padding"):
        if (number := fields.get(f"tokenizer.ggml.{token}_token_id")) is not None:
            found[f"{'pad' if token == 'padding' else token}_token_id"] = number
    return found


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
            "gguf: the factors in `rope_freqs.weight` are not those of Llama 3",
            hint="use the safetensors checkpoint that the file was made from",
        )


def row_order(rows: int, heads: int, *, back: bool = False) -> list[int]:
    """Return, for each row of q or k in a GGUF file of `llama`, its row in the checkpoint.

    back  the other way: for each row of the checkpoint, its row in the file
    """
    size = rows // heads
    half = size // 2
    order = [
        head * size + part * half + index
        for head in range(heads)
        for index in range(half)
        for part in range(2)
    ]
    if not back:
        return order
    inverse = [0] * rows
    for place_, row in enumerate(order):
        inverse[row] = place_
    return inverse

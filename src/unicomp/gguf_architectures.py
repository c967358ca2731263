"""What GGUF calls the parts of a model: one row for each model type, for writing and for reading.

Source: `gguf/constants.py` of the `gguf` package for the names, and what llama.cpp computes for an
architecture, seen by running it (`tests/kernels/exports`).
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One model type.

    name         `general.architecture`; of rows with one name a file is the first that has experts
                 as it has, or has none
    model        class of transformers
    numbers      key of the file, after the architecture's name -> key of config.json
    root         module path of the decoder layers
    outside      module outside the layers -> tensor
    inside       module inside a layer -> tensor, after `blk.N.`
    activation   key of config.json, and the activations that llama.cpp computes
    rope         queries and keys are rotated; False: positions are learnt
    interleaved  rows of q and k lie in pairs that are rotated together
    fused        the module whose rows hold q, k and v head by head; llama.cpp wants all of q first
    shift        what is added to the weights of norms
    windows      layers look back over `sliding_window` by turns: their number, the last without
    near         base of the rotations in layers with a window; 0: that of all
    partial      a share of a head may be rotated
    """

    name: str
    model: str
    numbers: Mapping[str, str]
    inside: Mapping[str, str]
    outside: Mapping[str, str]
    root: str = "model.layers"
    activation: tuple[str, str] = ("hidden_act", "silu")
    rope: bool = True
    interleaved: bool = False
    fused: str = ""
    shift: float = 0.0
    windows: int = 0
    near: float = 0.0
    partial: bool = False


_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "vocab_size": "vocab_size",
}
_NUMBERS = _SIZES | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_LLAMA = _NORMS | _ATTENTION | _MLP
_ROUTED = _LLAMA | {"mlp.gate": "ffn_gate_inp"}
_GEMMA = _ATTENTION | _MLP | _AFTER
_GEMMA |= {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm"}
_GEMMA_NUMBERS = _NUMBERS | {"attention.sliding_window": "sliding_window"}
_TIED = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
_TANH = ("hidden_activation", "gelu_pytorch_tanh")

STACKS = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip
"""Part of an expert -> the tensor that holds it of all experts."""

ROWS: Mapping[str, Row] = {
    "llama": Row("llama", "LlamaForCausalLM", _NUMBERS, _LLAMA, _OUTSIDE, interleaved=True),
    "mistral": Row("llama", "MistralForCausalLM", _NUMBERS, _LLAMA, _OUTSIDE, interleaved=True),
    "mixtral": Row(
        "llama",
        "MixtralForCausalLM",
        _NUMBERS
        | {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        _LLAMA | {"block_sparse_moe.gate": "ffn_gate_inp"},
        _OUTSIDE,
        interleaved=True,
    ),
    "qwen2": Row("qwen2", "Qwen2ForCausalLM", _NUMBERS, _LLAMA, _OUTSIDE),
    "qwen3": Row("qwen3", "Qwen3ForCausalLM", _NUMBERS, _LLAMA, _OUTSIDE),
    "qwen3_moe": Row(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        _NUMBERS
        | {
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        _ROUTED,
        _OUTSIDE,
    ),
    "olmo2": Row("olmo2", "Olmo2ForCausalLM", _NUMBERS, _ATTENTION | _MLP | _AFTER, _OUTSIDE),
    "phi3": Row(
        "phi3",
        "Phi3ForCausalLM",
        _NUMBERS,
        _NORMS
        | {
            "self_attn.qkv_proj": "attn_qkv",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        },
        _OUTSIDE,
        partial=True,
    ),
    "gemma2": Row(
        "gemma2",
        "Gemma2ForCausalLM",
        _GEMMA_NUMBERS
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        _GEMMA,
        _TIED,
        activation=_TANH,
        shift=1.0,
        windows=2,
    ),
    "gemma3_text": Row(
        "gemma3",
        "Gemma3ForCausalLM",
        _GEMMA_NUMBERS,
        _GEMMA,
        _TIED,
        activation=_TANH,
        shift=1.0,
        windows=6,
        near=10000.0,
    ),
    "gpt2": Row(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "block_count": "n_layer",
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
            "vocab_size": "vocab_size",
        },
        {
            "ln_1": "attn_norm",
            "attn.c_attn": "attn_qkv",
            "attn.c_proj": "attn_output",
            "ln_2": "ffn_norm",
            "mlp.c_fc": "ffn_up",
            "mlp.c_proj": "ffn_down",
        },
        {
            "transformer.wte": "token_embd",
            "transformer.wpe": "position_embd",
            "transformer.ln_f": "output_norm",
            "lm_head": "output",
        },
        root="transformer.h",
        activation=("activation_function", "gelu_new"),
        rope=False,
    ),
    "gpt_neox": Row(
        "gptneox",
        "GPTNeoXForCausalLM",
        _SIZES | {"attention.layer_norm_epsilon": "layer_norm_eps"},
        _NORMS
        | {
            "attention.query_key_value": "attn_qkv",
            "attention.dense": "attn_output",
            "mlp.dense_h_to_4h": "ffn_up",
            "mlp.dense_4h_to_h": "ffn_down",
        },
        {
            "gpt_neox.embed_in": "token_embd",
            "gpt_neox.final_layer_norm": "output_norm",
            "embed_out": "output",
        },
        root="gpt_neox.layers",
        activation=("hidden_act", "gelu gelu_new gelu_pytorch_tanh gelu_fast"),
        fused="attention.query_key_value",
        partial=True,
    ),
}
"""config.json's `model_type` -> its row."""

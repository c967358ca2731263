"""What transformers does not take, or takes wrongly: 5.23 with compressed-tensors 0.20.

Of compressed-tensors, BitNet and GGUF each was tried; of GPTQ, whose loading wants gptqmodel, read.
"""

from collections.abc import Iterator, Mapping

from unicomp.recipes.lint import conditions as when
from unicomp.recipes.lint.format_rules import (
    CONFIG_DISAGREES,
    CT,
    GPTQ,
    GPTQ_PLANAR,
    GPTQ_UNDIVIDED,
)
from unicomp.recipes.lint.output import Output
from unicomp.recipes.lint.rules import Loader, Rule

BITNET = ("bitnet",)
METHODS = frozenset(
    "awq bitsandbytes gptq aqlm quanto quark fouroversix fp_quant eetq higgs hqq "
    "compressed-tensors fbgemm_fp8 torchao bitnet vptq spqr fp8 gguf nvfp4 mxfp8 auto-round "
    "mxfp4 metal sinq gemma".split()
)

NO_GGUF = ("mixtral", "olmo2", "gpt_neox")
UNREAD: Mapping[str, Mapping[str, object]] = {
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"moe_intermediate_size": 768, "norm_topk_prob": False},
    "gemma2": {
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_text": {"query_pre_attn_scalar": 256},
    "gpt2": {"n_positions": 1024, "n_inner": None},
}
"""Model type -> settings that it does not read from a GGUF, and what it takes for them."""


def unread(output: Output, _: int) -> Iterator[str]:
    """Yield the settings of a GGUF's model that transformers takes otherwise than they are."""
    taken = UNREAD.get(str(output.config.get("model_type")), {}) if output.gguf else {}
    for name, default in taken.items():
        meant = 4 * output.config["n_embd"] if name == "n_inner" else default
        if output.config.get(name) not in (None, meant):
            yield name


TRANSFORMERS = Loader(
    "transformers",
    "5.23",
    "tried with compressed-tensors 0.20",
    (
        Rule(
            "gguf-architecture",
            when.said(lambda o: o.gguf and o.config.get("model_type") in NO_GGUF, "model_type"),
            "it reads no GGUF of this architecture",
            "export to compressed-tensors",
        ),
        Rule(
            "gguf-settings",
            unread,
            "it takes settings of its own for what it does not read from a GGUF",
            "export to compressed-tensors",
        ),
        Rule(
            "method",
            when.said(lambda o: o.method is not None and o.method not in METHODS, "quant_method"),
            "it knows no such method of quantization",
            "export to compressed-tensors",
        ),
        Rule(
            "tied-head",
            when.tied_head,
            "a packed head that shares the embedding's weight loads and fails in the first pass",
            "add it to `ignore`",
        ),
        Rule(
            "sparse-format",
            when.said(when.dropped_sparsity, "sparsity_config"),
            "the sparse formats left compressed-tensors with 0.15",
            "store zeros densely, or quantized",
            CT,
        ),
        Rule(
            "actorder",
            when.said(when.ordered, "actorder"),
            "compressed-tensors 0.19 and later refuse groups in the order of activations",
            "store columns in their own order, `actorder: static`",
            CT,
        ),
        Rule(
            "odd-width-layout",
            when.each(when.sparse_words),
            "words of whole codes, as compressed-tensors wrote 3, 5, 6 and 7 bits before 0.18",
            "quantize again: codes run on over the words now",
            CT,
        ),
        Rule(
            "undivided-group",
            when.each(when.undivided),
            "its group does not divide the columns, so that the scales have another shape",
            "use a group size that divides, or one scale a row",
            CT,
        ),
        Rule(
            "zero-points",
            when.loose_zero_points,
            "packed zero points load only where the config says `dequantize: true`",
            "quantize symmetrically",
            CT,
        ),
        Rule(
            "one-scheme",
            when.mixed_dequantized,
            "it makes packed zero points and Conv1D dense at load, and wants one scheme for all "
            "then: this has another",
            "use one scheme for all",
            CT,
        ),
        Rule(
            "conv1d",
            when.packed_conv1d,
            "a packed Conv1D loads only where the config says `dequantize: true`",
            "export to gptq",
            CT,
        ),
        Rule(
            "packed-experts",
            when.experts_apart,
            "packed experts are thrown away unless all share one symmetric scheme",
            "use one symmetric scheme for all experts",
            CT,
        ),
        Rule(
            "plain-experts",
            when.plain_experts,
            "plain experts beside packed linears are thrown away unless they are stacked",
            "quantize with `target: [transformers]`, which stacks them",
            CT,
        ),
        CONFIG_DISAGREES,
        Rule(
            "gptq-width",
            when.each(lambda one: when.bits(one, 2, 3, 4, 8)),
            "gptq has kernels for 2, 3, 4 and 8 bits; 5 to 7 are of the planar layout",
            "use one of those, or compressed-tensors",
            GPTQ,
        ),
        GPTQ_PLANAR,
        Rule(
            "gptq-three-bits",
            when.version_one(lambda one: not when.bits(one, 3)),
            "3 bits in version 1 were written in two ways that no file tells apart",
            "use `checkpoint_format: gptq_v2`",
            GPTQ,
        ),
        Rule(
            "gptq-zero-points",
            when.version_one(when.shifted),
            "version 1 stores a zero point less one, and has no word for 0",
            "use `checkpoint_format: gptq_v2`, or quantize symmetrically",
            GPTQ,
        ),
        GPTQ_UNDIVIDED,
        Rule(
            "bitnet-scale",
            when.each(when.wrong_scale),
            "`bitlinear` divides by the scale and `autobitlinear` multiplies: this is the other's",
            "export it again, or mend `linear_class`",
            BITNET,
        ),
        Rule(
            "bitnet-one-scale",
            when.each(when.many_scales),
            "BitNet has one scale for a whole weight",
            "quantize with one scale a tensor, or export to compressed-tensors",
            BITNET,
        ),
    ),
)

"""What vLLM does not take: by what the code of 0.33 reads; it was not run."""

from unicomp.kernels import loader_facts as facts
from unicomp.recipes.lint import conditions as when
from unicomp.recipes.lint.format_rules import (
    CONFIG_DISAGREES,
    CT,
    GPTQ,
    GPTQ_PLANAR,
    GPTQ_UNDIVIDED,
)
from unicomp.recipes.lint.rules import Loader, Rule

METHODS = frozenset(
    "awq auto_awq fp8 fbgemm_fp8 fp_quant modelopt gptq auto_gptq gptq_marlin humming "
    "compressed-tensors experts_int8 quark moe_wna16 torchao inc mxfp4 gpt_oss_mxfp4 "
    "deepseek_v4_fp8".split()
)

VLLM = Loader(
    "vllm",
    "0.33",
    "read, not run",
    (
        Rule(
            "gguf",
            when.said(lambda o: o.gguf, "model.gguf"),
            "it reads no GGUF of its own",
            "`unicomp export --format compressed-tensors`, or llama.cpp",
        ),
        Rule(
            "method",
            when.said(lambda o: o.method is not None and o.method not in METHODS, "quant_method"),
            "it has no such method of quantization in its tree",
            "export to compressed-tensors; ternary weights fit in 2 bits",
        ),
        Rule(
            "sparse-format",
            when.said(when.dropped_sparsity, "sparsity_config"),
            "it no longer reads sparse formats",
            "store zeros densely, or quantized",
            CT,
        ),
        Rule(
            "actorder",
            when.said(when.ordered, "actorder"),
            "it no longer takes groups in the order of activations",
            "store columns in their own order, `actorder: static`",
            CT,
        ),
        Rule(
            "odd-width-layout",
            when.each(when.sparse_words),
            "it expects codes that run on over the words",
            "quantize again",
            CT,
        ),
        Rule(
            "undivided-group",
            when.each(when.undivided),
            "its group does not divide the columns",
            "use a group size that divides, or one scale a row",
            CT,
        ),
        Rule(
            "half-words",
            when.of(facts.VLLM_HALF_WORDS),
            facts.VLLM_HALF_WORDS.why,
            "use another width, or add it to `ignore`",
            CT,
        ),
        Rule(
            "blocks",
            when.each(when.in_blocks),
            "it takes no integer weights in blocks",
            "use a group size that divides, or `target: [vllm]`",
            CT,
        ),
        Rule(
            "zero-points",
            when.of(facts.VLLM_ZERO_POINTS),
            facts.VLLM_ZERO_POINTS.why,
            "quantize symmetrically",
            CT,
        ),
        Rule(
            "conv1d",
            when.any_conv1d,
            "it takes no packed Conv1D from compressed-tensors",
            "export to gptq",
            CT,
        ),
        Rule(
            "fused-scheme",
            when.unlike_neighbours,
            "it holds q, k and v as one, gate and up, and all experts of a layer: this differs "
            "from its neighbours",
            "use one scheme for them, or `target: [vllm]`",
        ),
        Rule(
            "stacked-experts",
            when.stacked_experts,
            "it reads plain experts one by one, not stacked",
            "quantize them too, or use `target: [vllm]`",
            CT,
        ),
        CONFIG_DISAGREES,
        Rule(
            "gptq-width",
            when.of(facts.VLLM_GPTQ_WIDTH),
            facts.VLLM_GPTQ_WIDTH.why,
            "use one of those, or compressed-tensors",
            GPTQ,
        ),
        Rule(
            "gptq-zero-points",
            when.of(facts.VLLM_GPTQ_ZERO_POINTS),
            facts.VLLM_GPTQ_ZERO_POINTS.why,
            "quantize symmetrically",
            GPTQ,
        ),
        GPTQ_PLANAR,
        Rule(
            "gptq-order",
            when.said(
                lambda o: (
                    bool(o.quantization.get("desc_act"))
                    and o.quantization.get("group_size", -1) != -1
                ),
                "desc_act",
            ),
            "it takes groups in the order of activations no longer",
            "store columns in their own order",
            GPTQ,
        ),
        GPTQ_UNDIVIDED,
        Rule(
            "group-under-tp",
            when.groups_cut,
            "so many processes would cut a group, or a word of codes, of its columns",
            "use smaller groups, one scale a row, or fewer processes",
        ),
        Rule(
            "rows-under-tp",
            when.rows_cut,
            "so many processes do not divide its rows",
            "use fewer processes",
        ),
        Rule(
            "heads-under-tp",
            when.heads_cut,
            "so many processes do not divide the heads",
            "use fewer processes",
        ),
    ),
)

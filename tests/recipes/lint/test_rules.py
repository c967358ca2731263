"""Each trap of each loader: found where it is planted, and not in its mended twin."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest

from unicomp.errors import UnsupportedError
from unicomp.kernels.formats.compressed_tensors import CompressedTensors
from unicomp.kernels.formats.gptq import Gptq
from unicomp.kernels.packed import Scheme, words
from unicomp.recipes.lint.output import Output
from unicomp.recipes.lint.rules import Loader, check, chosen
from unicomp.writer import Meta

FOUR = Scheme(4, 32)
LLAMA = {
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (128, 64),
    "up_proj": (128, 64),
    "down_proj": (64, 128),
}
EXPERT = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
CT, GPTQ = CompressedTensors(), Gptq()


def modules(experts: int) -> dict[str, tuple[int, int]]:
    """Return the linears of two layers, with a mixture's in place of the plain ones."""
    found = {}
    for layer in range(2):
        for leaf, shape in LLAMA.items():
            inner = "self_attn" if leaf.split("_")[0] in "qkvo" else "mlp"
            if inner == "self_attn" or not experts:
                found[f"model.layers.{layer}.{inner}.{leaf}"] = shape
        for expert in range(experts):
            for leaf, shape in EXPERT.items():
                found[f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"] = shape
    return found


def made(
    own: Mapping[str, Scheme | None] | None = None,
    *,
    scheme: Scheme = FOUR,
    format: CompressedTensors | Gptq = CT,
    experts: int = 0,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    head: Scheme | None = None,
    config: Mapping[str, Any] | None = None,
    told: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Meta] | None = None,
) -> Output:
    """Return an output as our formats write it, with what a test plants.

    own     part of a module's name -> its scheme, instead of the common one
    shapes  part of a module's name -> another shape
    head    scheme of the head; None: it is plain
    told    changes of the `quantization_config`
    """
    known = {
        name: next((new for part, new in (shapes or {}).items() if part in name), shape)
        for name, shape in modules(experts).items()
    }
    schemes = {
        name: next((one for part, one in (own or {}).items() if part in name), scheme)
        for name in known
    }
    known["lm_head"] = (96, 64)
    schemes["lm_head"] = head
    packed = {name: one for name, one in schemes.items() if one is not None}
    plain = [name for name, one in schemes.items() if one is None]
    stored = {"model.embed_tokens.weight": Meta("model.embed_tokens.weight", "F32", (96, 64))}
    for name, one in schemes.items():
        metas = [Meta(f"{name}.weight", "F32", known[name])]
        if one is not None:
            metas = format.layout(name, known[name], one, "F32")
        stored |= {meta.name: meta for meta in metas}
    settings: dict[str, Any] = {"model_type": "qwen3_moe" if experts else "llama"}
    settings |= {"num_attention_heads": 4, "tie_word_embeddings": False}
    settings["quantization_config"] = format.config(packed, plain) | dict(told or {})
    return Output(settings | dict(config or {}), stored | dict(tensors or {}), known)


def weights(output: Output, **changes: Any) -> Output:
    """Change what the config says of every group's weights."""
    told = dict(output.quantization)
    groups = told["config_groups"]
    told["config_groups"] = {
        name: group | {"weights": group["weights"] | changes} for name, group in groups.items()
    }
    return replace(output, config={**output.config, "quantization_config": told})


def old_words() -> Output:
    """Three bits as compressed-tensors wrote them before 0.18: ten codes a word."""
    found = made(scheme=Scheme(3, 32))
    tensors = {
        name: meta._replace(shape=(meta.shape[0], -(-found.known[name[:-14]][1] // 10)))
        if name.endswith(".weight_packed")
        else meta
        for name, meta in found.tensors.items()
        if isinstance(meta, Meta)
    }
    return replace(found, tensors=tensors)


def ternary(linear_class: str, scale: float, scales: int = 1) -> Output:
    """One ternary weight as HF BitNet stores it."""
    name = "model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.weight": Meta(f"{name}.weight", "U8", (16, 64)),
        f"{name}.weight_scale": Meta(f"{name}.weight_scale", "BF16", (scales,)),
    }
    told = {"quant_method": "bitnet", "linear_class": linear_class}
    return Output({"quantization_config": told}, tensors, {}, {name: scale})


def gpt2(format: CompressedTensors | Gptq) -> Output:
    """GPT-2, whose Conv1D are [in, out]."""
    return made(format=format, config={"model_type": "gpt2", "n_head": 4})


def stacked() -> Output:
    """Experts as two 3-D tensors a layer, beside packed attention."""
    found = made(experts=2)
    kept = {name: meta for name, meta in found.tensors.items() if ".experts." not in name}
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.0.mlp.experts.{part}"
        kept[name] = Meta(name, "F32", (2, 128, 64))
    return replace(found, tensors=kept)


def fine() -> Output:
    """Groups that four processes do not cut."""
    return made(scheme=Scheme(4, 16))


def foreign(method: str) -> Output:
    return Output({"quantization_config": {"quant_method": method}}, {})


SHIFTED, WIDE, THREE = Scheme(4, 32, False), Scheme(8, 32), Scheme(3, 32)
SPARSE = {"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}}
V2 = {"checkpoint_format": "gptq_v2"}
DOWN = {"down_proj": (64, 100)}


@dataclass
class Trap:
    """A rule, an output that breaks it, and one that does not; `tp` as the command takes it."""

    loader: str
    rule: str
    broken: Callable[[], Output]
    mended: Callable[[], Output]
    tp: int = 1


BLOCKS = CompressedTensors(block=frozenset(modules(0)))
TRAPS = [
    # B1, trap 1: the layout of odd widths changed under the same name.
    *(
        Trap(name, "odd-width-layout", old_words, lambda: made(scheme=THREE))
        for name in ("transformers", "vllm")
    ),
    # Trap 2: asymmetric weights want `dequantize`, and then one scheme; vLLM wants 4 bits.
    Trap(
        "transformers",
        "zero-points",
        lambda: made(scheme=SHIFTED),
        lambda: made(scheme=SHIFTED, told={"dequantize": True}),
    ),
    Trap(
        "transformers",
        "one-scheme",
        lambda: made({"down": Scheme(4, 64, False)}, scheme=SHIFTED, told={"dequantize": True}),
        lambda: made(scheme=SHIFTED, told={"dequantize": True}),
    ),
    Trap(
        "vllm",
        "zero-points",
        lambda: made(scheme=Scheme(8, 32, False)),
        lambda: made(scheme=SHIFTED),
    ),
    # Trap 3: the order of activations.
    *(
        Trap(name, "actorder", lambda order=order: weights(made(), actorder=order), static)
        for name in ("transformers", "vllm")
        for order in ("group", "dynamic", True)
        for static in [lambda: weights(made(), actorder="static")]
    ),
    # Trap 4: a packed head that is the embedding.
    Trap(
        "transformers",
        "tied-head",
        lambda: made(head=FOUR, config={"tie_word_embeddings": True}),
        lambda: made(head=FOUR),
    ),
    # Trap 5: experts that are silently thrown away.
    Trap(
        "transformers",
        "packed-experts",
        lambda: made({"experts.1.down": WIDE}, experts=2),
        lambda: made(experts=2),
    ),
    Trap(
        "transformers",
        "packed-experts",
        lambda: made({"experts": SHIFTED}, experts=2),
        lambda: made({"experts": Scheme(2, 32)}, experts=2),
    ),
    Trap(
        "transformers",
        "packed-experts",
        lambda: made({"1.mlp.experts.0.up": None}, experts=2),
        lambda: made(experts=2),
    ),
    Trap("transformers", "plain-experts", lambda: made({"experts": None}, experts=2), stacked),
    Trap("vllm", "stacked-experts", stacked, lambda: made({"experts": None}, experts=2)),
    # Sparse formats, all three.
    *(
        Trap(name, "sparse-format", lambda told=told: made(told=told), made)
        for name in ("transformers", "vllm")
        for told in (
            SPARSE,
            {"sparsity_config": {"format": "sparse-bitmask"}},
            {"format": "marlin-24"},
        )
    ),
    # Who loads what: groups, words, fused neighbours, blocks, Conv1D, patterns.
    *(
        Trap(name, "undivided-group", lambda: made(shapes={"down_proj": (64, 112)}), made)
        for name in ("transformers", "vllm")
    ),
    Trap(
        "vllm",
        "half-words",
        lambda: made({"down": Scheme(4, -1)}, shapes=DOWN),
        lambda: made({"down": Scheme(8, -1)}, shapes=DOWN),
    ),
    Trap("vllm", "blocks", lambda: made(format=BLOCKS), made),
    Trap("vllm", "fused-scheme", lambda: made({"k_proj": WIDE}), lambda: made({"o_proj": WIDE})),
    Trap("vllm", "fused-scheme", lambda: made({"up": None}), lambda: made({"down": None})),
    Trap(
        "vllm",
        "fused-scheme",
        lambda: made({"0.mlp.experts.1": WIDE}, experts=2),
        lambda: made({"0.mlp.experts": WIDE}, experts=2),
    ),
    Trap("transformers", "conv1d", lambda: gpt2(CT), lambda: gpt2(GPTQ)),
    Trap("vllm", "conv1d", lambda: gpt2(CT), lambda: gpt2(GPTQ)),
    *(
        Trap(
            name,
            "config-disagrees",
            lambda: made({"layers.1": None}, told={"ignore": ["re:model.layers.0"]}),
            lambda: made({"layers.1": None}),
        )
        for name in ("transformers", "vllm")
    ),
    # Tensor parallelism.
    Trap("vllm", "group-under-tp", made, fine, 4),
    Trap("vllm", "rows-under-tp", lambda: made(shapes={"gate": (126, 64)}), fine, 4),
    Trap("vllm", "heads-under-tp", lambda: made(config={"num_attention_heads": 6}), fine, 4),
    # B2: gptq.
    Trap(
        "transformers",
        "gptq-three-bits",
        lambda: made(scheme=THREE, format=GPTQ),
        lambda: made(scheme=THREE, format=GPTQ, told=V2),
    ),
    Trap(
        "transformers",
        "gptq-zero-points",
        lambda: made(scheme=SHIFTED, format=GPTQ, told={"checkpoint_format": "gptq"}),
        lambda: made(scheme=SHIFTED, format=Gptq(v2=True)),
    ),
    Trap(
        "transformers",
        "gptq-width",
        lambda: made(scheme=Scheme(6, 32), format=GPTQ),
        lambda: made(format=GPTQ),
    ),
    *(
        Trap(
            name,
            "gptq-planar",
            lambda: made(format=GPTQ, told={"checkpoint_format": "gptq_p"}),
            lambda: made(format=GPTQ),
        )
        for name in ("transformers", "vllm")
    ),
    *(
        Trap(
            name,
            "gptq-undivided",
            lambda: made(format=GPTQ, shapes={"down_proj": (64, 112)}),
            lambda: made(format=GPTQ),
        )
        for name in ("transformers", "vllm")
    ),
    Trap("vllm", "gptq-width", lambda: made(scheme=THREE, format=GPTQ), lambda: made(format=GPTQ)),
    Trap(
        "vllm",
        "gptq-zero-points",
        lambda: made(scheme=SHIFTED, format=Gptq(v2=True)),
        lambda: made(format=GPTQ),
    ),
    Trap(
        "vllm",
        "gptq-order",
        lambda: made(format=GPTQ, told={"desc_act": True}),
        lambda: made(scheme=Scheme(4, -1), format=GPTQ, told={"desc_act": True}),
    ),
    # B3: the two linear classes of BitNet, its one scale, and who has it at all.
    Trap(
        "transformers",
        "bitnet-scale",
        lambda: ternary("bitlinear", 0.02),
        lambda: ternary("bitlinear", 50.0),
    ),
    Trap(
        "transformers",
        "bitnet-scale",
        lambda: ternary("autobitlinear", 50.0),
        lambda: ternary("autobitlinear", 0.02),
    ),
    Trap(
        "transformers",
        "bitnet-one-scale",
        lambda: ternary("autobitlinear", 0.02, 16),
        lambda: ternary("autobitlinear", 0.02),
    ),
    Trap(
        "transformers",
        "gguf-architecture",
        lambda: replace(made(config={"model_type": "olmo2"}), gguf=True),
        lambda: replace(made(config={"model_type": "llama"}), gguf=True),
    ),
    Trap(
        "transformers",
        "gguf-settings",
        lambda: replace(made(config={"model_type": "qwen3", "head_dim": 64}), gguf=True),
        lambda: replace(made(config={"model_type": "qwen3", "head_dim": 128}), gguf=True),
    ),
    Trap("vllm", "gguf", lambda: replace(made(), gguf=True), made),
    Trap("vllm", "method", lambda: ternary("bitlinear", 50.0), lambda: foreign("awq")),
    Trap("transformers", "method", lambda: foreign("sqznet"), lambda: foreign("awq")),
    # llama.cpp, by what an export becomes.
    Trap("llama.cpp", "folder", made, lambda: replace(made(), gguf=True)),
    Trap("llama.cpp", "zero-points", lambda: made(scheme=SHIFTED), made),
    Trap("llama.cpp", "block", lambda: made({"down": Scheme(4, -1)}, shapes=DOWN), made),
    Trap("llama.cpp", "group", lambda: made(scheme=Scheme(4, 16)), made),
]


def loader(name: str) -> Loader:
    return chosen([name])[0]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: f"{trap.loader}-{trap.rule}")
def test_trap_is_found_and_its_mended_twin_is_clean(trap: Trap) -> None:
    found = check(trap.broken(), [loader(trap.loader)], trap.tp)
    own = [one for one in found if one.rule == trap.rule]
    assert len(own) == 1, [one.rule for one in found]
    assert own[0].count >= 1
    assert own[0].first in own[0].words()
    left = check(trap.mended(), [loader(trap.loader)], trap.tp)
    rest = [one.rule for one in left if one.rule not in ("folder", trap.rule)]
    assert trap.rule not in {one.rule for one in left}
    assert rest == []


def test_every_rule_has_a_trap() -> None:
    named = {(trap.loader, trap.rule) for trap in TRAPS}
    loaders = chosen(["transformers,vllm,llama.cpp"])
    rules = {(one.name, rule.name) for one in loaders for rule in one.rules}
    assert named == rules


def test_old_words_are_those_of_the_old_layout() -> None:
    """26 words for 256 columns of 3 bits then, 24 now, by the formats' documentation."""
    assert words(256, 3) == 24
    assert -(-256 // (32 // 3)) == 26


@pytest.mark.parametrize(
    "spec",
    "transformers transformers>=5 vllm==0.33 vllm~=0.33 vllm<=0.33 vllm>0.32 vllm!=0.32 "
    "vllm<0.34 llama.cpp transformers>=5,vllm==0.33,llama.cpp".split(),
)
def test_targets_whose_rules_are_known(spec: str) -> None:
    names = [re.split("[=!~<>]", part)[0] for part in spec.split(",")]
    assert [one.name for one in chosen([spec])] == names


@pytest.mark.parametrize(
    ("spec", "says", "hint"),
    [
        ("vlm", "unknown loader `vlm`", "`vllm`"),
        ("vllm==0.32", "only the rules of 0.33", "vllm==0.33"),
        ("vllm>0.33", "only the rules of 0.33", "vllm==0.33"),
        ("vllm<0.33", "only the rules of 0.33", "vllm==0.33"),
        ("vllm!=0.33", "only the rules of 0.33", "vllm==0.33"),
        ("transformers>=6", "only the rules of 5.23", "transformers==5.23"),
        ("transformers~=4.50", "only the rules of 5.23", "transformers==5.23"),
        ("llama.cpp==1", "by version", "`llama.cpp`"),
        ("vllm==", "no loader", "vllm==0.33"),
        ("transformers>=5,<6", "no loader", "vllm==0.33"),
    ],
)
def test_targets_without_rules_are_refused(spec: str, says: str, hint: str) -> None:
    with pytest.raises(UnsupportedError, match=says) as refused:
        chosen([spec])
    assert hint in str(refused.value.hint)

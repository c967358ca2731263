"""GGUF files against gguf-py's reader, transformers' and llama.cpp itself."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from unicomp import builtin, gguf_model
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.kernels import load as dense_load
from unicomp.recipes.publish.export import export

# llama.cpp in a process of its own: what it writes on the terminal is not ours to keep apart.
LLAMA = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
for prompt in json.loads(sys.argv[2]):
    wanted = {"prompt": prompt, "n_predict": int(sys.argv[3]), "temperature": 0}
    wanted |= {"logprobs": int(sys.argv[4]), "cache_prompt": False}
    print("ANSWER " + json.dumps(server.handle_completions(wanted)))
"""

PROMPTS = [
    "Once upon a time, there was a little girl",
    "The cat sat.  It's 3 o'clock, 12 birds\nsang 'tis",
]

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
}


def llama_cpp(path: Path, prompts: list[Any], tokens: int, top: int) -> list[dict[str, Any]]:
    """Return llama.cpp's answers to prompts, one token at a time by greatest probability."""
    pytest.importorskip("xllamacpp")
    done = subprocess.run(
        [sys.executable, "-c", LLAMA, str(path), json.dumps(prompts), str(tokens), str(top)],
        capture_output=True,
        text=True,
        timeout=170,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(lines) == len(prompts), done.stderr[-2000:]
    return [json.loads(line.removeprefix("ANSWER ")) for line in lines]


def logprobs(answer: dict[str, Any]) -> dict[int, float]:
    """Return token -> log probability of the first token after the prompt."""
    top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    return {int(entry["id"]): float(entry["logprob"]) for entry in top}


@torch.no_grad()
def ours(folder: Path, ids: list[int]) -> torch.Tensor:
    """Return the log probabilities after a prompt, of the dense model in float32."""
    model = dense_load.load(folder)
    return model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def far(theirs: dict[int, float], own: torch.Tensor) -> float:
    """Return the greatest difference over the tokens that llama.cpp named."""
    return max(abs(value - float(own[token])) for token, value in theirs.items())


ARCHITECTURES = (
    "llama mistral qwen2 qwen3 mixtral qwen3_moe olmo2 phi3 gemma2 gemma3_text gpt2 gpt_neox"
).split()


def size_of(arch: str) -> dict[str, Any]:
    """Return what of a tiny model is set so that blocks fit and llama.cpp computes the same."""
    size: dict[str, Any] = WIDE | {"num_attention_heads": 4, "num_key_value_heads": 2}
    if arch == "gpt2":
        return {"n_embd": 256, "n_inner": 512, "n_head": 4}
    if arch == "gpt_neox":
        return WIDE | {"num_attention_heads": 4}
    if arch == "mistral":
        size |= {"head_dim": 64, "sliding_window": 64}
    if arch == "qwen2":
        size |= {"use_sliding_window": False}
    if arch == "qwen3":
        size |= {"head_dim": 64}
    if arch == "qwen3_moe":
        size |= {"mlp_only_layers": [], "moe_intermediate_size": 512, "head_dim": 64}
    if arch == "phi3":
        size |= {"sliding_window": None}
    if arch.startswith("gemma"):
        size |= {"head_dim": 64, "query_pre_attn_scalar": 64}
    if arch == "gemma3_text":
        kinds = ["sliding_attention"] * 5 + ["full_attention"]
        size |= {"num_hidden_layers": 6, "layer_types": kinds}
    return size


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_llama_cpp_computes_what_transformers_does(
    arch: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(arch, dtype=torch.float16, **size_of(arch))
    path = tmp_path / "model.gguf"
    done = export(str(folder), "gguf", path)
    assert path.stat().st_size == done.bytes
    ids = torch.arange(20, 44).tolist()
    (answer,) = llama_cpp(path, [ids], 1, 100)
    theirs = logprobs(answer)
    assert len(theirs) == 100
    own = ours(folder, ids)
    # llama.cpp rounds what F16 weights are multiplied with, and keys and values, to float16.
    assert far(theirs, own) < 0.01 * float(own.max() - own.min())
    assert far(theirs, own.roll(1)) > 1


def test_a_name_does_not_make_llama_cpp_end(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Of what is named Phi-3 llama.cpp looks up tokens: with that name the file would not load."""
    folder = tmp_path / "Phi-3-tiny"
    shutil.copytree(tiny_model("phi3", dtype=torch.float16, **size_of("phi3")), folder)
    path = tmp_path / "model.gguf"
    done = export(str(folder), "gguf", path)
    assert any("`phi 3-tiny`" in note and "`<|endoftext|>`" in note for note in done.notes)
    llama_cpp(path, [[20, 21]], 1, 2)
    data = path.read_bytes()
    assert data.count(b"phi 3-tiny") == 1
    path.write_bytes(data.replace(b"phi 3-tiny", b"phi-3-tiny"))
    with pytest.raises(AssertionError):
        llama_cpp(path, [[20, 21]], 1, 2)


def test_llama_cpp_tells_stories(assets: Path, tmp_path: Path) -> None:
    folder = assets / "models/stories260K"
    path = tmp_path / "stories.gguf"
    export(str(folder), "gguf", path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    answers = llama_cpp(path, PROMPTS, 24, 50)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert answer["usage"]["prompt_tokens"] == ids.shape[1]
        made = model.generate(ids, max_new_tokens=24, do_sample=False)
        tokens = [step["id"] for step in answer["choices"][0]["logprobs"]["content"]]
        theirs = tokenizer.decode(ids[0].tolist() + tokens)
        assert theirs == tokenizer.decode(made[0])
        assert far(logprobs(answer), ours(folder, ids[0].tolist())) < 0.05


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", None])
def test_llama_cpp_runs_the_embedded_model(kind: str | None, tmp_path: Path) -> None:
    folder = builtin.model("tinyworld")
    path = tmp_path / "tiny.gguf"
    done = export("builtin:tinyworld", "gguf", path, kind=kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt, answer in zip(PROMPTS, llama_cpp(path, PROMPTS, 8, 50), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert answer["usage"]["prompt_tokens"] == len(ids)
        apart = {None: 0.15, "q8_0": 0.4, "q4_0": 8.0}[kind]
        assert far(logprobs(answer), ours(folder, ids)) < apart
    assert {own.stored for own in done.verdicts.values()} == {
        {"q8_0": "Q8_0", "q4_0": "Q4_0", None: "F16"}[kind]
    }


def test_gguf_py_reads_the_codes_of_every_type(
    coded_model: Callable[..., Path], tmp_path: Path
) -> None:
    for bits, ternary, size, stored in [
        (4, False, 128, "Q4_0"),
        (3, False, 32, "Q4_0"),
        (8, False, -1, "Q8_0"),
        (5, False, 64, "Q8_0"),
        (2, True, -1, "TQ2_0"),
    ]:
        folder = coded_model("llama", bits=bits, group_size=size, ternary=ternary)
        path = tmp_path / f"{bits}-{size}.gguf"
        done = export(str(folder), "gguf", path)
        verdicts = set(done.verdicts.values())
        assert {(own.kind, own.stored) for own in verdicts} == {("exact", stored)}
        model = dense_load.load(folder).state_dict()
        read = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        for name, weight in model.items():
            if "_proj" not in name:
                continue
            place = gguf_model.place(name, {"model_type": "llama", "num_attention_heads": 4,
                                            "num_key_value_heads": 2})  # fmt: skip
            tensor = read[place.name]
            assert tensor.tensor_type.name == stored
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            meant = weight.numpy()
            if place.heads:
                meant = meant[gguf_model.row_order(len(meant), place.heads)]
            assert np.array_equal(values, meant), name
            assert not np.array_equal(values, meant[::-1])


def test_transformers_reads_the_file(coded_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = coded_model("llama", bits=4, group_size=64)
    export(str(folder), "gguf", tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    ids = torch.arange(20, 44)[None]
    with torch.no_grad():
        found = theirs(ids).logits
        meant = dense_load.load(folder)(ids).logits
    # Codes are exact; embeddings, head and norms of a float16 model are too.
    assert float((found - meant).abs().max()) < 1e-4
    assert float((found - meant.roll(1, -1)).abs().max()) > 1


# What transformers takes for settings that it does not read from a GGUF.
TAKEN: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gpt2": {"n_positions": 1024, "n_inner": None},
}


@pytest.mark.parametrize(
    ("arch", "size"), [*((arch, {}) for arch in ARCHITECTURES), *TAKEN.items()]
)
def test_transformers_reads_what_is_said_of_it(
    arch: str, size: dict[str, Any], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(arch, dtype=torch.float16, **size_of(arch) | size)
    said = export(str(folder), "gguf", tmp_path / "model.gguf").loaders["transformers"]
    assert (said is None) == (arch in "llama mistral qwen2 phi3".split() or bool(size))
    ids = torch.arange(20, 44)[None]
    with torch.no_grad():
        own = dense_load.load(folder)(ids).logits
        try:
            theirs = AutoModelForCausalLM.from_pretrained(
                tmp_path, gguf_file="model.gguf", dtype=torch.float32
            ).eval()
        except (ValueError, RuntimeError):
            assert said is not None
            return
        near = float((theirs(ids).logits - own).abs().max()) < 1e-3
    assert near == (said is None), said


def test_llama_cpp_runs_codes_of_every_type(
    coded_model: Callable[..., Path], tmp_path: Path
) -> None:
    for kind, ternary, bits, size in [
        (None, False, 4, 128),
        (None, False, 8, 32),
        ("tq1_0", True, 2, 256),
        ("tq2_0", True, 2, -1),
    ]:
        folder = coded_model("llama", bits=bits, group_size=size, ternary=ternary)
        path = tmp_path / f"{kind}-{bits}.gguf"
        export(str(folder), "gguf", path, kind=kind)
        ids = torch.arange(20, 44).tolist()
        (answer,) = llama_cpp(path, [ids], 1, 100)
        own = ours(folder, ids)
        # llama.cpp rounds activations to 8 bits: by a share of what logits span.
        assert far(logprobs(answer), own) < 0.05 * float(own.max() - own.min())


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "gemma2", "olmo2"])
def test_codes_go_where_rows_are_moved_and_turned(
    arch: str, coded_model: Callable[..., Path], tmp_path: Path
) -> None:
    size = size_of(arch) | {"num_hidden_layers": 2}
    if arch == "gpt2":
        size |= {"num_key_value_heads": 4}
    folder = coded_model(arch, bits=4, group_size=-1 if arch == "gpt2" else 32, **size)
    done = export(str(folder), "gguf", tmp_path / "model.gguf")
    assert {own.stored for own in done.verdicts.values()} == {"Q4_0"}
    ids = torch.arange(20, 44).tolist()
    (answer,) = llama_cpp(tmp_path / "model.gguf", [ids], 1, 100)
    own = ours(folder, ids)
    assert far(logprobs(answer), own) < 0.05 * float(own.max() - own.min())
    assert far(logprobs(answer), own.roll(1)) > 1


@pytest.mark.parametrize(
    ("arch", "changes", "why"),
    [
        ("gemma2", {"query_pre_attn_scalar": 24}, "another root than this model"),
        ("gemma2", {"layer_types": ["full_attention"] * 2}, "in each 2th layer of `gemma2`"),
        ("gemma3_text", {}, "in each 6th layer of `gemma3_text`"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "attention of gpt2"),
        ("gpt_neox", {"attention_bias": False}, "wants biases"),
        ("gpt_neox", {"hidden_act": "relu"}, "computes gelu for `gpt_neox`, not `relu`"),
        ("olmo2", {"hidden_act": "gelu"}, "computes silu for `olmo2`, not `gelu`"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(
    arch: str,
    changes: dict[str, Any],
    why: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tiny_model(arch, dtype=torch.float16, **changes)
    with pytest.raises(UnsupportedError, match=why) as caught:
        export(str(folder), "gguf", tmp_path / "model.gguf")
    assert "compressed-tensors" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_what_no_block_divides_is_said(coded_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = coded_model("llama", bits=4, group_size=64, intermediate_size=320 + 16)
    done = export(str(folder), "gguf", tmp_path / "model.gguf")
    down = done.verdicts["model.layers.0.mlp.down_proj"]
    assert (down.kind, down.stored) == ("fallback", "F16")
    assert "in_features 336 is not a multiple of Q8_0's block of 32" in str(down.why)
    with pytest.raises(UnsupportedError, match=r"`model\.layers\.0.*TQ2_0 holds codes") as caught:
        export(str(folder), "gguf", tmp_path / "other.gguf", kind="tq2_0")
    assert "docs/formats.md" in str(caught.value.hint)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]


def test_what_llama_cpp_would_do_otherwise_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path, assets: Path
) -> None:
    with pytest.raises(UnsupportedError, match=r"`opt`: llama\.cpp has no architecture for it"):
        export(str(tiny_model("opt")), "gguf", tmp_path / "model.gguf")
    with pytest.raises(UnsupportedError, match="experts in every layer"):
        export(str(tiny_model("qwen3_moe")), "gguf", tmp_path / "model.gguf")
    folder = assets / "models/templateGPT-llama3-1M"
    with pytest.raises(UnsupportedError, match="no way of cutting that"):
        export(str(folder), "gguf", tmp_path / "model.gguf")
    with pytest.raises(UnicompError, match="no name for a GGUF file"):
        export("builtin:tinyworld", "gguf", tmp_path / "model")
    assert not list(tmp_path.iterdir())

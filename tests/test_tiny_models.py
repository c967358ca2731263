"""The tiny models are worth testing with: whole on disk, finite, and every tensor matters."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ARCHITECTURES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "olmo2",
    "mixtral",
    "qwen3_moe",
]


def test_every_architecture_is_listed(architectures: list[str]) -> None:
    assert architectures == ARCHITECTURES


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_loads_whole_and_every_tensor_shows(arch: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(arch)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model.eval()
    ids = torch.randint(4, 128, (4, 48))
    ids[0] = torch.randint(4, 128, (48,)).sort().values
    with torch.no_grad():
        logits = model(ids).logits
        assert logits.isfinite().all()
        assert logits.std() > 0.2
        assert logits.abs().max() < 200
        for name, parameter in model.named_parameters():
            parts = parameter if parameter.ndim == 3 else [parameter]  # each expert for itself
            for index, part in enumerate(parts):
                kept = part.clone()
                part.zero_()
                change = (model(ids).logits - logits).abs().max()
                part.copy_(kept)
                # A constant added to every key moves all scores of a query alike: softmax drops
                # it, so a key bias shows only where rope turns it (not in opt).
                if arch == "opt" and name.endswith("k_proj.bias"):
                    continue
                assert change > 1e-2, f"{name}[{index}] does not show: {change}"


@pytest.mark.parametrize("arch", ["qwen2", "gemma2", "gemma3_text", "mistral", "phi3"])
def test_window_is_shorter_than_a_test_sequence(arch: str, tiny_model: Callable[..., Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model(arch))
    wide = AutoModelForCausalLM.from_pretrained(tiny_model(arch), sliding_window=4096)
    ids = torch.randint(4, 128, (1, 48))
    with torch.no_grad():
        assert (model(ids).logits - wide(ids).logits).abs().max() > 1e-3


def test_same_call_same_folder_and_same_seed_same_weights(
    tiny_model: Callable[..., Path],
) -> None:
    folder = tiny_model("llama")
    assert tiny_model("llama") == folder
    other = tiny_model("llama", seed=1)
    same = tiny_model("llama", seed=0, max_position_embeddings=128)
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, same))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    changed = load_file(other / "model.safetensors")
    assert not any(torch.equal(ours[name], changed[name]) for name in ours)


def test_options_reach_the_disk(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", dtype=torch.bfloat16, shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert (folder / "model.safetensors.index.json").is_file()
    assert {t.dtype for shard in shards for t in load_file(shard).values()} == {torch.bfloat16}


def test_experts_lie_on_disk_one_by_one_or_fused(tiny_model: Callable[..., Path]) -> None:
    apart = load_file(tiny_model("qwen3_moe") / "model.safetensors")
    fused = load_file(tiny_model("qwen3_moe", fused_experts=True) / "model.safetensors")
    assert all(tensor.ndim < 3 for tensor in apart.values())
    assert any(tensor.ndim == 3 for tensor in fused.values())
    assert "model.layers.0.mlp.gate_proj.weight" in apart
    assert "model.layers.1.mlp.experts.5.down_proj.weight" in apart


def test_dropped_tensor_is_reported(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.layers.1.mlp.up_proj.weight"}


def test_tokenizer_round_trips_text(tiny_model: Callable[..., Path], tiny_text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    text = "The dog said hello.\nThen it ran to the river!"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < 128
    assert len(ids) < len(text)
    assert tokenizer("</s>")["input_ids"] == [2]
    stories = tiny_text.read_text(encoding="utf-8")
    assert len(tokenizer(stories)["input_ids"]) > 128 * 256

"""Loading is strict, keeps what belongs to the model, and takes any names that files have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unicomp.errors import CheckpointError, UnicompError, UnsupportedError
from unicomp.kernels.load import load


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(4, 36)[None]).logits
    return found


@pytest.mark.parametrize(
    "arch", ["llama", "qwen2", "gemma3_text", "gpt2", "gpt_neox", "opt", "mixtral", "qwen3_moe"]
)
def test_a_plain_checkpoint_is_what_transformers_loads(
    arch: str, tiny_model: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model(arch)
    model = load(folder)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is type(stock)
    assert not model.training
    assert torch.equal(logits(model), logits(stock))


def test_shards_stacked_experts_and_half_precision(tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    for folder, dtype in (
        (tiny_model("llama", shard_size="40KB"), torch.float32),
        (tiny_model("mixtral", fused_experts=True), torch.float32),
        (tiny_model("llama", dtype=torch.bfloat16), torch.bfloat16),
        (tiny_model("llama", dtype=torch.bfloat16), torch.float32),
        (tiny_model("llama"), torch.float16),
    ):
        stock = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        model = load(folder, dtype=dtype)
        assert model.dtype == dtype
        assert torch.equal(logits(model), logits(stock))


def test_a_tied_head_stays_tied(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model("qwen2"))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight.data_ptr() == table.weight.data_ptr()


def test_generation_settings_come_along(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7}))
    config = load(folder).generation_config
    assert config is not None
    assert config.max_new_tokens == 7


def change(source: Path, folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Copy a checkpoint with tensors replaced, or left out where None."""
    shutil.copytree(source, folder)
    found = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in (found | tensors).items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_and_a_foreign_tensor_are_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source, name = tiny_model("llama"), "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"missing_keys: `model.layers.1.mlp.up_proj.weight`"):
        load(change(source, tmp_path / "a", **{name: None}))
    with pytest.raises(CheckpointError, match=r"unexpected_keys: `model.foreign`"):
        load(change(source, tmp_path / "b", **{"model.foreign": torch.ones(2)}))


def test_a_tensor_of_another_shape_is_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    wrong = {"model.layers.1.mlp.up_proj.weight": torch.ones(3, 5)}
    with pytest.raises(UnicompError, match=r"up_proj"):
        load(change(tiny_model("llama"), tmp_path / "a", **wrong))


def test_legacy_tensors_are_left_out(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("gpt2")
    old = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    assert torch.equal(logits(load(change(source, tmp_path / "a", **old))), logits(load(source)))


def test_an_unknown_model_type_and_dtype_are_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(UnsupportedError, match="nonesuch"):
        load(folder)
    with pytest.raises(UnsupportedError, match="int8"):
        load(tiny_model("llama"), dtype=torch.int8)

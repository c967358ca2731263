"""Sizes: bytes of files and tensors, and what counts as a weight."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unicomp.checkpoint import Checkpoint
from unicomp.evaluate import efficiency


def _torch_count(folder: Path) -> int:
    """Count the parameters of the model that transformers makes, each once."""
    from transformers import AutoModelForCausalLM

    return int(AutoModelForCausalLM.from_pretrained(folder).num_parameters())


def test_parameters_are_those_of_transformers_for_every_architecture(
    tiny_model: Callable[..., Path], architectures: list[str]
) -> None:
    for arch in architectures:
        folder = tiny_model(arch)
        assert efficiency.parameters(Checkpoint.open(folder)) == _torch_count(folder), arch


def test_a_tied_head_that_is_stored_counts_once(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model("qwen2"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    before = efficiency.parameters(Checkpoint.open(folder))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    twice = Checkpoint.open(folder)
    assert efficiency.parameters(twice) == before
    # Its bytes are there all the same.
    size = 4 * tensors["lm_head.weight"].numel()
    assert efficiency.tensor_bytes(twice) == 4 * before + size


def test_disk_bytes_are_those_of_all_weight_files(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", shard_size="40KB")
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) > 1
    found = efficiency.disk_bytes(Checkpoint.open(folder))
    assert found == sum(file.stat().st_size for file in shards)
    assert efficiency.disk_bytes(Checkpoint.open(tiny_model("llama"))) < found


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 32), (torch.bfloat16, 16)])
def test_bits_per_weight_of_plain_models(
    tiny_model: Callable[..., Path], dtype: torch.dtype, bits: int
) -> None:
    size, weight = efficiency.scores(tiny_model("llama", dtype=dtype), tiny_model("llama"))
    assert weight.name == "efficiency/bits_per_weight"
    assert weight.value == bits
    assert weight.baseline == 32
    assert weight.delta == bits - 32
    assert size.name == "efficiency/disk_bytes"
    assert size.unit == "bytes"
    assert size.ci95 is None
    assert (size.delta == 0) == (bits == 32)


def test_a_packed_word_is_eight_weights(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from unicomp.kernels.format import find
    from unicomp.kernels.packed import PackedTensor, Scheme

    plain = tiny_model("llama")
    folder = shutil.copytree(plain, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    scheme = Scheme(bits=4, group_size=32)
    layout = find("compressed-tensors")
    module = "model.layers.0.self_attn.q_proj"
    shape = tuple(tensors.pop(f"{module}.weight").shape)
    packed = PackedTensor(
        torch.zeros(shape, dtype=torch.int8), torch.ones(shape[0], shape[1] // 32), None, scheme
    )
    tensors |= layout.pack(module, packed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dense = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.ndim == 2 and name.endswith("proj.weight")
    ]
    config = Checkpoint.open(folder).config
    config["quantization_config"] = layout.config({module: scheme}, [*dense, "lm_head"])
    _write_config(folder, config)
    checkpoint = Checkpoint.open(folder)
    count = efficiency.parameters(Checkpoint.open(plain))
    assert efficiency.parameters(checkpoint) == count
    weight = efficiency.scores(folder, None)[1]
    saved = shape[0] * shape[1] * 3.5 - shape[0] * shape[1] // 32 * 4 - 16  # int64 [2] of the shape
    assert weight.value == pytest.approx(8 * (4 * count - saved) / count)
    assert weight.baseline is None


def test_an_unknown_architecture_is_not_measured(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    config = Checkpoint.open(folder).config
    config["model_type"] = "rwkv"
    _write_config(folder, config)
    size, weight = efficiency.scores(folder, None)
    assert size.status == "measured"
    assert weight.status == "unmeasurable"
    assert "`rwkv`" in weight.detail["reason"]
    # As a baseline it takes away the comparison, not the score.
    weight = efficiency.scores(tiny_model("llama"), folder)[1]
    assert weight.value == 32
    assert weight.baseline is None
    assert "`rwkv`" in weight.detail["baseline"]


def _write_config(folder: Path, config: dict[str, object]) -> None:
    import json

    (folder / "config.json").write_text(json.dumps(config))

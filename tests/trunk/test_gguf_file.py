"""GGUF files as models: ours, and those that gguf-py quantized."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from unicomp import blocks, builtin
from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.hub import resolve
from unicomp.kernels import load as dense_load
from unicomp.kernels import packed_model
from unicomp.recipes.export import export

IDS = torch.arange(20, 44)[None]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return dense_load.load(folder)(IDS).logits


def rounded(kind: str, rows: blocks.Floats) -> blocks.Floats:
    """Return rows as the type holds them; a block never spans two, so their order is free."""
    return blocks.dequantize(*blocks.nearest(kind, rows))


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", [None, "q8_0", "q4_0"])
def test_a_file_of_ours_is_the_model_again(
    arch: str, kind: str | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "use_sliding_window": False}
    if not arch.startswith("qwen2"):
        del size["use_sliding_window"]
    if arch == "qwen3_moe":
        size |= {"mlp_only_layers": [], "moe_intermediate_size": 96}
    folder = tiny_model(arch, dtype=torch.float16, **size)
    path = tmp_path / "model.gguf"
    export(str(folder), "gguf", path, kind=kind)
    source = resolve(str(path))
    assert source.id == "model.gguf"
    found, meant = (dense_load.load(own).state_dict() for own in (source.folder, folder))
    assert list(found) == list(meant)
    for name, weight in meant.items():
        expected = weight.numpy()
        if kind is not None and "_proj" in name and expected.ndim > 1:
            rows = expected.reshape(-1, expected.shape[-1])
            expected = rounded(kind.upper(), rows).reshape(expected.shape)
            if "experts" in name:  # transformers multiplies these out in the scale's own dtype
                expected = expected.astype(np.float16)
        assert np.array_equal(found[name].numpy(), expected), name
    assert not torch.equal(logits(source.folder), logits(folder).roll(1, -1))
    assert resolve(str(path)).folder == source.folder
    if kind is not None and arch == "llama":
        model = packed_model.load(path, compute="exact", dtype=torch.float32)
        assert packed_model.loaded(model).packed == 21
        with torch.no_grad():
            assert float((model(IDS).logits - logits(source.folder)).abs().max()) < 1e-3


@pytest.mark.parametrize("model", ["tinyworld", "stories260K"])
def test_the_tokenizer_comes_back(model: str, assets: Path, tmp_path: Path) -> None:
    folder = builtin.model(model) if model == "tinyworld" else assets / "models" / model
    export(str(folder), "gguf", tmp_path / "model.gguf")
    first = AutoTokenizer.from_pretrained(folder)
    second = AutoTokenizer.from_pretrained(resolve(str(tmp_path / "model.gguf")).folder)
    text = (builtin.FOLDER / "text/heldout.txt").read_text("utf-8")[:20000]
    for part in [text, "It's 12 o'clock.\n\n  Two  spaces", "na\u00efve \u4f60\u597d", ""]:
        assert first(part)["input_ids"] == second(part)["input_ids"]
    assert first.decode(first(text)["input_ids"]) == second.decode(second(text)["input_ids"])
    assert first.chat_template == second.chat_template
    assert (first.bos_token_id, first.eos_token_id) == (second.bos_token_id, second.eos_token_id)


def test_a_file_of_another_tool_is_read(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Types that we never write, by gguf-py's own quantizers, in one file with those that we do."""
    folder = tiny_model("llama", dtype=torch.float16, hidden_size=64, intermediate_size=96)
    export(str(folder), "gguf", tmp_path / "plain.gguf")
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    kinds = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F32", "BF16"]
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    meant = {}
    linears = 0
    for tensor in reader.tensors:
        data = tensor.data
        if "attn_norm" not in tensor.name and len(tensor.shape) == 2 and "blk." in tensor.name:
            kind = gguf.GGMLQuantizationType[kinds[linears % len(kinds)]]
            linears += 1
            values = np.asarray(data, dtype=np.float32)
            data = gguf.quantize(values, kind)
            meant[tensor.name] = gguf.dequantize(data, kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = dense_load.load(resolve(str(tmp_path / "theirs.gguf")).folder).state_dict()
    for layer in range(3):
        up = weights[f"model.layers.{layer}.mlp.up_proj.weight"].numpy()
        theirs = meant[f"blk.{layer}.ffn_up.weight"]
        assert np.allclose(up, theirs, rtol=1e-3, atol=1e-6)
        assert not np.allclose(up, theirs[::-1], rtol=1e-3, atol=1e-6)
    assert linears == 21


def test_what_is_no_gguf_is_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        resolve(str(tmp_path / "a.gguf"))
    folder = tiny_model("llama", hidden_size=64, intermediate_size=96)
    export(str(folder), "gguf", tmp_path / "b.gguf")
    whole = (tmp_path / "b.gguf").read_bytes()
    (tmp_path / "c.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as GGUF"):
        resolve(str(tmp_path / "c.gguf"))
    writer = gguf.GGUFWriter(tmp_path / "d.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedError, match="architecture `mamba` is not read yet"):
        resolve(str(tmp_path / "d.gguf"))
    assert not list((tmp_path / "cache/unicomp/gguf").glob("*/config.json"))

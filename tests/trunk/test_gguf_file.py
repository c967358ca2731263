"""GGUF files as models: ours, and those that gguf-py quantized."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from unicomp import blocks, builtin, gguf_file, gguf_model
from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.hub import resolve
from unicomp.kernels import load as dense_load
from unicomp.kernels import packed_model
from unicomp.recipes.publish.export import export

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
    kinds = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "F32", "BF16"]
    meant: dict[str, blocks.Floats] = {}

    def change(name: str, data: Any) -> tuple[Any, str] | None:
        if data.ndim != 2 or not name.startswith("blk."):
            return None
        kind = kinds[len(meant) % len(kinds)]
        found = gguf.quantize(np.asarray(data, np.float32), gguf.GGMLQuantizationType[kind])
        meant[name] = gguf.dequantize(found, gguf.GGMLQuantizationType[kind])
        return found, kind

    rewritten(tmp_path / "plain.gguf", tmp_path / "theirs.gguf", change)
    weights = dense_load.load(resolve(str(tmp_path / "theirs.gguf")).folder).state_dict()
    for layer in range(3):
        up = weights[f"model.layers.{layer}.mlp.up_proj.weight"].numpy()
        theirs = meant[f"blk.{layer}.ffn_up.weight"]
        assert np.allclose(up, theirs, rtol=1e-3, atol=1e-6)
        assert not np.allclose(up, theirs[::-1], rtol=1e-3, atol=1e-6)
    assert len(meant) == 21


class _Traits(ctypes.Structure):
    """`ggml_type_traits` of ggml.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("values", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("nbytes", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def llama_cpp_quantizes(kind: str, values: blocks.Floats) -> tuple[blocks.Bytes, blocks.Floats]:
    """Return what llama.cpp's own C makes of rows: bytes, and the values it reads from them."""
    module = pytest.importorskip("xllamacpp")
    lib = ctypes.CDLL(str(Path(module.__file__).parent / "xllamacpp.abi3.so"))
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    number = int(gguf.GGMLQuantizationType[kind])
    traits = lib.ggml_get_type_traits(number).contents
    rows, columns = values.shape
    found = np.zeros((rows, columns // traits.values * traits.nbytes), np.uint8)
    pointers = [ctypes.c_void_p(own.ctypes.data) for own in (values, found)]
    sizes = [ctypes.c_int64(size) for size in (0, rows, columns)]
    lib.ggml_quantize_chunk(ctypes.c_int(number), *pointers, *sizes, None)
    back = np.zeros_like(values)
    for row in range(rows):
        traits.to_float(found[row:].ctypes.data, back[row:].ctypes.data, columns)
    return found, back


def rewritten(
    source: Path, out: Path, change: Callable[[str, Any], tuple[Any, str] | None]
) -> None:
    """Write a GGUF file again, with other data and another type where `change` returns them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        other = change(tensor.name, tensor.data)
        if other is None:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            writer.add_tensor(tensor.name, other[0], raw_dtype=gguf.GGMLQuantizationType[other[1]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Each type that llama.cpp quantizes to without an importance matrix; for three of them it first
# works out tables, for seconds.
LARGE = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 MXFP4 NVFP4".split()
SMALL = ["IQ3_XXS", "IQ4_NL", "IQ4_XS"]
SLOW = ["IQ1_M", "IQ2_S", "IQ3_S"]


@pytest.mark.parametrize("types", [SMALL, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_every_type_of_llama_cpp_is_read_as_it_reads_it(
    types: list[str], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    size = {"hidden_size": 256, "intermediate_size": 256, "num_key_value_heads": 1}
    folder = tiny_model("llama", dtype=torch.float16, **size)
    export(str(folder), "gguf", tmp_path / "plain.gguf")
    meant: dict[str, tuple[str, blocks.Floats]] = {}
    small, large = list(types), list(LARGE)

    def change(name: str, data: Any) -> tuple[Any, str] | None:
        left = small if len(data) < 256 else large
        if not left or data.ndim != 2 or not name.startswith("blk."):
            return None
        kind = left.pop()
        found, values = llama_cpp_quantizes(kind, np.asarray(data, np.float32))
        meant[name] = kind, values
        return found, kind

    rewritten(tmp_path / "plain.gguf", tmp_path / "theirs.gguf", change)
    assert not small
    assert not large
    weights = dense_load.load(resolve(str(tmp_path / "theirs.gguf")).folder).state_dict()
    for name, (kind, theirs) in meant.items():
        module, _ = gguf_model.original(name, "llama")
        found = weights[module].numpy()
        rows = theirs if kind in gguf_file.BITS else theirs.astype(np.float16).astype(np.float32)
        if ".attn_q." in name or ".attn_k." in name:
            rows = rows[gguf_model.row_order(len(rows), len(rows) // 64, back=True)]
        assert np.array_equal(found, rows), (kind, name)
        assert not np.array_equal(found, rows[::-1]), kind


def test_a_type_that_nobody_reads_is_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama", dtype=torch.float16, hidden_size=256, intermediate_size=256)
    export(str(folder), "gguf", tmp_path / "plain.gguf")

    def change(name: str, data: Any) -> tuple[Any, str] | None:
        if name != "blk.1.ffn_up.weight":
            return None
        return llama_cpp_quantizes("Q1_0", np.asarray(data, np.float32))[0], "Q1_0"

    rewritten(tmp_path / "plain.gguf", tmp_path / "theirs.gguf", change)
    with pytest.raises(UnsupportedError, match=r"`model\.layers\.1.*up_proj.*type Q1_0") as caught:
        resolve(str(tmp_path / "theirs.gguf"))
    assert "safetensors" in str(caught.value.hint)


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

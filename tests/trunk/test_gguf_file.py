"""GGUF files as models: ours, and those that gguf-py quantized."""

import ctypes
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from unicomp import blocks, builtin, gguf_file, gguf_model
from unicomp.checkpoint import Checkpoint
from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.hub import resolve
from unicomp.kernels import load as dense_load
from unicomp.kernels import packed_model
from unicomp.recipes.publish.export import export

IDS = torch.arange(20, 44)[None]
# Linears of layers by their names in transformers: experts have no `.weight` there.
LINEAR = re.compile(
    r"_proj(\.weight)?$|\.c_(attn|proj|fc)\.weight$|query_key_value\.weight$|\.dense\w*\.weight$"
)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return dense_load.load(folder)(IDS).logits


def rounded(kind: str, rows: blocks.Floats) -> blocks.Floats:
    """Return rows as the type holds them; a block never spans two, so their order is free."""
    return blocks.dequantize(*blocks.nearest(kind, rows))


def size_of(arch: str) -> dict[str, Any]:
    """Return what of a tiny model is set so that blocks fit and llama.cpp computes the same."""
    if arch == "gpt2":
        return {"n_embd": 64, "n_inner": 96}
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    return size | {
        "qwen2": {"use_sliding_window": False},
        "qwen3_moe": {"mlp_only_layers": [], "moe_intermediate_size": 96},
        "phi3": {"sliding_window": None, "partial_rotary_factor": 0.5},
        "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8},
        "gemma3_text": {
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "layer_types": kinds,
        },
    }.get(arch, {})


# Not mistral: a file says `llama` of both, and within the context both compute the same.
ARCHITECTURES = (
    "llama qwen2 qwen3 mixtral qwen3_moe olmo2 phi3 gemma2 gemma3_text gpt2 gpt_neox".split()
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", [None, "q8_0", "q4_0"])
def test_a_file_of_ours_is_the_model_again(
    arch: str, kind: str | None, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(arch, dtype=torch.float16, **size_of(arch))
    path = tmp_path / "model.gguf"
    export(str(folder), "gguf", path, kind=kind)
    source = resolve(str(path))
    assert source.id == "model.gguf"
    again, model = (dense_load.load(own) for own in (source.folder, folder))
    found, meant = again.state_dict(), model.state_dict()
    assert list(found) == list(meant)
    exact = dict(found)
    for name, weight in meant.items():
        expected = weight.numpy()
        if kind is not None and LINEAR.search(name):
            turned = expected.T if arch == "gpt2" else expected
            rows = turned.reshape(-1, turned.shape[-1])
            expected = rounded(kind.upper(), rows).reshape(turned.shape)
            expected = expected.T if arch == "gpt2" else expected
            exact[name] = torch.from_numpy(expected.copy())
            if "experts" in name or arch == "gpt2":  # made dense in the scale's own dtype
                expected = expected.astype(np.float16)
        own = found[name].numpy()
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            assert np.abs(own - expected).max() < 1e-7, name  # 1 was added, and taken off
        else:
            assert np.array_equal(own, expected), name
    with torch.no_grad():  # the same weights: what is left is what config.json says
        model.load_state_dict(found)
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert resolve(str(path)).folder == source.folder
    if kind is not None:
        packed = packed_model.load(path, compute="exact", dtype=torch.float32)
        stored = Checkpoint.open(source.folder).tensors
        count = sum(name.endswith("weight_packed") for name in stored)
        assert packed_model.loaded(packed).packed == count > 0
        with torch.no_grad():
            model.load_state_dict(exact)
            assert float((packed(IDS).logits - model(IDS).logits).abs().max()) < 1e-3


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
    source: Path,
    out: Path,
    change: Callable[[str, Any], tuple[Any, str] | None] = lambda name, data: None,
    fields: Mapping[str, Any] | None = None,
) -> None:
    """Write a GGUF file again, with other data and another type where `change` returns them.

    fields  metadata that change; None: left out
    """
    reader = gguf.GGUFReader(source)
    fields = fields or {}
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", *fields):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for name, value in fields.items():
        if value is not None:
            kind = gguf.GGUFValueType.get_type(value)
            sub = gguf.GGUFValueType.INT32 if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, value, kind, sub_type=sub)
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
            rows = rows[np.argsort(gguf_model.row_order(len(rows), len(rows) // 64))]
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


NUMBERS = [
    (arch, f"{gguf_model.ROWS[arch].name}.{key}")
    for arch in ARCHITECTURES
    for key in gguf_model.ROWS[arch].numbers
    if key not in ("vocab_size", "attention.head_count_kv", "expert_count")
]


@pytest.mark.parametrize(("arch", "key"), NUMBERS)
def test_metadata_that_are_not_there_are_named(
    arch: str, key: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model(arch, dtype=torch.float16, **size_of(arch))
    export(str(folder), "gguf", tmp_path / "whole.gguf")
    rewritten(tmp_path / "whole.gguf", tmp_path / "part.gguf", fields={key: None})
    with pytest.raises(CheckpointError, match=f"the file has no `{re.escape(key)}`") as caught:
        resolve(str(tmp_path / "part.gguf"))
    assert "make it again" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("arch", "fields", "why"),
    [
        ("llama", {"llama.rope.dimension_count": 8}, "rotates 8 of a head's 16 values"),
        ("llama", {"llama.rope.scaling.type": "yarn"}, "rope scaling `yarn` is not read yet"),
        ("gemma3_text", {"gemma3.attention.head_count_kv": [2] * 6}, "is no number but list"),
        ("olmo2", {"olmo2.attention.sliding_window": 8}, "OLMo 3, is not read yet"),
        ("qwen2", {"qwen2.expert_count": 4}, "architecture `qwen2` with experts"),
    ],
)
def test_what_no_config_says_is_refused(
    arch: str,
    fields: dict[str, Any],
    why: str,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = tiny_model(arch, dtype=torch.float16, **size_of(arch))
    export(str(folder), "gguf", tmp_path / "whole.gguf")
    rewritten(tmp_path / "whole.gguf", tmp_path / "other.gguf", fields=fields)
    with pytest.raises(UnsupportedError, match=why):
        resolve(str(tmp_path / "other.gguf"))


def test_a_model_without_its_own_head_is_no_gpt_neox(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("gpt_neox", dtype=torch.float16)
    export(str(folder), "gguf", tmp_path / "whole.gguf")
    fields = {n: f.contents() for n, f in gguf.GGUFReader(tmp_path / "whole.gguf").fields.items()}
    assert gguf_model.config(fields, False, None)["model_type"] == "gpt_neox"
    with pytest.raises(CheckpointError, match=r"no tensor `output\.weight`"):
        gguf_model.config(fields, True, None)


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

"""Checkpoints read what the safetensors library and transformers wrote, and nothing more."""

import hashlib
import json
import math
import struct
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unicomp.checkpoint import DTYPE_BITS, DTYPES, Checkpoint, check_finite, stored_shape
from unicomp.errors import CheckpointError, UnsupportedError


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bytes at all are a tensor, so NaN patterns are covered too; a bool is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * DTYPE_BITS[dtype] // 8
    high = 2 if dtype == "BOOL" else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return data.view(DTYPES[dtype]).reshape(stored_shape(dtype, shape))


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def config(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=2,
        )
    )


@pytest.mark.parametrize("shape", [(), (0,), (6,), (3, 4), (2, 0, 4), (2, 3, 2)])
@pytest.mark.parametrize("dtype", [name for name in DTYPES if name != "F4"])
def test_reads_what_safetensors_wrote(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(dtype, shape, 1)
    save_file({"first": torch.zeros(3), "a": tensor}, config(tmp_path) / "model.safetensors")
    read = Checkpoint.open(tmp_path).read("a")
    assert read.dtype == tensor.dtype
    assert read.shape == tensor.shape
    assert as_bytes(read) == as_bytes(tensor)


@pytest.mark.skipif("F4" not in DTYPES, reason="this torch has no 4-bit float")
def test_four_bit_floats_read_as_pairs(tmp_path: Path) -> None:
    tensor = random_tensor("F4", (4, 6), 2)
    save_file({"a": tensor}, config(tmp_path) / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors["a"].shape == (4, 6)
    assert checkpoint.read("a").shape == (4, 3)
    assert as_bytes(checkpoint.read("a", slice(1, 3))) == as_bytes(tensor)[3:9]


def test_values_are_little_endian(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    data = struct.pack("<2f", 1.5, -2.0)
    file = config(tmp_path) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    assert Checkpoint.open(tmp_path).read("a").tolist() == [1.5, -2.0]


def test_other_byte_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.zeros(3)}, config(tmp_path) / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(UnsupportedError, match="little-endian"):
        checkpoint.read("a")


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple),
    rows=st.tuples(st.none() | st.integers(-7, 7), st.none() | st.integers(-7, 7)),
    dtype=st.sampled_from(["F32", "BF16", "I8", "F64", "BOOL"]),
)
def test_rows_are_as_python_slices(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, ...],
    rows: tuple[int | None, int | None],
    dtype: str,
) -> None:
    folder = config(tmp_path_factory.mktemp("rows"))
    tensor = random_tensor(dtype, shape, 3)
    save_file({"a": tensor, "b": tensor.clone()}, folder / "model.safetensors")
    part = Checkpoint.open(folder).read("b", slice(*rows))
    assert part.shape == tensor[slice(*rows)].shape
    assert as_bytes(part) == as_bytes(tensor[slice(*rows)])


@pytest.mark.parametrize(("name", "rows"), [("a", slice(0, 4, 2)), ("scalar", slice(0, 1))])
def test_rows_that_are_no_rows_are_a_fault_of_the_caller(
    tmp_path: Path, name: str, rows: slice
) -> None:
    tensors = {"a": torch.zeros(4, 2), "scalar": torch.tensor(1.0)}
    save_file(tensors, config(tmp_path) / "model.safetensors")
    with pytest.raises(ValueError, match=f"`{name}`"):
        Checkpoint.open(tmp_path).read(name, rows)


@pytest.mark.parametrize("size", ["10MB", "20KB", "8KB"])
def test_reads_what_transformers_saved(tmp_path: Path, size: str) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path, max_shard_size=size)
    checkpoint = Checkpoint.open(tmp_path)
    assert (len(checkpoint.shards) > 1) == (size != "10MB")
    state = model.state_dict()
    assert checkpoint.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.config["model_type"] == "llama"


def test_a_read_is_its_own_memory(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, config(tmp_path) / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.read("a").zero_()
    assert checkpoint.read("a").tolist() == [1, 1, 1]


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    file = config(tmp_path) / "model.safetensors"
    save_file({"a": torch.ones(4_000_000)}, file)
    tracemalloc.start()
    Checkpoint.open(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


def test_threads_may_read_at_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((1000,), float(i)) for i in range(8)}
    save_file(tensors, config(tmp_path) / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    wrong: list[str] = []

    def check(name: str) -> None:
        for _ in range(50):
            if not torch.equal(checkpoint.read(name), tensors[name]):
                wrong.append(name)

    threads = [threading.Thread(target=check, args=(name,)) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_files_and_hashes(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    for name in ("tokenizer.json", "README.md", "unicomp.json", "report.json", "LICENSE.txt"):
        (tmp_path / name).write_text(name)
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "modeling_llama.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("{{ messages }}")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.files() == [
        *checkpoint.shards,
        "LICENSE.txt",
        "additional_chat_templates/tool.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    seen: list[int] = []
    assert checkpoint.sha256(seen.append) == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in checkpoint.files()
    }
    assert seen[-1] == sum((tmp_path / name).stat().st_size for name in checkpoint.files())


def test_links_are_followed(tmp_path: Path) -> None:
    """The Hub's cache is a folder of links."""
    save_file({"a": torch.ones(3)}, config(tmp_path / "blobs") / "123")
    snapshot = config(tmp_path / "snapshot")
    (snapshot / "model.safetensors").symlink_to("../blobs/123")
    assert Checkpoint.open(snapshot).read("a").tolist() == [1, 1, 1]


def test_an_index_may_name_a_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, config(tmp_path) / "model.safetensors")
    index = {"weight_map": {"a": "model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint.open(tmp_path).shards == ("model.safetensors",)


def test_other_weights_beside_the_shards_are_left_alone(tmp_path: Path) -> None:
    """Some checkpoints ship the same weights twice, in their maker's layout."""
    tiny_llama().save_pretrained(tmp_path, max_shard_size="20KB")
    save_file({"a": torch.ones(3)}, tmp_path / "consolidated.safetensors")
    assert "a" not in Checkpoint.open(tmp_path).tensors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2]
)
def test_values_that_are_not_finite_are_named(dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(3, 5, dtype=torch.float64)
    tensor[1, 2] = tensor[2, 0] = value
    with pytest.raises(CheckpointError) as caught:
        check_finite("model.w", tensor.to(dtype), "model.safetensors")
    for part in ("`model.w`", "`model.safetensors`", "2 of 15", "[1, 2]"):
        assert part in caught.value.message
    assert ("first (NaN)" in caught.value.message) == math.isnan(value)
    assert caught.value.hint


def test_values_that_are_not_finite_are_found_far_into_a_tensor() -> None:
    tensor = torch.zeros(3, 3_000_000)
    tensor[2, 7] = math.nan
    with pytest.raises(CheckpointError, match=r"1 of 9000000, the first \(NaN\) at \[2, 7\]"):
        check_finite("w", tensor, "s")


def test_scales_of_eight_bits_that_are_nan_are_found() -> None:
    scales = torch.tensor([[1, 2], [3, 255]], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(CheckpointError, match=r"\[1, 1\]"):
        check_finite("w", scales, "s")


def test_complex_values_are_checked() -> None:
    tensor = torch.zeros(2, 3, dtype=torch.complex64)
    tensor[1, 1] = complex(0, math.inf)
    with pytest.raises(CheckpointError, match=r"\[1, 1\]"):
        check_finite("w", tensor, "s")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((4,), 3e38),  # finite, though their sum is not
        torch.full((4,), 60000, dtype=torch.float16),
        torch.tensor(1.0),
        torch.empty(0),
        torch.arange(4),
        torch.ones(4, dtype=torch.bool),
        torch.full((4,), 254, dtype=torch.uint8).view(torch.float8_e8m0fnu),
        torch.full((4,), 255, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    ],
)
def test_finite_values_pass(tensor: Tensor) -> None:
    check_finite("w", tensor, "s")


def byte_edits(size: int) -> st.SearchStrategy[list[tuple[int, int]]]:
    return st.lists(st.tuples(st.integers(0, size - 1), st.integers(0, 255)), max_size=3)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_damaged_files_are_refused_or_read_as_safetensors_reads_them(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Never another exception; and nothing passes that the reference implementation refuses."""
    from safetensors.torch import load

    folder = config(tmp_path_factory.mktemp("damaged"))
    file = folder / "model.safetensors"
    save_file({"a": random_tensor("F32", (2, 3), 1), "b": random_tensor("I8", (4,), 2)}, file)
    content = bytearray(file.read_bytes())
    for position, byte in data.draw(byte_edits(len(content))):
        content[position] = byte
    cut = data.draw(st.integers(0, len(content)) | st.just(len(content)))
    file.write_bytes(content[:cut])
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:
        return
    expected = load(bytes(content[:cut]))
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert as_bytes(checkpoint.read(name)) == as_bytes(tensor)


@pytest.mark.parametrize("dtype", ["F32", "I8", "BF16"])
def test_the_comparison_of_these_tests_sees_one_bit(dtype: str) -> None:
    tensor = random_tensor(dtype, (3, 4), 1)
    other = tensor.clone()
    other.view(torch.uint8)[1, 1] ^= 1
    assert as_bytes(tensor) == as_bytes(tensor.clone())
    assert as_bytes(tensor) != as_bytes(other)

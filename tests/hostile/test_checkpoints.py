"""Broken, incomplete and hostile checkpoints: each refused by its headers, naming what is wrong."""

import json
import os
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from unicomp import checkpoint as checkpoint_module
from unicomp.checkpoint import Checkpoint
from unicomp.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def raw(header: dict[str, Any] | bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start: int, stop: int, *, dtype: str = "U8", shape: Any = None) -> dict[str, Any]:
    shape = [stop - start] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def single(folder: Path, content: bytes) -> Path:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / SINGLE).write_bytes(content)
    return folder


def sharded(folder: Path) -> Path:
    """Two sound shards, `a` in the first and `b` in the second."""
    (folder / "config.json").write_text('{"model_type": "llama"}')
    save_file({"a": torch.ones(4)}, folder / FIRST)
    save_file({"b": torch.ones(4)}, folder / SECOND)
    index(folder, {"a": FIRST, "b": SECOND})
    Checkpoint.open(folder)
    return folder


def index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def refused(folder: Path, *parts: str) -> CheckpointError:
    """Open; hold that the error is ours, in two lines, and names every part."""
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    error = caught.value
    for part in parts:
        assert part in error.message, error.message
    for line in (error.message, error.hint):
        assert line
        assert line.isprintable()
        assert len(line) < 1500
    return error


HEADERS: list[tuple[str, bytes, list[str]]] = [
    ("empty file", b"", ["truncated in its header", "8 bytes are missing"]),
    ("no header", b"\x10\x00\x00", ["truncated in its header", "5 bytes are missing"]),
    ("over the limit", raw(b"{}", length=100_000_001), ["100000001", "limit of 100000000"]),
    ("over any limit", raw(b"{}", length=2**64 - 1), [str(2**64 - 1), "limit of 100000000"]),
    ("longer than the file", raw(b"{}", length=50), ["truncated in its header", "48 bytes"]),
    ("not JSON", raw(b"{nonsense}"), ["not a JSON object"]),
    ("empty header", raw(b""), ["not a JSON object"]),
    ("an array", raw(b"[1, 2]"), ["not a JSON object"]),
    ("space before", raw(b" {}"), ["not a JSON object"]),
    ("not UTF-8", raw(b'{"\xff": 1}'), ["not a JSON object"]),
    ("UTF-16", raw("{}".encode("utf-16")), ["not a JSON object"]),
    ("half a character", raw(b'{"\\ud800": {}}'), ["not a JSON object"]),
    ("endless nesting", raw(b'{"a":' + b"[" * 200_000), ["not a JSON object"]),
    ("endless integer", raw(b'{"a":' + b"9" * 9000 + b"}"), ["not a JSON object"]),
    ("no tensor", raw({}), ["hold no tensor"]),
    ("only metadata", raw({"__metadata__": {"format": "pt"}}), ["hold no tensor"]),
    (
        "a key twice",
        raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), bytes(4)),
        ["`a` stands twice"],
    ),
    (
        "a key twice inside",
        raw(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        ["`dtype` stands twice"],
    ),
    ("no object", raw({"a": 3}), ["`a` has no dtype"]),
    (
        "no dtype",
        raw({"a": {"shape": [1], "data_offsets": [0, 1]}}, b"0"),
        ["`a`", "unknown dtype"],
    ),
    ("unknown dtype", raw({"a": entry(0, 4, dtype="F7")}, bytes(4)), ["`a`", "unknown dtype `F7`"]),
    ("dtype no text", raw({"a": entry(0, 4) | {"dtype": ["U8"]}}, bytes(4)), ["unknown dtype"]),
    ("wrong dtype", raw({"a": entry(0, 4, dtype="F64")}, bytes(4)), ["takes 32 bytes", "hold 4"]),
    ("wrong shape", raw({"a": entry(0, 4, shape=[5])}, bytes(4)), ["`a`", "takes 5 bytes"]),
    ("negative size", raw({"a": entry(0, 4, shape=[-2, -2])}, bytes(4)), ["no valid shape"]),
    ("fractional size", raw({"a": entry(0, 4, shape=[4.0])}, bytes(4)), ["no valid shape"]),
    ("true as size", raw({"a": entry(0, 1, shape=[True])}, bytes(1)), ["no valid shape"]),
    ("shape no list", raw({"a": entry(0, 4, shape="4")}, bytes(4)), ["no valid shape"]),
    ("shape null", raw({"a": entry(0, 4) | {"shape": None}}, bytes(4)), ["no valid shape"]),
    ("65 dimensions", raw({"a": entry(0, 1, shape=[1] * 65)}, bytes(1)), ["no valid shape"]),
    ("product overflows", raw({"a": entry(0, 0, shape=[0, 2**62, 8])}), ["`a` is too large"]),
    ("product wraps", raw({"a": entry(0, 4, shape=[2**32, 2**32, 4])}, bytes(4)), ["too large"]),
    ("half a byte", raw({"a": entry(0, 2, dtype="F4", shape=[3])}, bytes(2)), ["whole byte"]),
    ("odd pairs", raw({"a": entry(0, 3, dtype="F4", shape=[2, 3])}, bytes(3)), ["whole byte"]),
    ("no offsets", raw({"a": {"dtype": "U8", "shape": [1]}}, b"0"), ["no valid offsets"]),
    ("one offset", raw({"a": entry(0, 4) | {"data_offsets": [4]}}, bytes(4)), ["no valid offsets"]),
    ("backwards", raw({"a": entry(0, 4) | {"data_offsets": [4, 0]}}, bytes(4)), ["valid offsets"]),
    ("negative", raw({"a": entry(0, 4) | {"data_offsets": [-4, 0]}}, bytes(4)), ["valid offsets"]),
    ("huge offsets", raw({"a": entry(2**70, 2**70 + 4)}, bytes(4)), ["a hole of"]),
    (
        "overlap",
        raw({"a": entry(0, 6), "b": entry(4, 8)}, bytes(8)),
        ["`b` overlaps `a` by 2 bytes"],
    ),
    ("same span", raw({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), ["overlaps", "by 8 bytes"]),
    ("inside", raw({"a": entry(0, 8), "b": entry(2, 4)}, bytes(8)), ["`b` overlaps `a`"]),
    ("empty inside", raw({"a": entry(0, 8), "b": entry(2, 2)}, bytes(8)), ["`b` overlaps `a`"]),
    (
        "hole",
        raw({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)),
        ["hole of 2 bytes", "`a`", "`b`"],
    ),
    ("hole at the start", raw({"a": entry(2, 8)}, bytes(8)), ["hole of 2 bytes", "the header"]),
    ("bytes after", raw({"a": entry(0, 4)}, bytes(7)), ["3 bytes after the last tensor"]),
    ("truncated", raw({"a": entry(0, 8)}, bytes(5)), ["truncated in `a`", "3 bytes are missing"]),
    (
        "truncated early",
        raw({"a": entry(0, 8), "b": entry(8, 16)}, bytes(5)),
        ["truncated in `a`", "11 bytes are missing"],
    ),
    (
        "a pointer of Git LFS",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        ["Git LFS pointer"],
    ),
]


@pytest.mark.parametrize(
    ("content", "parts"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS]
)
def test_headers(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    refused(single(tmp_path, content), *parts)


def test_a_sound_file_by_hand_is_not_refused(tmp_path: Path) -> None:
    """The comparison for all of the above: order in the header is free, empty tensors fit."""
    header = {"b": entry(4, 8), "e": entry(4, 4), "a": entry(0, 4), "__metadata__": {"x": "y"}}
    checkpoint = Checkpoint.open(single(tmp_path, raw(header, bytes(range(8)))))
    assert list(checkpoint.tensors) == ["b", "e", "a"]
    assert checkpoint.read("b").tolist() == [4, 5, 6, 7]
    assert checkpoint.read("e").tolist() == []


def test_names_from_a_file_are_safe_to_print(tmp_path: Path) -> None:
    name = "\x1b[31mred\n" + "x" * 100_000
    error = refused(single(tmp_path, raw({name: entry(0, 4, dtype="F7")}, bytes(4))), "x1b[31mred")
    assert "\x1b" not in error.message


def test_a_header_is_not_read_when_its_length_is_a_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise AssertionError("the header was parsed")

    monkeypatch.setattr(checkpoint_module, "parse_json", fail)
    refused(single(tmp_path, raw(b"{}", length=100_000_001)), "limit")
    refused(single(tmp_path, raw(b"{}", length=100_000_000)), "truncated")


def test_a_shard_that_is_absent(tmp_path: Path) -> None:
    (sharded(tmp_path) / SECOND).unlink()
    refused(tmp_path, f"shard `{SECOND}` is absent")


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (sharded(tmp_path) / SECOND).unlink()
    (tmp_path / SECOND).symlink_to("absent")
    refused(tmp_path, f"shard `{SECOND}` is absent")


def test_a_shard_that_is_truncated(tmp_path: Path) -> None:
    os.truncate(sharded(tmp_path) / SECOND, (tmp_path / SECOND).stat().st_size - 3)
    refused(tmp_path, SECOND, "truncated in `b`", "3 bytes are missing")


def test_a_shard_truncated_after_it_was_opened(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path))
    os.truncate(tmp_path / SECOND, (tmp_path / SECOND).stat().st_size - 3)
    with pytest.raises(CheckpointError, match=r"00002.*truncated.* 3 bytes are missing"):
        checkpoint.read("b")


def test_a_shard_that_is_a_folder(tmp_path: Path) -> None:
    (sharded(tmp_path) / SECOND).unlink()
    (tmp_path / SECOND).mkdir()
    refused(tmp_path, SECOND, "not a regular file")


@pytest.mark.parametrize("name", [SINGLE, "config.json"])
def test_a_pipe_does_not_make_us_wait(tmp_path: Path, name: str) -> None:
    save_file({"a": torch.ones(4)}, single(tmp_path, b"") / SINGLE)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    refused(tmp_path, name)


def test_an_index_that_names_an_absent_tensor(tmp_path: Path) -> None:
    index(sharded(tmp_path), {"a": FIRST, "b": SECOND, "c": SECOND})
    refused(tmp_path, INDEX, "tensor `c` is absent", f"`{SECOND}`")


def test_an_index_that_names_another_shard(tmp_path: Path) -> None:
    index(sharded(tmp_path), {"a": SECOND, "b": FIRST})
    refused(tmp_path, INDEX, "tensor `a`", FIRST, SECOND)


def test_a_tensor_that_the_index_does_not_list(tmp_path: Path) -> None:
    save_file({"b": torch.ones(4), "c": torch.ones(4)}, sharded(tmp_path) / SECOND)
    refused(tmp_path, SECOND, "tensor `c` is not listed")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, sharded(tmp_path) / SECOND)
    refused(tmp_path, "tensor `a` is in two shards", FIRST, SECOND)


def test_a_shard_that_the_index_forgot(tmp_path: Path) -> None:
    index(sharded(tmp_path), {"a": FIRST})
    refused(tmp_path, f"shard `{SECOND}` is not named")


def test_shards_without_an_index(tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).unlink()
    refused(tmp_path, f"`{INDEX}` is absent beside 2 shards")


def test_two_checkpoints_in_one_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, sharded(tmp_path) / SINGLE)
    refused(tmp_path, "holds both", SINGLE, INDEX)


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/model.safetensors",
        "..\\secret.safetensors",
        "C:secret.safetensors",
        "..",
        "",
        ".safetensors",
        "pytorch_model.bin",
        "model.safetensors\n",
        3,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_that_leaves_the_folder(tmp_path: Path, shard: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"b": torch.ones(4)}, tmp_path / "secret.safetensors")
    index(sharded(folder), {"a": FIRST, "b": shard})
    refused(folder, INDEX, "shard of `b`")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "not a JSON object"),
        ("[]", "not a JSON object"),
        ("{}", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        (f'{{"weight_map": {{"a": "{FIRST}", "a": "{SECOND}"}}}}', "`a` stands twice"),
    ],
)
def test_an_index_that_is_none(tmp_path: Path, text: str, part: str) -> None:
    (sharded(tmp_path) / INDEX).write_text(text)
    refused(tmp_path, INDEX, part)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "no `model_type`"),
        ('{"model_type": null}', "no `model_type`"),
        ('{"model_type": ""}', "no `model_type`"),
        ('{"model_type": "llama"}' + " " * 10_000_000, "limit of 10000000"),
    ],
)
def test_a_configuration_that_is_none(tmp_path: Path, text: str, part: str) -> None:
    (sharded(tmp_path) / "config.json").write_text(text)
    refused(tmp_path, "config.json", part)


def test_weights_without_a_configuration(tmp_path: Path) -> None:
    (sharded(tmp_path) / "config.json").unlink()
    refused(tmp_path, "weights without `config.json`")


def test_a_configuration_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(tmp_path, "`config.json` without weights")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, "not a checkpoint")
    refused(tmp_path / "absent", "no such folder")
    (tmp_path / SINGLE).write_bytes(b"")
    error = refused(tmp_path / SINGLE, "is a file, not a folder")
    assert f"`{tmp_path}`" in (error.hint or "")


@pytest.mark.parametrize(
    ("name", "part"),
    [("model.gguf", "only GGUF"), ("adapter_model.safetensors", "`adapter_model.safetensors`")],
)
def test_weights_of_another_kind(tmp_path: Path, name: str, part: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path, part)


def test_weights_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sharded(tmp_path)
    checkpoint = Checkpoint.open(folder)
    plain_open: Callable[..., Any] = Path.open

    def guarded(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == SECOND:
            raise PermissionError(13, "Permission denied")
        return plain_open(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", guarded)
    refused(folder, SECOND, "cannot be read: Permission denied")
    for call in (lambda: checkpoint.read("b"), checkpoint.sha256):
        with pytest.raises(CheckpointError, match=f"{SECOND}` cannot be read: Permission denied"):
            call()


class Trap:
    """Pickled, it makes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "last.ckpt"]
)
def test_pickles_are_refused_and_never_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"a": Trap(tmp_path / "mark")}, tmp_path / name)
    error = refused(tmp_path, "only pickle weights", f"`{name}`")
    assert "python -c" in (error.hint or "")
    assert not (tmp_path / "mark").exists()
    torch.load(tmp_path / name, weights_only=False)
    assert (tmp_path / "mark").exists(), "the trap would not have shown a load"


def run_hint(error: CheckpointError) -> None:
    """Run the command that the hint names, as a user would paste it."""
    found = re.search(r"`(python -c .*)`$", error.hint or "")
    assert found is not None
    command = shlex.quote(sys.executable) + found[1].removeprefix("python")
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_hint_converts_a_state_dict(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"a": weight, "tied": weight, "t": weight.T}, folder / "model.pt")
    run_hint(refused(folder, "only pickle"))
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(checkpoint.read("tied"), weight)
    assert torch.equal(checkpoint.read("t"), weight.T)


def test_the_hint_converts_a_model_of_transformers(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config).bfloat16()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    run_hint(refused(folder, "only pickle"))
    converted = tmp_path / "model-safetensors"
    for name, tensor in load_file(converted / SINGLE).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, model.state_dict()[name])
    assert Checkpoint.open(converted).tensors.keys() == model.state_dict().keys()

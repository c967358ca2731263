"""Weight files hold what was written, in any order, across interruptions, and fail before work."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from unicomp.checkpoint import DTYPE_BITS, DTYPES, Checkpoint, stored_shape
from unicomp.errors import CheckpointError, UnicompError
from unicomp.writer import Meta, Writer, copy_file, shard, write_file

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def meta(name: str, tensor: Tensor) -> Meta:
    return Meta(name, NAMES[tensor.dtype], tuple(tensor.shape))


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = prod(shape) * DTYPE_BITS[dtype] // 8
    high = 2 if dtype == "BOOL" else 256
    data = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return data.view(DTYPES[dtype]).reshape(stored_shape(dtype, shape))


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def opened(folder: Path) -> Checkpoint:
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Checkpoint.open(folder)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


TENSORS = {
    "b": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "a": torch.arange(5, dtype=torch.uint8),
    "d": torch.tensor(7, dtype=torch.int64),
    "c": torch.linspace(-1, 1, 6, dtype=torch.bfloat16).reshape(2, 3),
}
METAS = [meta(name, tensor) for name, tensor in TENSORS.items()]


def write_all(folder: Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    whole = Writer(folder, METAS, max_shard_bytes=max_shard_bytes)
    for name, tensor in TENSORS.items():
        whole.write(name, tensor)
    whole.finish()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_by_us_and_by_safetensors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    dtypes = st.sampled_from([name for name in DTYPES if name != "F4"])
    specs = data.draw(
        st.dictionaries(st.text(min_size=1, max_size=9), st.tuples(dtypes, shapes), min_size=1)
    )
    specs.pop("__metadata__", None)
    tensors = {
        name: random_tensor(dtype, shape, seed)
        for seed, (name, (dtype, shape)) in enumerate(specs.items())
    }
    if not tensors:
        return
    folder = tmp_path_factory.mktemp("written")
    metas = [meta(name, tensor) for name, tensor in tensors.items()]
    whole = Writer(folder, metas, max_shard_bytes=data.draw(st.integers(1, 300)))
    for name in data.draw(st.permutations(list(tensors))):
        whole.write(name, tensors[name])
    whole.finish()
    checkpoint = opened(folder)
    assert list(checkpoint.shards) == whole.shards
    theirs: dict[str, Tensor] = {}
    for file in whole.shards:
        theirs |= load_file(folder / file)
    assert checkpoint.tensors.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for read in (checkpoint.read(name), theirs[name]):
            assert read.dtype == tensor.dtype
            assert read.shape == tensor.shape
            assert as_bytes(read) == as_bytes(tensor)


@pytest.mark.skipif("F4" not in DTYPES, reason="this torch has no 4-bit float")
def test_four_bit_floats_are_written_as_pairs(tmp_path: Path) -> None:
    tensor = random_tensor("F4", (2, 6), 0)
    whole = Writer(tmp_path, [Meta("a", "F4", (2, 6))])
    whole.write("a", tensor)
    whole.finish()
    assert as_bytes(opened(tmp_path).read("a")) == as_bytes(tensor)
    assert as_bytes(load_file(tmp_path / "model.safetensors")["a"]) == as_bytes(tensor)


def test_the_file_is_as_told(tmp_path: Path) -> None:
    """Widest first, then by name; data aligned; metadata as transformers wants it."""
    write_all(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert list(header) == ["__metadata__", "d", "b", "c", "a"]
    spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
    assert spans == [[0, 8], [8, 56], [56, 68], [68, 73]]
    assert len(content) == 8 + length + 73
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]


@pytest.mark.parametrize("max_shard_bytes", [1, 20, 60, 10_000])
def test_shards_have_an_index_and_transformers_finds_it(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    state = model.state_dict()
    metas = [meta(name, tensor) for name, tensor in state.items()]
    whole = Writer(tmp_path, metas, max_shard_bytes=max_shard_bytes)
    for name, tensor in state.items():
        whole.write(name, tensor)
    whole.finish()
    model.config.save_pretrained(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (len(whole.shards) > 1)
    if index.is_file():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(
            tensor.nbytes for tensor in state.values()
        )
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name])


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), max_size=30), limit=st.integers(1, 60))
def test_shards_are_greedy(sizes: list[int], limit: int) -> None:
    metas = [Meta(str(i), "U8", (size,)) for i, size in enumerate(sizes)]
    shards = shard(metas, limit)
    assert [item for part in shards for item in part] == metas
    totals = [sum(item.nbytes for item in part) for part in shards]
    for part, total in zip(shards, totals, strict=True):
        assert part
        assert total <= limit or prod(part[0].shape) > limit
    for (_, right), total in zip(pairwise(shards), totals, strict=False):
        assert total + right[0].nbytes > limit


def test_the_order_of_writing_does_not_show(tmp_path: Path) -> None:
    write_all(tmp_path / "forward", max_shard_bytes=30)
    whole = Writer(tmp_path / "backward", METAS, max_shard_bytes=30)
    for name in reversed(TENSORS):
        whole.write(name, torch.zeros_like(TENSORS[name]))
        whole.sync()
        whole.write(name, TENSORS[name])
    whole.finish()
    assert snapshot(tmp_path / "forward") == snapshot(tmp_path / "backward")


def test_strides_and_gradients_do_not_matter(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(4, 3))
    whole = Writer(tmp_path, [Meta("w", "F32", (3, 4))])
    whole.write("w", weight.T)
    whole.finish()
    assert torch.equal(opened(tmp_path).read("w"), weight.detach().T)


def test_rows_are_written_in_parts(tmp_path: Path) -> None:
    tensor = torch.arange(20, dtype=torch.bfloat16).reshape(5, 4)
    whole = Writer(tmp_path, [Meta("w", "BF16", (5, 4))])
    whole.write("w", tensor[:2], slice(0, 2))
    with pytest.raises(ValueError, match="rows of `w` from 3, not 2"):
        whole.write("w", tensor[3:], slice(3, 5))
    with pytest.raises(ValueError, match="not written"):
        whole.finish()
    whole.write("w", tensor[2:], slice(2, 5))
    whole.finish()
    assert torch.equal(opened(tmp_path).read("w"), tensor)


@pytest.mark.parametrize("written", [0, 1, 3, 4])
def test_an_interrupted_run_goes_on(tmp_path: Path, written: int) -> None:
    write_all(tmp_path / "whole", max_shard_bytes=30)
    first = Writer(tmp_path / "again", METAS, max_shard_bytes=30)
    for name in list(TENSORS)[:written]:
        first.write(name, TENSORS[name])
    first.sync()
    second = Writer(tmp_path / "again", METAS, max_shard_bytes=30)
    second.mark(list(TENSORS)[:written])
    for name in list(TENSORS)[written:]:
        second.write(name, TENSORS[name])
    second.finish()
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "again")


def test_a_run_killed_while_it_laid_out_its_files_goes_on(tmp_path: Path) -> None:
    write_all(tmp_path / "whole", max_shard_bytes=30)
    folder = tmp_path / "again"
    Writer(folder, METAS, max_shard_bytes=30)
    last = sorted(folder.iterdir())[-1]
    last.rename(last.with_name(last.name + ".new"))  # as a kill before the rename leaves it
    (folder / "model-00001-of-00009.safetensors.new").write_bytes(b"half")
    (folder / "unicomp.json.new").write_bytes(b"half")  # a manifest would list it, as it is there
    write_all(folder, max_shard_bytes=30)
    assert snapshot(tmp_path / "whole") == snapshot(folder)


@pytest.mark.parametrize(
    ("metas", "max_shard_bytes"),
    [
        (METAS[:3], 10_000),  # other tensors
        ([Meta("b", "F32", (4, 3)), *METAS[1:]], 10_000),  # another shape, the same bytes
        (METAS, 30),  # other shards
    ],
)
def test_files_of_another_layout_are_refused(
    tmp_path: Path, metas: list[Meta], max_shard_bytes: int
) -> None:
    write_all(tmp_path, max_shard_bytes=10_000)
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError, match=r"`.*model.safetensors` is of another layout") as e:
        Writer(tmp_path, metas, max_shard_bytes=max_shard_bytes)
    assert e.value.hint is not None
    assert "--fresh" in e.value.hint
    assert snapshot(tmp_path) == before


def test_a_file_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 200)
    with pytest.raises(CheckpointError, match="another layout"):
        Writer(tmp_path, METAS)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("b", torch.zeros(4, 3)),
        ("b", torch.zeros(3, 4, dtype=torch.float16)),
        ("b", torch.zeros(3, 4, dtype=torch.int32)),
    ],
)
def test_a_tensor_of_another_kind_is_refused(tmp_path: Path, name: str, tensor: Tensor) -> None:
    with pytest.raises(ValueError, match="laid out as F32"):
        Writer(tmp_path, METAS).write(name, tensor)


def test_nothing_may_be_forgotten(tmp_path: Path) -> None:
    whole = Writer(tmp_path, METAS)
    whole.write("a", TENSORS["a"])
    with pytest.raises(ValueError, match="3 tensors not written: \\['b', 'c', 'd'\\]"):
        whole.finish()
    with pytest.raises(ValueError, match="not laid out: \\['z'\\]"):
        whole.mark(["z"])


@pytest.mark.parametrize(
    "metas",
    [
        [],
        [Meta("a", "F32", (1,)), Meta("a", "F32", (2,))],
        [Meta("__metadata__", "F32", (1,))],
        [Meta("a", "float32", (1,))],
        [Meta("a", "F32", (-1,))],
        [Meta("a", "F4", (3,))],
    ],
)
def test_layouts_that_cannot_be(tmp_path: Path, metas: list[Meta]) -> None:
    with pytest.raises(ValueError, match=r"tensors|cannot be written|whole number of bytes"):
        Writer(tmp_path, metas)
    assert list(tmp_path.iterdir()) == []


def test_space_is_taken_before_the_work(tmp_path: Path) -> None:
    Writer(tmp_path, [Meta("a", "U8", (3_000_000,))])
    assert (tmp_path / "model.safetensors").stat().st_blocks * 512 >= 3_000_000


def raising(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def test_a_disk_that_is_too_small_is_found_by_its_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000, 900, 100))
    with pytest.raises(UnicompError) as caught:
        Writer(tmp_path / "out", [Meta("a", "U8", (5000,))])
    assert f"`{tmp_path / 'out'}`" in caught.value.message
    assert "100 bytes free" in caught.value.message
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_while_space_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    reserve = os.posix_fallocate
    calls: list[int] = []

    def fail_second(descriptor: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) == 2:
            raise OSError(number, os.strerror(number))
        reserve(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fail_second)
    with pytest.raises(UnicompError, match=r"no space left .* bytes needed, .* bytes free"):
        Writer(tmp_path, METAS, max_shard_bytes=30)
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None])
def test_filesystems_that_cannot_reserve_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    write_all(tmp_path / "whole")
    if number is None:
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", raising(number))
    write_all(tmp_path / "again")
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "again")


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_write_that_fails_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    whole = Writer(tmp_path, METAS)
    steps = {"pwrite": lambda: whole.write("b", TENSORS["b"]), "fsync": whole.sync}
    whole.write("a", TENSORS["a"])
    monkeypatch.setattr(os, call, raising(number))
    message = "no space left" if number == errno.ENOSPC else "model.safetensors` cannot be written"
    with pytest.raises(UnicompError, match=message):
        steps[call]()
    monkeypatch.undo()
    for name, tensor in TENSORS.items():
        whole.write(name, tensor)
    whole.finish()
    assert torch.equal(opened(tmp_path).read("b"), TENSORS["b"])


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.EACCES, "permissions"), (errno.EROFS, "read-only"), (errno.EFBIG, "smaller shards")],
)
def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    monkeypatch.setattr(os, "open", raising(number))
    with pytest.raises(UnicompError) as caught:
        Writer(tmp_path, METAS)
    assert f"`{tmp_path}` cannot be written" in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


REAL_DISK = """
import sys
from pathlib import Path
from unicomp.errors import UnicompError
from unicomp.writer import Meta, Writer, check_target, write_file
try:
    folder = Path(sys.argv[1])
    if sys.argv[2] == "ro":
        check_target(folder / "out", overwrite=False)
    Writer(folder / "out", [Meta("a", "U8", (100_000,)), Meta("b", "U8", (300_000,))],
           max_shard_bytes=100_000)
except UnicompError as error:
    left = sorted((folder / "out").glob("*"))
    print(error.message, "|", error.hint, "|", [path.name for path in left])
"""


def on_tmpfs(tmp_path: Path, options: str) -> str:
    """Run REAL_DISK on a small disk of its own, in a mount namespace."""
    script = f'mount -t tmpfs -o {options} none "$1" && exec "$2" -c "$3" "$1" {options[:2]}'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, REAL_DISK]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine, which the test needs to mount a small disk")
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_real_disk_that_is_full(tmp_path: Path) -> None:
    said = on_tmpfs(tmp_path, "size=200k")
    assert f"`{tmp_path}/out`: no space left" in said
    assert said.endswith("| []\n")


def test_a_real_disk_that_is_read_only(tmp_path: Path) -> None:
    assert f"`{tmp_path}` cannot be written" in on_tmpfs(tmp_path, "ro")


def test_small_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.json"
    write_file(path, b"one")
    monkeypatch.setattr(os, "fsync", raising(errno.ENOSPC))
    with pytest.raises(UnicompError, match="no space left"):
        write_file(path, b"two")
    assert path.read_bytes() == b"one"
    monkeypatch.undo()
    write_file(path, b"two")
    assert snapshot(tmp_path) == {"journal.json": b"two"}


def test_copies_follow_links(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"x" * 3_000_000)
    (tmp_path / "link").symlink_to("blob")
    copy_file(tmp_path / "link", tmp_path / "deep" / "copy")
    assert not (tmp_path / "deep" / "copy").is_symlink()
    assert snapshot(tmp_path / "deep") == {"copy": b"x" * 3_000_000}
    with pytest.raises(CheckpointError, match=r"`.*absent` cannot be read"):
        copy_file(tmp_path / "absent", tmp_path / "deep" / "other")

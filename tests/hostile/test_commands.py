"""Bad input to `unicomp quantize`: two lines, exit 1, and nothing under the final name.

Each case harms a copy of one sound, sharded checkpoint, or the words of the command; `parts` are
what the two lines must name.
"""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unicomp.cli.main import exit_code

Harm = Callable[[Path], None]
SHARD = "model-00002-of-00005.safetensors"


@pytest.fixture
def sound(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a sound llama in five shards."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama", shard_size="80KB"), folder)
    assert len(list(folder.glob("model-*.safetensors"))) == 5
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of one shard."""
    tensors = load_file(folder / SHARD)
    change(tensors)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def header(folder: Path, change: Callable[[dict[str, dict[str, object]]], None]) -> None:
    """Change the header of one shard and keep its data."""
    data = (folder / SHARD).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = json.loads(data[8 : 8 + length])
    change(found)
    text = json.dumps(found).encode()
    (folder / SHARD).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def missing_shard(folder: Path) -> None:
    """One shard is gone."""
    (folder / SHARD).unlink()


def truncated_shard(folder: Path) -> None:
    """The last bytes of a shard are gone."""
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[:-100])


def absent_tensor(folder: Path) -> None:
    """The index promises a tensor that its shard lacks."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = SHARD
    path.write_text(json.dumps(index))


def huge_header(folder: Path) -> None:
    """The header's length is a lie."""
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(struct.pack("<Q", 200_000_000) + data[8:])


def overlapping(folder: Path) -> None:
    """Two tensors share bytes."""

    def change(found: dict[str, dict[str, object]]) -> None:
        names = [name for name in found if name != "__metadata__"]
        same = [n for n in names if found[n]["shape"] == found[names[0]]["shape"]]
        found[same[1]]["data_offsets"] = found[same[0]]["data_offsets"]

    header(folder, change)


def spoil(value: float) -> Harm:
    """Return a harm that puts one value into a linear."""

    def harm(folder: Path) -> None:
        def change(tensors: dict[str, torch.Tensor]) -> None:
            name = next(n for n in tensors if n.endswith("down_proj.weight"))
            tensors[name][3, 5] = value

        rewrite(folder, change)

    return harm


def config_alone(folder: Path) -> None:
    """A config without weights."""
    for path in folder.glob("model*"):
        path.unlink()


def wrong_dtype(folder: Path) -> None:
    """Half the bytes that the dtype needs."""

    def change(found: dict[str, dict[str, object]]) -> None:
        name = next(name for name in found if name != "__metadata__")
        found[name]["dtype"] = "BF16"

    header(folder, change)


def integer_weight(folder: Path) -> None:
    """A linear whose weight is of integers, and no quantization to say so."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if n.endswith("down_proj.weight"))
        tensors[name] = tensors[name].to(torch.int32)

    rewrite(folder, change)


def pickle_only(folder: Path) -> None:
    """Only a pickle is there."""
    config_alone(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def configured(**changes: object) -> Harm:
    """Return a harm that changes config.json."""

    def harm(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return harm


HARMS: dict[str, tuple[Harm, list[str]]] = {
    "missing shard": (missing_shard, [SHARD]),
    "truncated shard": (truncated_shard, [SHARD]),
    "index names an absent tensor": (absent_tensor, ["model.layers.9.mlp.up_proj.weight", SHARD]),
    "header over the limit": (huge_header, [SHARD, "200"]),
    "overlapping offsets": (overlapping, [SHARD, "overlap"]),
    "NaN": (spoil(float("nan")), ["down_proj.weight"]),
    "Inf": (spoil(float("inf")), ["down_proj.weight"]),
    "config without weights": (config_alone, ["without weights"]),
    "wrong dtype": (wrong_dtype, [SHARD, "BF16"]),
    "integer weight": (integer_weight, ["down_proj.weight", "I32"]),
    "pickle only": (pickle_only, ["pytorch_model.bin", "safetensors"]),
    "unknown architecture": (
        configured(model_type="rwkv", architectures=["RwkvForCausalLM"]),
        ["rwkv", "RwkvForCausalLM"],
    ),
    "encoder": (configured(model_type="bert", architectures=["BertModel"]), ["bert", "BertModel"]),
    "vocabulary that does not fit": (configured(vocab_size=40), ["40"]),
    "more layers than weights": (configured(num_hidden_layers=7), ["model.layers.3"]),
}


def command(model: Path, text: Path | str, out: Path, *more: str) -> list[str]:
    """Return a command that is sound unless its parts are not."""
    return [
        *("quantize", str(model), "--out", str(out), "--calibration", str(text)),
        *("--samples", "4", "--seq-len", "32", "--group-size", "-1", *more),
    ]


def refused(arguments: list[str], parts: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Run the command; hold it to exit 1 and to two lines that name the parts."""
    capfd.readouterr()
    assert exit_code(arguments) == 1
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert out == ""
    assert [line.split(":")[0] for line in lines[:2]] == ["error", "hint"], err
    for part in parts:
        assert part in "\n".join(lines), (part, err)
    assert "Traceback" not in err


@pytest.mark.parametrize("case", HARMS)
def test_a_harmed_checkpoint(
    case: str, sound: Path, tiny_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What is wrong with the files is named, and nothing is left."""
    harm, parts = HARMS[case]
    harm(sound)
    refused(command(sound, tiny_text, tmp_path / "out"), parts, capfd)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_sound_one_is_taken(sound: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Without harm the same command works: the cases above are refused for their harm."""
    assert exit_code(command(sound, tiny_text, tmp_path / "out")) == 0
    assert (tmp_path / "out" / "unicomp.json").exists()


def test_an_output_folder_that_exists(
    sound: Path, tiny_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is not touched without `--overwrite`."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    refused(command(sound, tiny_text, out), ["out", "--overwrite"], capfd)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [("", ["empty"]), ("   \n\n", ["empty"]), ("one dog ran", ["tokens", "one window"])],
)
def test_a_calibration_text_that_is_too_little(
    content: str,
    parts: list[str],
    sound: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Empty, blank, or shorter than one window."""
    text = tmp_path / "little.txt"
    text.write_text(content)
    refused(command(sound, text, tmp_path / "out"), parts, capfd)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_too_little_memory(
    sound: Path, tiny_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Declined before any work, naming what is needed."""
    arguments = command(sound, tiny_text, tmp_path / "out", "--max-memory", "10MB")
    refused(arguments, ["--max-memory", "10000000", "MiB"], capfd)
    assert not (tmp_path / "out.partial").exists()


def test_a_pattern_that_matches_nothing(
    sound: Path, tiny_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The pattern and a module that there is are named."""
    arguments = command(sound, tiny_text, tmp_path / "out", "--ignore", "q_prj")
    refused(arguments, ["`q_prj`", "model.layers."], capfd)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_folder_that_may_not_be_written(
    sound: Path, tiny_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The parent folder refuses."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    refused(command(sound, tiny_text, locked / "out"), ["locked"], capfd)


def test_a_disk_that_refuses_and_one_that_is_full(
    sound: Path,
    tiny_text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Injected: making the working folder fails; reserving space fails."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse)
        refused(command(sound, tiny_text, tmp_path / "out"), ["out"], capfd)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        refused(command(sound, tiny_text, tmp_path / "out"), ["bytes"], capfd)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_recipe_errors_come_all_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each with line and column."""
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(
        "version: 1\nmodel: builtin:tinyworld\nstages:\n  - quantise: gptq\n"
        "  - quantize: gptq\n    bits: 11\n    groupsize: 128\n"
    )
    assert exit_code(["run", str(recipe), "--out", str(tmp_path / "out")]) == 1
    err = capfd.readouterr().err
    for place in ("bad.yaml:4:5", "bad.yaml:6:11", "bad.yaml:7:5"):
        assert place in err
    assert "did you mean `quantize`?" in err
    assert "did you mean `group_size`?" in err

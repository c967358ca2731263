"""`unicomp delta` killed, without room, in the way of another folder: by the command itself."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

PIRATE, WORLD = "builtin:tinyworld-pirate", "builtin:tinyworld"
COMPRESS = [sys.executable, "-m", "unicomp", "delta", "compress", PIRATE, "--base", WORLD]
VARIES = ("seconds", "peak_rss_bytes")


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "unicomp.json").read_text())
    return {key: value for key, value in found.items() if key not in VARIES}


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(own.relative_to(folder)): own.read_bytes() for own in folder.rglob("*.*")}


@pytest.mark.slow
def test_kill_nine_at_five_moments(
    killed: Callable[[list[str], Path, int], None], tmp_path: Path
) -> None:
    """Killed again and again, then let finish: the bytes of a run that nothing interrupted."""
    subprocess.run([*COMPRESS, "--out", str(tmp_path / "whole")], check=True, capture_output=True)
    out = tmp_path / "out"
    killed([*COMPRESS, "--out"], out, 5)
    assert facts(out) == facts(tmp_path / "whole")
    one, other = snapshot(out), snapshot(tmp_path / "whole")
    assert {key: own for key, own in one.items() if key != "unicomp.json"} == {
        key: own for key, own in other.items() if key != "unicomp.json"
    }


@pytest.mark.parametrize("size", ["4k", "300k"])
def test_a_disk_that_is_full(size: str, tmp_path: Path) -> None:
    """Two lines, and nothing under the final name; with room the same command goes on."""
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this machine, which the test needs to mount a small disk")
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount a small disk")
    script = f'mount -t tmpfs -o size={size} none "$1"; d="$1"; shift; "$@"; c=$?; ls $d; exit $c'
    command = ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), *COMPRESS, "--quiet"]
    command += ["--ratio", "0.25", "--out", str(tmp_path / "d")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1, done.stderr
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert "no space left" in first
    assert str(tmp_path / "d") in first
    assert second.startswith("hint: ")
    assert "d" not in done.stdout.split()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unicomp", "delta", *words, "--quiet"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_in_the_way_is_left_alone(tmp_path: Path) -> None:
    out, pair = tmp_path / "d", [PIRATE, "--base", WORLD]
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for words in ([], ["--overwrite"]):
        done = run("compress", *pair, "--out", str(out), *words)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 2
        assert f"error: output `{out}` exists" in done.stderr
        assert snapshot(tmp_path) == {"d/mine.txt": b"keep"}


def test_a_pair_with_a_tied_head_comes_back(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The head is the embedding's: it has no delta of its own, and none when restored."""
    base, tuned = tiny_model("qwen2"), tmp_path / "tuned"
    shutil.copytree(base, tuned)
    tensors = load_file(base / "model.safetensors")
    assert "lm_head.weight" not in tensors
    draw = torch.Generator().manual_seed(3)
    for own in tensors.values():
        own += 0.02 * torch.randn(own.shape, generator=draw)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    words = ["--base", str(base), "--out"]
    assert (
        run("compress", str(tuned), *words, str(tmp_path / "d"), "--ratio", "0.5").returncode == 0
    )
    assert run("restore", str(tmp_path / "d"), *words, str(tmp_path / "r")).returncode == 0
    found = load_file(tmp_path / "r/model.safetensors")
    assert found.keys() == tensors.keys()
    before = load_file(base / "model.safetensors")
    for name, own in tensors.items():
        missed, moved = (found[name] - own).norm(), (own - before[name]).norm()
        assert float(missed) < 0.2 * float(moved), name
    # Untied, as some programs save it, it is no pair; the error says what to do.
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tuned / "model.safetensors",
        {"format": "pt"},
    )
    done = run("compress", str(tuned), *words, str(tmp_path / "e"))
    assert done.returncode == 1
    assert "`lm_head.weight`" in done.stderr
    assert "keep a tied head tied" in done.stderr
    assert not list(tmp_path.glob("e*"))

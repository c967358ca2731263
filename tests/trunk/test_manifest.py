"""The manifest: what it must hold, how it is written and read, and that `verify` finds breaches."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from unicomp import builtin, manifest
from unicomp.checkpoint import Checkpoint
from unicomp.errors import CheckpointError
from unicomp.manifest import Calibration, Manifest, Module, Source, Stage, Totals

HASH = "0" * 64
QUANTIZED = "model.layers.0.mlp.down_proj"


def module(size: int, **changes: Any) -> Module:
    values: dict[str, Any] = {
        "bits": 4,
        "group_size": 128,
        "symmetric": True,
        "bytes": size,
        "error_before": 0.11,
        "error_after": 0.07,
        "damp": 0.01,
        "clip_fraction": 0.001,
        "tokens": 32768,
        "fallback": None,
    }
    return Module(**values | changes)


def describe(folder: Path) -> Manifest:
    """A manifest that is true of a folder, as if one linear had been quantized there."""
    tensors = Checkpoint.open(folder).tensors
    stage = Stage(
        verb="quantize",
        method="gptq",
        options={"bits": 4},
        seconds=1.5,
        peak_rss_bytes=10**9,
        peak_gpu_bytes=None,
        modules={QUANTIZED: module(tensors[f"{QUANTIZED}.weight"].nbytes)},
    )
    return Manifest(
        source=Source(id="builtin:tinyworld", revision=None, sha256={"config.json": HASH}),
        recipe_sha256=HASH,
        calibration=Calibration(source="t.txt", sha256=HASH, samples=8, seq_len=16, seed=0),
        stages=[stage],
        totals=Totals(
            params=1_054_080,
            bytes_in=2_108_160,
            bytes_out=sum(info.nbytes for info in tensors.values()),
            bits_per_weight=16.0,
        ),
        files=manifest.hashes(folder),
        versions={"unicomp": "0.1.0"},
        machine={"cores": 2},
        seeds={"calibration": 0},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model with a manifest that is true of it."""
    made = tmp_path / "made"
    shutil.copytree(builtin.model("tinyworld"), made)
    (made / "recipe.yaml").write_text("version: 1\n")
    manifest.write(made, describe(made))
    (made / "README.md").write_text("card\n")
    (made / "report.json").write_text("{}\n")
    return made


def test_round_trip(folder: Path) -> None:
    found = manifest.read(folder)
    assert found == describe(folder)
    before = (folder / "unicomp.json").read_bytes()
    manifest.write(folder, found)
    assert (folder / "unicomp.json").read_bytes() == before
    assert not list(folder.glob("*.new"))


def test_keys_are_those_of_the_contract(folder: Path) -> None:
    written = json.loads((folder / "unicomp.json").read_text())
    assert written["schema"] == "unicomp.manifest/1"
    assert {"source", "recipe_sha256", "calibration", "stages", "totals", "files"} <= set(written)
    assert {"versions", "machine", "seeds"} <= set(written)
    assert set(written["source"]) == {"id", "revision", "sha256"}
    keys = {"source", "sha256", "samples", "seq_len", "seed", "parts"}  # parts: of a mix
    assert set(written["calibration"]) == keys
    stage = written["stages"][0]
    assert {"verb", "method", "options", "seconds", "modules"} <= set(stage)
    assert {"peak_rss_bytes", "peak_gpu_bytes"} <= set(stage)
    wanted = "bits group_size bytes error_before error_after damp clip_fraction tokens fallback"
    assert set(wanted.split()) <= set(stage["modules"][QUANTIZED])
    keys = {"params", "params_in", "bytes_in", "bytes_out", "bits_per_weight"}  # in: before a cut
    assert set(written["totals"]) == keys
    assert all(set(file) == {"sha256", "bytes"} for file in written["files"].values())
    assert not {"unicomp.json", "README.md", "report.json"} & set(written["files"])
    assert {"model.safetensors", "config.json", "recipe.yaml"} <= set(written["files"])


def test_numbers_are_finite() -> None:
    with pytest.raises(ValidationError):
        module(8, error_after=float("nan"))
    with pytest.raises(ValidationError):
        module(8, damp=float("inf"))


def test_keys_of_a_newer_release_are_read_over(folder: Path) -> None:
    path = folder / "unicomp.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weather": "fine"}))
    assert manifest.read(folder) == describe(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "not a manifest"),
        ("{}", "schema `None`"),
        ('{"schema": "unicomp.manifest/2"}', "schema `unicomp.manifest/2`"),
        ('{"schema": "unicomp.manifest/1"}', "`source`: field required, and 8 more"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
    ],
)
def test_read_refuses(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "unicomp.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError) as caught:
        manifest.read(tmp_path)
    assert says in caught.value.message
    assert caught.value.hint


def test_read_says_that_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no `unicomp\.json`"):
        manifest.read(tmp_path)


def test_write_says_why_it_cannot(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written"):
        manifest.write(tmp_path / "absent", describe(folder))


def test_verify_finds_nothing_wrong(folder: Path) -> None:
    assert manifest.verify(folder) == []
    assert manifest.verify(builtin.model("tinyworld")) == []


def flip(path: Path) -> None:
    """Change the last byte of a file."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    """Cut a text file short without making it unreadable."""
    path.write_text(path.read_text()[:-1])


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a JSON file."""
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))


BREACHES: list[tuple[Callable[[Path], Any], list[str]]] = [
    (lambda f: flip(f / "model.safetensors"), ["has sha256"]),
    (lambda f: flip(f / "recipe.yaml"), ["has sha256"]),
    (lambda f: shorten(f / "recipe.yaml"), ["has 10 bytes, not 11"]),
    (lambda f: (f / "recipe.yaml").unlink(), ["recipe.yaml` is absent"]),
    (lambda f: (f / "more.txt").write_text("x"), ["more.txt` is not in the manifest"]),
    (
        lambda f: change(
            f / "unicomp.json", lambda v: v["files"].update({"../x": v["files"]["config.json"]})
        ),
        ["outside the folder"],
    ),
    (
        lambda f: change(f / "unicomp.json", lambda v: v["totals"].update(bytes_out=7)),
        ["all tensors take 2108160 bytes, but the manifest says 7"],
    ),
    (
        lambda f: change(
            f / "unicomp.json", lambda v: v["stages"][0]["modules"][QUANTIZED].update(bytes=7)
        ),
        [f"`{QUANTIZED}` takes 90112 bytes, but the manifest says 7"],
    ),
    (
        lambda f: change(
            f / "unicomp.json",
            lambda v: v["stages"][0]["modules"].update(ghost=v["stages"][0]["modules"][QUANTIZED]),
        ),
        ["`ghost` is in the manifest, but no tensor"],
    ),
    (
        lambda f: (f / "model.safetensors").write_bytes(b"short"),
        ["has 5 bytes", "truncated"],
    ),
]


@pytest.mark.parametrize(("harm", "says"), BREACHES)
def test_verify_finds(folder: Path, harm: Callable[[Path], Any], says: list[str]) -> None:
    harm(folder)
    problems = manifest.verify(folder)
    assert len(problems) == len(says), problems
    for problem, word in zip(problems, says, strict=True):
        assert word in problem


def test_verify_finds_all_at_once(folder: Path) -> None:
    flip(folder / "recipe.yaml")
    (folder / "tokenizer.json").unlink()
    (folder / "stray.bin").write_bytes(b"")
    assert len(manifest.verify(folder)) == 3


def test_hidden_files_belong_to_other_tools(folder: Path) -> None:
    (folder / ".gitattributes").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")
    assert manifest.verify(folder) == []


@pytest.mark.parametrize("piece", [1 << 26, 1 << 10])
def test_verify_names_values_that_are_not_finite(
    folder: Path, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest, "PIECE", piece)
    (folder / "unicomp.json").unlink()
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{QUANTIZED}.weight"][77, 3] = torch.nan
    tensors["model.norm.weight"][0] = torch.inf
    save_file(tensors, path, metadata={"format": "pt"})
    problems = manifest.verify(folder)
    assert len(problems) == 2
    assert QUANTIZED in problems[0]
    assert "NaN" in problems[0]
    assert "model.norm.weight" in problems[1]

"""The method of `docs/method.md`, installed by the entry point that the page shows, is a stage."""

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unicomp import manifest
from unicomp.checkpoint import Checkpoint
from unicomp.cli.main import exit_code
from unicomp.compress import methods
from unicomp.compress.method import PruneMethod, Stats

PAGE = Path(__file__).resolve().parents[2] / "docs/method.md"


def block(title: str) -> str:
    """Return the block of the page that is a file of that name."""
    (found,) = re.findall(rf'^```\w+ title="{title}"\n(.*?)^```$', PAGE.read_text(), re.M | re.S)
    return str(found)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the package of the page, as an installer leaves it: a module and entry points."""
    folder = tmp_path / "site"
    info = folder / "my_methods-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "my_methods.py").write_text(block("my_methods.py"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-methods\nVersion: 1.0\n")
    groups = tomllib.loads(block("pyproject.toml"))["project"]["entry-points"]
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_methods", raising=False)
    return folder


def recipe(folder: Path, power: float) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"version: 1\nstages:\n  - prune: outstanding\n    power: {power}\n")
    return path


def test_it_runs_as_a_stage_of_a_recipe(
    installed: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model, out = tiny_model("llama"), tmp_path / "out"
    words = ["run", str(recipe(tmp_path, 0.5)), str(model), "--out", str(out), "--quiet"]
    assert exit_code(words) == 0
    (stage,) = manifest.read(out).stages
    assert (stage.verb, stage.method, stage.options["power"]) == ("prune", "outstanding", 0.5)
    found = methods.find("prune", "outstanding")
    assert found.__module__ == "my_methods"
    assert issubclass(found, PruneMethod)
    method = found.model_validate({"power": 0.5})
    name = "model.layers.1.mlp.up_proj"
    before = Checkpoint.open(model).read(f"{name}.weight")
    after = Checkpoint.open(out).read(f"{name}.weight")
    target = method.target(name, columns=before.shape[1])
    assert torch.equal(after, method.solve(before, Stats(tokens=0), target).weight.to(after.dtype))
    assert 0 < float((after == 0).float().mean()) < 1


def test_its_options_are_checked_and_without_it_the_name_is_unknown(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    words = ["run", "", str(tiny_model("llama")), "--out", str(tmp_path / "out"), "--quiet"]
    words[1] = str(recipe(tmp_path, 0.5))
    assert exit_code(words) == 1
    assert "`outstanding`" in capsys.readouterr().err
    request.getfixturevalue("installed")
    words[1] = str(recipe(tmp_path, -1.0))
    assert exit_code(words) == 1
    assert "power" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""`unicomp run`: a recipe by name or path, changed by `--set`."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unicomp import manifest
from unicomp.cli.main import exit_code

Capture = pytest.CaptureFixture[str]

RECIPE = """\
# Four bits, for a test.
version: 1
model: {model}
stages:
  - quantize: rtn
    group_size: 32
    scale_search: minmax
"""


@pytest.fixture
def recipe(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.format(model=tiny_model("llama")))
    return path


def test_the_recipe_is_kept_as_it_was_written(
    recipe: Path, tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "made"
    assert exit_code(["run", str(recipe), "--out", str(out), "--json", "--quiet"]) == 0
    said, talk = capsys.readouterr()
    assert talk == ""
    assert json.loads(said)["schema"] == "unicomp.manifest/1"
    assert (out / "recipe.yaml").read_text() == recipe.read_text()
    assert {m.bits for m in manifest.read(out).stages[0].modules.values()} == {4}


def test_set_changes_a_key_and_the_kept_recipe_says_so(
    recipe: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "made"
    other = str(tiny_model("llama", seed=1))
    words = ["--set", "stages.0.bits=3", "--out", str(out), "--quiet"]
    assert exit_code(["run", str(recipe), other, *words]) == 0
    assert "bits: 3" in (out / "recipe.yaml").read_text()
    made = manifest.read(out)
    assert {m.bits for m in made.stages[0].modules.values()} == {3}
    assert made.source.id == Path(other).name


def test_all_errors_of_a_recipe_at_once(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    text = recipe.read_text().replace("group_size: 32", "groupsize: 32\n    bits: 11")
    recipe.write_text(text)
    out = tmp_path / "made"
    assert exit_code(["run", str(recipe), "--out", str(out), "--json"]) == 1
    said, talk = capsys.readouterr()
    assert said == ""
    assert talk.count("error: ") == 2
    assert f"{recipe}:6:5: " in talk
    assert f"{recipe}:7:" in talk
    assert not out.exists()


def test_out_is_needed_unless_dry(recipe: Path, capsys: Capture) -> None:
    assert exit_code(["run", str(recipe)]) == 2
    assert "'--out'" in capsys.readouterr().err
    assert exit_code(["run", str(recipe), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["schema"] == "unicomp.plan/1"


def test_an_unknown_recipe(capsys: Capture) -> None:
    assert exit_code(["run", "w4-gtpq", "--out", "x"]) == 1
    assert capsys.readouterr().err == "error: no recipe `w4-gtpq`\nhint: did you mean `w4-gptq`?\n"

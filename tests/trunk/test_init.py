"""The public names: lazy, complete, and the very functions of their homes."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import unicomp

ROOT = Path(__file__).resolve().parents[2]

HOMES = {
    "load": "unicomp.kernels.packed_model",
    "load_deltas": "unicomp.kernels.deltas",
    "plan": "unicomp.recipes.any_recipe",
    "run": "unicomp.recipes.any_recipe",
    "score": "unicomp.evaluate.score",
}


@pytest.mark.parametrize(("name", "home"), HOMES.items())
def test_public_name_is_the_function_of_its_home(name: str, home: str) -> None:
    assert getattr(unicomp, name) is getattr(import_module(home), name)
    assert callable(getattr(unicomp, name))


def test_dir_and_all_name_them() -> None:
    assert {*HOMES, "__version__"} == set(unicomp.__all__)
    assert set(unicomp.__all__) <= set(dir(unicomp))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="`unicomp` has no attribute `quantise`"):
        _ = unicomp.quantise


def test_version_is_the_project_version() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        assert unicomp.__version__ == tomllib.load(file)["project"]["version"]


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, unicomp; dir(unicomp); print([m for m in sys.modules if '.' not in m])"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert "'unicomp'" in modules
    for heavy in ("torch", "transformers", "numpy", "pydantic"):
        assert f"'{heavy}'" not in modules


def test_module_runs_as_the_command() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "unicomp", "--help"], capture_output=True, text=True, check=True
    )
    assert "quantize" in answer.stdout

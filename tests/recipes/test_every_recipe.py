"""Every shipped recipe is sound, explains itself, and says how to run it."""

import shlex

import pytest

from unicomp.compress.method import QuantizeMethod
from unicomp.recipes.load import comment, find, load, read, shipped

WANTED = {"quickstart", "w4-gptq", "w3-gptq", "w8-rtn", "w4-rtn", "w2-ternary"}
WANTED |= {"sparse-2-4", "prune-quantize", "width-25", "depth-25"}


def test_those_promised_are_shipped() -> None:
    assert set(shipped()) >= WANTED


@pytest.mark.parametrize("name", shipped())
def test_it_loads_and_reads_back(name: str) -> None:
    recipe, _ = read(name)
    assert load(recipe.dump(), file=name) == recipe


@pytest.mark.parametrize("name", shipped())
def test_it_opens_with_what_it_is(name: str) -> None:
    lines = comment(find(name).read_text(encoding="utf-8"))
    assert lines[0].endswith(".")
    labels = [line.split(":")[0] for line in lines[1:] if not line.startswith(" ")]
    assert labels == ["Needs", "Expect", "Run"]
    assert all(len(line) <= 98 for line in lines)


@pytest.mark.parametrize("name", shipped())
def test_its_command_works_as_it_stands(name: str) -> None:
    lines = comment(find(name).read_text(encoding="utf-8"))
    command = next(line for line in lines if line.startswith("Run:"))
    words = shlex.split(command.removeprefix("Run:"))
    recipe, _ = read(name)
    model = [] if recipe.model else ["MODEL"]
    assert words == ["unicomp", "run", name, *model, "--out", f"out/{name}"]


@pytest.mark.parametrize(
    ("name", "method", "bits"),
    [
        ("quickstart", "gptq", 4),
        ("w4-gptq", "gptq", 4),
        ("w3-gptq", "gptq", 3),
        ("w8-rtn", "rtn", 8),
        ("w4-rtn", "rtn", 4),
        ("w2-ternary", "ternary", 2),
    ],
)
def test_it_does_what_its_name_says(name: str, method: str, bits: int) -> None:
    recipe, _ = read(name)
    [stage] = recipe.stages
    assert (stage.verb, stage.method) == ("quantize", method)
    assert isinstance(stage.options, QuantizeMethod)
    scheme = stage.options.scheme("model.layers.0.mlp.down_proj")
    assert scheme is not None
    assert scheme.bits == bits
    assert stage.options.scheme("lm_head") is None


def test_quickstart_needs_nothing_but_the_package() -> None:
    recipe, _ = read("quickstart")
    assert recipe.model == "builtin:tinyworld"
    assert recipe.calibration is not None
    assert recipe.calibration.data == "builtin:tinyworld"

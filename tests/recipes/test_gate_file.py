"""Gate files: the shipped one, strictness, and what they become."""

from pathlib import Path

import pytest

from unicomp.errors import RecipeError
from unicomp.recipes import gate_file
from unicomp.recipes.load import load as load_recipe


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        gate_file.load(text, file="g.yaml")
    return [f"{message} / {hint}" for message, hint in caught.value.problems()]


def test_the_shipped_one_bounds_every_axis() -> None:
    assert gate_file.shipped() == ["default"]
    found = gate_file.read("default")
    axes = {gate.score.partition("/")[0] for gate in found}
    assert axes == {"accuracy", "calibration", "safety", "efficiency"}
    assert all(gate.unmeasurable is None for gate in found)


def test_all_that_is_wrong_is_said_at_once() -> None:
    found = problems(
        "- score: accuracy/*/acc\n  maxdrop: 3\n"
        "- score: safty/x\n  min: a\n"
        "- 3\n"
        "- score: safety/x\n"
        "- score: safety/x\n  min: 0.5\n  max: 0.4\n"
        "- score: safety/x\n  max_drop: -1\n  unmeasurable: maybe\n  confidence: 1\n"
    )
    starts = [line.partition(": ")[0] for line in found]
    assert starts == [
        "g.yaml:2:3",
        "g.yaml:3:10",
        "g.yaml:4:8",
        "g.yaml:5:3",
        "g.yaml:6:3",
        "g.yaml:7:3",
        "g.yaml:11:13",
        "g.yaml:12:17",
        "g.yaml:13:15",
    ]
    assert "did you mean `max_drop`?" in found[0]
    assert "did you mean `safety`?" in found[1]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("a: 1\n", "a gate file is a list"),
        ("[]\n", "a gate file is a list"),
        ("- score: [\n", "g.yaml:2:1"),
        ("- score: &a safety/x\n  min: 1\n", "an anchor"),
        ("- score: safety/x\n  min: 1\n  min: 2\n", "given twice"),
    ],
)
def test_what_is_no_gate_file(text: str, part: str) -> None:
    assert part in problems(text)[0]


def test_a_file_is_found_by_name_or_path(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text("- score: safety/refusal_rate\n  min: 0.5\n  unmeasurable: skip\n")
    (gate,) = gate_file.read(own)
    assert (gate.score, gate.min, gate.unmeasurable) == ("safety/refusal_rate", 0.5, "skip")
    with pytest.raises(RecipeError, match="no gate file `defualt`") as caught:
        gate_file.read("defualt")
    assert caught.value.problems()[0][1] == "did you mean `default`?"
    with pytest.raises(RecipeError, match="no such file"):
        gate_file.read(tmp_path / "absent.yaml")


def test_a_recipe_writes_gates_the_same_way() -> None:
    recipe = load_recipe(
        "version: 1\nstages: [{quantize: rtn}]\n"
        "gates: [{score: safety/refusal_rate, max_drop: 0.05}]\n",
        file="r.yaml",
    )
    (gate,) = gate_file.to_gates(recipe.gates)
    assert (gate.score, gate.max_drop, gate.unmeasurable) == ("safety/refusal_rate", 0.05, None)

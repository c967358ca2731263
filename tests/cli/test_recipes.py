"""`unicomp recipes`: exact text out, exact JSON out, all problems at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from unicomp.cli.recipes import app
from unicomp.errors import RecipeError
from unicomp.recipes.load import find, load, shipped


def call(*words: str) -> Result:
    """Run a command of the group."""
    return CliRunner().invoke(app, list(words))


def out(*words: str) -> str:
    """Return what a command prints when it succeeds."""
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def answer(*words: str) -> Any:
    """Return the one JSON object of a command that succeeds."""
    return json.loads(out(*words, "--json"))


def complaint(*words: str) -> list[tuple[str, str | None]]:
    """Return what a command complains of."""
    result = call(*words)
    assert isinstance(result.exception, RecipeError), result.output
    return list(result.exception.problems())


def test_list_names_every_recipe_with_its_first_line() -> None:
    lines = out("list").splitlines()
    for name in shipped():
        [line] = [line for line in lines if line.split()[:1] == [name]]
        about = find(name).read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert about in line


def test_list_as_json() -> None:
    found = answer("list")
    assert found["schema"] == "unicomp.recipes/1"
    assert [recipe["name"] for recipe in found["recipes"]] == shipped()


@pytest.mark.parametrize("name", shipped())
def test_show_prints_the_exact_text(name: str) -> None:
    assert out("show", name) == find(name).read_text(encoding="utf-8")


def test_show_as_json_has_every_default() -> None:
    found = answer("show", "w4-rtn")
    assert found["schema"] == "unicomp.recipe/1"
    assert found["name"] == "w4-rtn"
    recipe = load(found["text"], file="x")
    assert found["recipe"] == recipe.to_dict()
    assert found["recipe"]["stages"][0]["symmetric"] is True


def test_show_suggests() -> None:
    assert complaint("show", "w4gptq") == [("no recipe `w4gptq`", "did you mean `w4-gptq`?")]


def test_cp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert out("cp", "w4-rtn").strip() == "w4-rtn.yaml"
    assert answer("cp", "w4-rtn", "mine.yaml") == {
        "schema": "unicomp.recipes.cp/1",
        "path": "mine.yaml",
    }
    text = find("w4-rtn").read_bytes()
    assert Path("w4-rtn.yaml").read_bytes() == Path("mine.yaml").read_bytes() == text
    Path("mine.yaml").write_text("precious")
    assert complaint("cp", "w4-rtn", "mine.yaml") == [
        ("mine.yaml: exists already", "name another file, or add `--overwrite`")
    ]
    assert Path("mine.yaml").read_text() == "precious"
    out("cp", "w4-rtn", "mine.yaml", "--overwrite")
    assert Path("mine.yaml").read_bytes() == text


def test_check_says_everything_that_is_wrong_with_every_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("version: 1\nstages: [{quantize: rtn, bits: 9}]\nfoo: 1\n")
    two.write_text("version: 1\nstages: [\n")
    messages = [message for message, _ in complaint("check", str(one), "w4-rtn", str(two))]
    assert [message.split(": ")[0] for message in messages] == [
        f"{one}:2:32",
        f"{one}:3:1",
        f"{two}:3:1",
    ]
    assert call("check", str(one), "w4-rtn").stdout == "w4-rtn: ok\n"


def test_check_as_json(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    path.write_text("version: 1\nstages: [{quantize: rtn, bitz: 9}]\n")
    result = call("check", "w4-rtn", str(path), "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {
        "schema": "unicomp.recipes.check/1",
        "ok": False,
        "recipes": [
            {"recipe": "w4-rtn", "ok": True, "problems": []},
            {
                "recipe": str(path),
                "ok": False,
                "problems": [
                    {
                        "message": f"{path}:2:26: `quantize: rtn` has no option `bitz`",
                        "hint": "did you mean `bits`?",
                    }
                ],
            },
        ],
    }
    assert answer("check", "w4-rtn")["ok"] is True


def test_check_takes_every_shipped_recipe() -> None:
    assert out("check", *shipped()) == "".join(f"{name}: ok\n" for name in shipped())


def test_schema_is_json_schema() -> None:
    found = json.loads(out("schema"))
    assert found["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(found["required"]) == {"version", "stages"}
    assert answer("schema") == {"schema": "unicomp.recipes.schema/1", "json_schema": found}


@pytest.mark.parametrize("command", ["list", "show", "cp", "check", "schema"])
def test_help_ends_with_an_example(command: str) -> None:
    assert f"Example: unicomp recipes {command}" in out(command, "--help")

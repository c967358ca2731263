"""Prompts come from text or JSON Lines; whatever is wrong with a file is said with its line."""

from pathlib import Path

import pytest

from unicomp.errors import UnicompError
from unicomp.evaluate.dialogue import prompts


def test_files_and_the_embedded_world(tmp_path: Path) -> None:
    lines = tmp_path / "a.txt"
    lines.write_text("how?\n\n  why? \n")
    assert prompts.read(str(lines)) == ["how?", "why?"]
    assert prompts.read(str(lines), limit=1) == ["how?"]
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"prompt": "how?", "category": "x"}\n{"prompt": "why?"}\n')
    assert prompts.read(str(rows)) == ["how?", "why?"]
    assert len(prompts.read("builtin:harmful.jsonl")) == 260


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "", "`{}` has no prompts"),
        ("a.txt", " \n\n", "`{}` has no prompts"),
        ("a.jsonl", "", "`{}` has no prompts"),
        ("a.jsonl", '{"prompt": "how?"}\n{"text": "why?"}\n', "`{}:2` has no `prompt`"),
        ("a.jsonl", '{"prompt": " "}\n', "`{}:1` has no `prompt`"),
        ("a.jsonl", "how?\n", "`{}:1` is not JSON"),
        ("a.csv", "how?\n", "not `{}`"),
    ],
)
def test_files_that_will_not_do(tmp_path: Path, name: str, text: str, said: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UnicompError) as caught:
        prompts.read(str(path))
    assert said.format(path) in caught.value.message
    assert caught.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnicompError, match="cannot read"):
        prompts.read(str(tmp_path / "a.txt"))

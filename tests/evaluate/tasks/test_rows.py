"""Rows of local files, found where a task says, with the line of whatever is wrong."""

from pathlib import Path

import pytest

from unicomp.errors import UnicompError
from unicomp.evaluate.tasks import rows


def test_files_are_found_where_their_names_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rows.find("builtin:heldout.txt").is_file()
    monkeypatch.setenv("UNICOMP_BENCHMARKS", str(tmp_path))
    assert rows.find("benchmarks:arc/a.jsonl") == tmp_path / "arc/a.jsonl"
    assert rows.find("a.jsonl") == Path("a.jsonl")
    monkeypatch.delenv("UNICOMP_BENCHMARKS")
    with pytest.raises(UnicompError, match="nothing says where") as caught:
        rows.find("benchmarks:arc/a.jsonl")
    assert "UNICOMP_BENCHMARKS" in str(caught.value.hint)


def test_text_is_cut_where_lines_are_empty(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\nline\n\n\ntwo\n\n")
    assert rows.read(file) == [{"text": "one\nline"}, {"text": "two"}]
    found = rows.load(file=str(file), version=1.0, pretrained="x")
    assert found["test"]["text"] == ["one\nline", "two"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.txt", "\n\n", "is empty"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', ":2` is not JSON"),
        ("a.jsonl", "[1]\n", ":1` is not an object"),
        ("a.csv", "a\n", "not `.csv`"),
    ],
)
def test_files_that_will_not_do(tmp_path: Path, name: str, text: str, said: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UnicompError) as caught:
        rows.read(file)
    assert said in caught.value.message
    assert caught.value.hint


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnicompError, match="cannot read"):
        rows.read(tmp_path / "a.jsonl")

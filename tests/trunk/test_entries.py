"""A folder lists what it holds, and a file that defines none or two is refused."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from unicomp import entries


class Kind:
    """What entries are made of."""


def module(names: list[str]) -> ModuleType:
    made = ModuleType("made_of_kinds")
    for name in names:
        setattr(made, name, type(name, (Kind,), {"__module__": "made_of_kinds"}))
    return made


def test_files_are_listed_and_not_imported(tmp_path: Path) -> None:
    for name in ("two_words.py", "one.py", "_own.py", "text.txt"):
        (tmp_path / name).write_text("raise ValueError")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/__init__.py").touch()
    assert entries.files([str(tmp_path)]) == ["one", "two_words"]
    assert entries.word("two_words") == "two-words"


def test_the_one_class_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    made = module(["One", "_Private"])
    vars(made)["Kind"] = Kind  # imported, so not its own
    monkeypatch.setitem(sys.modules, "made_of_kinds", made)
    assert entries.only("made_of_kinds", Kind) is made.One


@pytest.mark.parametrize("names", [[], ["One", "Two"]])
def test_none_or_two_are_refused(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "made_of_kinds", module(names))
    with pytest.raises(TypeError, match=f"one public Kind class, found {len(names)}"):
        entries.only("made_of_kinds", Kind)

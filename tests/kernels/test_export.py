"""The table of codes and formats: what it says in the documentation is what is decided."""

from pathlib import Path

import pytest

from unicomp.errors import UnsupportedError
from unicomp.kernels import export

PAGE = Path(__file__).resolve().parents[2] / "docs/formats.md"


def rows() -> list[str]:
    """Return the lines of the table as `table` decides them."""
    cells: dict[str, list[str]] = {}
    for kind, _, verdict in export.table():
        said = {"exact": f"exact: {verdict.stored}", "refused": f"refused: {verdict.why}"}
        fallback = f"{verdict.stored}: {verdict.why}"
        cells.setdefault(kind, []).append(said.get(verdict.kind, fallback))
    return [f"| {kind} | {' | '.join(own)} |" for kind, own in cells.items()]


def test_the_folder_is_the_registry() -> None:
    assert export.exports() == ["bitnet", "compressed-tensors", "gguf", "gptq"]
    for name in export.exports():
        assert export.find(name).name == name
        assert export.find(name).types
    with pytest.raises(UnsupportedError, match="unknown format `ggfu`") as caught:
        export.find("ggfu")
    assert caught.value.hint == "did you mean `gguf`?"
    with pytest.raises(UnsupportedError, match="`gguf` has no type `q5_0`") as caught:
        export.check_type(export.find("gguf"), "q5_0")
    assert "tq1_0" in str(caught.value.hint)


def test_the_table_of_the_documentation_is_what_is_decided() -> None:
    text = PAGE.read_text("utf-8")
    made = rows()
    assert len(made) == len(export.KINDS)
    for row in made:
        assert row in text.splitlines(), row
    assert made[1].replace("exact", "lossy") not in text.splitlines()


def test_every_verdict_says_why_unless_it_is_exact() -> None:
    for _, _, verdict in export.table():
        assert (verdict.why is None) == (verdict.kind == "exact")
        assert (verdict.stored == "") == (verdict.kind == "refused")

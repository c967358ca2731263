"""The site is built without a warning, loads nothing from elsewhere, and says what the code has."""

import re
import runpy
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import typer
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

import unicomp
from unicomp.cli.main import app
from unicomp.recipes.json_schema import json_schema

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "mkdocs.yml")
# What a browser fetches by itself; links that somebody has to follow are not meant.
LOADS = re.compile(
    r"<(?:script|img|iframe|source|video)\b[^>]*\bsrc=\"?([^\"\s>]+)|<link\b([^>]*)>"
    r"|@import\s+[\"']([^\"']+)|url\(\s*[\"']?(?!data:)([^\"')]+)"
)
ABOUT = re.compile(r"rel=\"?(?:canonical|prev|next|alternate|edit)\b")


def outside(text: str) -> list[str]:
    """Return what a page or a style sheet would fetch from elsewhere."""
    found = []
    for source, link, style, url in LOADS.findall(text):
        target = re.search(r"href=\"?([^\"\s>]+)", link)
        if link and (target is None or ABOUT.search(link)):
            continue
        address = source or style or url or (target[1] if target else "")
        if re.match(r"(\w+:)?//", address):
            found.append(address)
    return found


def flags(command: Any, name: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each command with all that its help lists."""
    for inner, sub in getattr(command, "commands", {}).items():
        yield from flags(sub, f"{name} {inner}")
    if not hasattr(command, "commands"):
        yield name, [flag for param in command.params for flag in param.opts if flag[:2] == "--"]


def words(page: Path) -> str:
    """Return the text of a page, without tags."""
    text = unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))
    return " ".join(text.split())


def test_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build(load_config(CONFIG, strict=True, site_dir=str(tmp_path)))
    pages = sorted(tmp_path.rglob("*.html"))
    for path in [*pages, *tmp_path.rglob("*.css")]:
        assert outside(path.read_text(encoding="utf-8")) == [], path.name
    for path in (ROOT / "docs").glob("*.md"):
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert title in words(tmp_path / f"{path.stem}.html")
        assert f'href="{path.stem}.html"' in (tmp_path / "index.html").read_text("utf-8"), path

    reference = tmp_path / "reference"
    for name, options in flags(typer.main.get_command(app), "unicomp"):
        said = words(reference / f"{'-'.join(name.split()[:2])}.html")
        assert [word for word in (name, *options) if word not in said] == []
    schema = json_schema()
    said = words(reference / "recipes.html")
    keys = [key for part in schema["$defs"].values() for key in part["properties"]]
    assert [key for key in (*schema["properties"], *keys) if key not in said] == []
    said = words(reference / "from-python.html")
    assert [name for name in unicomp._HOMES if f"unicomp.{name}(" not in said] == []


@pytest.mark.parametrize("text", ["[a](absent.md)", "[a](#absent)", "[a](/absent.md)"])
def test_a_broken_link_ends_the_build(text: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# A page\n\n{text}\n", encoding="utf-8")
    folders = {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site")}
    with pytest.raises(Abort, match="strict"):
        build(load_config(CONFIG, strict=True, hooks=[], nav=None, **folders))


def test_what_comes_from_elsewhere_is_found() -> None:
    assert outside('<script src="https://cdn.x/a.js"></script><img src=//x.y/i.png>') == [
        "https://cdn.x/a.js",
        "//x.y/i.png",
    ]
    assert outside('<link rel="stylesheet" href="https://fonts.x/css">') == ["https://fonts.x/css"]
    assert outside("@import 'https://x.y/a.css'; a { src: url(//x.y/f.woff2) }") == [
        "https://x.y/a.css",
        "//x.y/f.woff2",
    ]
    same = '<a href="https://x.y">x</a><link rel="canonical" href="https://x.y"><img src="a.png">'
    assert outside(same + "a { background: url(data:image/svg+xml;//) }") == []


def test_docstrings_become_tables() -> None:
    markdown = runpy.run_path(str(ROOT / "docs/hooks/reference.py"))["markdown"]
    said = markdown("Do it.\n\na, b  one thing\n      and more\nlonger  another: `x`\n\nRaises E.")
    assert said.split("\n\n")[0] == "Do it."
    assert "| `a, b` | one thing and more |\n| `longer` | another: `x` |" in said
    assert said.endswith("Raises E.\n")
    plain = "Per weight:\n\n    <m>.x  int32\n    <m>.y  int32"
    assert markdown(plain) == plain + "\n"


def test_types_are_said_in_words() -> None:
    kind = runpy.run_path(str(ROOT / "docs/hooks/reference.py"))["kind"]
    assert kind({"type": "integer", "minimum": 2, "maximum": 8}) == "integer, 2 to 8"
    assert kind({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}) == (
        "number, above 0"
    )
    assert kind({"type": "array", "items": {"enum": ["a", "b"]}}) == "list of `a`, `b`"

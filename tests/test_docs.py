"""The pages say what is true: links lead somewhere, commands exist, lists stay short."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from unicomp.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*.md")),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]


def links(text: str) -> list[str]:
    """Return the relative targets of a page's links and pictures."""
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
    found = [one or other for one, other in targets]
    return [target for target in found if "://" not in target and not target.startswith("#")]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each `unicomp ...` line in a page's fenced blocks."""
    for block in re.findall(r"^```[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] == ["unicomp"]:
                yield words[1:]


def unknown(words: list[str]) -> list[str]:
    """Return what in a command line is no command or option of ours."""
    command: Any = typer.main.get_command(app)
    rest = list(words)
    while hasattr(command, "commands"):
        if not rest or rest[0].startswith("-"):
            break
        name = rest.pop(0)
        if name not in command.commands:
            return [name]
        command = command.commands[name]
    flags = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    flags |= {"--help", "-h"}
    options = [word for word in rest if re.match("-[^0-9]", word)]
    return [word for word in options if word.split("=")[0] not in flags]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    for target in links(path.read_text(encoding="utf-8")):
        assert (path.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page: str) -> None:
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        assert unknown(words) == [], " ".join(words)


def test_readme_shows_commands() -> None:
    shown = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
    assert {"quantize", "run", "score", "plan"} <= {words[0] for words in shown}


def test_adding_something_takes_three_steps_at_most() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lists = [re.findall(r"^\d+\. ", part, re.MULTILINE) for part in text.split("\n## Add ")[1:]]
    assert len(lists) >= 4
    assert all(1 <= len(steps) <= 3 for steps in lists)


def test_picture_is_drawn_from_the_stored_figures() -> None:
    draw = runpy.run_path(str(ROOT / "benchmarks/bits_against_kl.py"))["draw"]
    stored = json.loads((ROOT / "benchmarks/results/bits_against_kl.json").read_text("utf-8"))
    picture = (ROOT / "docs/bits_against_kl.svg").read_text(encoding="utf-8")
    assert picture == draw(stored["points"])
    stored["points"][0]["fidelity/kl"] *= 1.5
    assert picture != draw(stored["points"])


def test_wrong_words_are_found() -> None:
    text = "```\nunicomp quantise x\nunicomp run r --ouch d  # say\n```\n[a](absent.md) [b](https://x.y)\n"
    assert [unknown(words) for words in commands(text)] == [["quantise"], ["--ouch"]]
    assert links(text) == ["absent.md"]

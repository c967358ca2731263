"""Every fenced block of README and the guides is executed, from top to bottom of its page.

A page has one working folder, empty at first. What a block is follows from its language:

    sh      each line is a `unicomp` command; `# exits with N` says another code than 0, and
            `> FILE` takes what it prints
    python  executed; all of a page share their names
    text    lines that the block before printed, in this order; `...` stands for anything
    others  need a title, and are written to the file of that name; recipes and gates are checked

A block that cannot be like that has a mark on a line of its own before it, which says why:

    <!-- not run: the reason -->
    <!-- run with: more options of every command in it: the reason -->
"""

import json
import re
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from unicomp.cli.main import exit_code
from unicomp.errors import UnicompError
from unicomp.recipes import gate_file
from unicomp.recipes.load import problems

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
# Those that take a few seconds at most.
QUICK = {
    f"docs/{name}.md"
    for name in ("calibration", "cpu", "distillation", "formats", "limits", "method", "planning")
}

FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[a-z ]+): (?P<words>[^>]+) -->\n)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<body>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
EXPECTED = re.compile(r"#.*exits with (\d+)")

Capture = pytest.CaptureFixture[str]


@dataclass(frozen=True)
class Block:
    """A fenced block; mark and words are those before it, empty where there are none."""

    language: str
    title: str
    body: str
    mark: str
    words: str
    line: int


@dataclass
class Told:
    """What became of the blocks of a page."""

    run: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    marked: list[str] = field(default_factory=list)


def blocks(text: str) -> Iterator[Block]:
    for found in FENCE.finditer(text):
        parts = {name: value or "" for name, value in found.groupdict().items()}
        yield Block(line=text.count("\n", 0, found.start("language")) + 1, **parts)


def lines(body: str) -> Iterator[tuple[list[str], int, str]]:
    """Yield the words, the expected exit code and the output file of each command of a block."""
    for line in body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            expected = EXPECTED.search(line)
            file = words[words.index(">") + 1] if ">" in words else ""
            words = words[: words.index(">")] if file else words
            yield words, int(expected[1]) if expected else 0, file


def unprinted(body: str, printed: str) -> str:
    """Return the first line of a `text` block that was not printed after those before it."""
    rest = [" ".join(line.split()) for line in printed.splitlines()]
    for line in body.splitlines():
        if line.strip() in ("", "..."):
            continue
        wanted = re.escape(" ".join(line.split())).replace(r"\.\.\.", ".*")
        while rest and not re.fullmatch(wanted, rest[0]):
            rest.pop(0)
        if not rest:
            return line
        rest.pop(0)
    return ""


def execute(text: str, folder: Path, capsys: Capture) -> Told:
    """Execute the blocks of a page in a folder, and fail at the first that does not hold."""
    told, names, printed = Told(), {"__name__": "page"}, ""
    for block in blocks(text):
        where = f"line {block.line}"
        if block.mark == "not run":
            told.marked.append(f"{where}: {block.words}")
            continue
        more, reason = "", ""
        if block.mark == "run with":
            more, _, reason = block.words.partition(": ")
            told.marked.append(f"{where}: with `{more}`: {reason}")
        assert not block.mark or reason, f"{where}: `{block.mark}` needs a reason"
        if block.language in ("sh", ""):
            printed = ""
            for words, expected, file in lines(block.body):
                assert words[0] == "unicomp", f"{where}: `{words[0]}` is not run; mark the block"
                began = time.perf_counter()
                code = exit_code([*words[1:], *shlex.split(more)])
                told.seconds[" ".join(words)] = time.perf_counter() - began
                out, err = capsys.readouterr()
                assert code == expected, f"{where}: {' '.join(words)}: {code}\n{out}\n{err}"
                if file:
                    (folder / file).write_text(out, encoding="utf-8")
                printed += f"{err}\n{out}\n"
        elif block.language == "python":
            if block.title:
                (folder / block.title).write_text(block.body, encoding="utf-8")
            exec(compile(block.body, where, "exec"), names)
            printed = "\n".join(capsys.readouterr())
        elif block.language == "text":
            missing = unprinted(block.body, printed)
            assert not missing, f"{where}: not printed: {missing}\n{printed}"
        else:
            assert block.title, f"{where}: a block of {block.language} needs a title, or a mark"
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.body, encoding="utf-8")
            if block.language == "yaml":
                check(folder / block.title)
        told.run += 1
    return told


def check(path: Path) -> None:
    """Fail unless a recipe or a list of gates is sound; other files their readers judge."""
    held = yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(held, list):
        assert gate_file.load(path.read_text(encoding="utf-8"), file=path.name)
    elif "stages" in held:
        assert problems(str(path)) == []


def untrue(text: str, report: dict[str, Any]) -> list[str]:
    """Return the scores of a page's tables, named in backticks, that a report does not have so.

    A value holds if it lies in the report's 95% interval, or, without one, is the value itself; a
    baseline's if it differs from the report's by less than half of the last digit.
    """
    scores = {score["name"]: score for score in report["scores"]}
    wrong = []
    for name, base, value in re.findall(r"^\| `(\w+/\w+)`[^|]* \| *(\S*) *\| (\S+) \|", text, re.M):
        score = scores[name]
        low, high = score["ci95"] or (score["value"] - 0.005, score["value"] + 0.005)
        digits = len(base.partition(".")[2])
        same = not base or round(score["baseline"], digits) == float(base)
        if not low <= float(value) <= high or not same:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize(
    "page", [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in PAGES]
)
def test_every_block_of_a_page_holds(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    told = execute((ROOT / page).read_text(encoding="utf-8"), tmp_path, capsys)
    took = [f"{seconds:6.1f} s  {line}" for line, seconds in told.seconds.items()]
    print(f"{page}: {told.run} blocks hold", *told.marked, *took, sep="\n    ")
    if page == "README.md":
        report = json.loads((tmp_path / "out/quickstart/report.json").read_text("utf-8"))
        text = (ROOT / page).read_text(encoding="utf-8")
        assert untrue(text, report) == []
        shown = "| `fidelity/kl` to the base, nats per token | | 0.0016 |"
        assert shown in text
        assert untrue(text.replace(shown, shown.replace("0.0016", "0.0008")), report) == [
            "fidelity/kl"
        ]
        assert untrue(text.replace("| 2.242 |", "| 2.252 |"), report) == ["accuracy/perplexity"]


def test_most_blocks_are_executed_as_they_stand() -> None:
    every: list[Any] = [
        (page, block)
        for page in PAGES
        for block in blocks((ROOT / page).read_text(encoding="utf-8"))
    ]
    marked = [(page, block) for page, block in every if block.mark]
    for page, block in marked:
        print(f"{page}:{block.line}: {block.mark}: {block.words}")
        assert block.mark in ("not run", "run with")
        named = re.findall(r"[\w/]+\.(?:py|md)\b", block.words)
        assert all((ROOT / path).is_file() for path in named), block.words
    print(f"{len(every) - len(marked)} of {len(every)} blocks are executed as they stand")
    assert len(marked) <= len(every) / 8


# the executor itself

WRONG = {
    "a failing command": "```sh\nunicomp recipes show absent\n```\n",
    "another exit code": "```sh\nunicomp recipes list  # exits with 3\n```\n",
    "another program": "```sh\nls\n```\n",
    "a failing statement": "```python\nassert 1 == 2\n```\n",
    "words nobody printed": "```sh\nunicomp recipes list\n```\n```text\nno such recipe\n```\n",
    "printed, in another order": "```python\nprint(1)\nprint(2)\n```\n```text\n2\n1\n```\n",
    "printed once only": "```python\nprint(1)\n```\n```text\n1\n1\n```\n",
    "a wrong recipe": '```yaml title="r.yaml"\nversion: 1\nstages: [{quantize: gtpq}]\n```\n',
    "a wrong gate": '```yaml title="g.yaml"\n- score: accuracy/x\n  least: 1\n```\n',
    "a file without a name": "```yaml\nversion: 1\n```\n",
    "a mark without a reason": "<!-- run with: --json -->\n```sh\nunicomp recipes list\n```\n",
}


@pytest.mark.parametrize("why", WRONG)
def test_executor_rejects(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, UnicompError)):
        execute(WRONG[why], tmp_path, capsys)


def test_executor_takes_what_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    text = """
```sh
unicomp recipes show absent  # exits with 1
unicomp recipes cp w4-rtn mine.yaml
unicomp recipes list > list.txt
```
```text
error: no recipe `absent`
mine...
```
```yaml title="more.yaml"
version: 1
stages:
  - quantize: rtn
```
<!-- run with: --json: a page would not say so -->
```
unicomp recipes check \\
    more.yaml
```
```text
...unicomp.recipes.check/1...
```
<!-- not run: it would clean the disk -->
```sh
rm -rf out
```
```python
n = 2
```
```python
assert n == 2
```
"""
    told = execute(text, tmp_path, capsys)
    assert told.run == 7
    assert len(told.marked) == 2
    assert "w4-rtn" in (tmp_path / "list.txt").read_text(encoding="utf-8")

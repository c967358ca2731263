"""What the user sees, on a terminal and off it."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import pytest

from unicomp.cli import show
from unicomp.recipes.stage.progress import Progress

Drawn = AbstractContextManager["Terminal"]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def talk() -> Iterator[None]:
    """Leave nothing quiet."""
    yield
    show.quiet(False)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Drawn]:
    """A function that makes stdout and stderr one terminal of 60 columns for a while."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)

    @contextmanager
    def make() -> Iterator[Terminal]:
        stream = Terminal()
        with redirect_stdout(stream), redirect_stderr(stream):
            yield stream

    return make


ROWS: list[tuple[object, ...]] = [
    ("model.layers.*[0]", 12, 0.25, None, "1.05 MB"),
    ("lm_head", 1234, 1e-9, True, "9 B"),
]


def test_table_off_a_terminal_is_plain(capsys: pytest.CaptureFixture[str]) -> None:
    show.table("a title", ["name", "n", "error", "fine", "bytes"], ROWS)
    show.table(None, ["empty"], [])
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "a title",
        "name                   n  error  fine    bytes",
        "model.layers.*[0]     12   0.25  -     1.05 MB",
        "lm_head            1,234  1e-09  True      9 B",
        "empty",
    ]


def test_long_lines_are_not_wrapped_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    show.table(None, ["why"], [("word " * 200,)])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_table_on_a_terminal_fits_it(terminal: Callable[[], Drawn]) -> None:
    with terminal() as screen:
        show.table("a title", ["name", "why"], [("re:[bold]x[/bold]", "word " * 40)])
    lines = screen.getvalue().splitlines()
    assert "\x1b[1m" in lines[0]
    assert "[bold]x[/bold]" in screen.getvalue()
    assert len(lines) > 4
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in lines) <= 60


def test_no_color_is_honoured(
    terminal: Callable[[], Drawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with terminal() as screen:
        show.error("wrong", hint="right")
        show.table("a title", ["name"], [("x",)])
    assert "\x1b[3" not in screen.getvalue()


def test_errors_and_hints(capsys: pytest.CaptureFixture[str]) -> None:
    show.error("`x`: 3 is not 4", hint="use `4`")
    show.error("no hint [here]")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: `x`: 3 is not 4\nhint: use `4`\nerror: no hint [here]\n"


def test_errors_on_a_terminal_say_the_same(terminal: Callable[[], Drawn]) -> None:
    with terminal() as screen:
        show.error("[b]x[/b] " + "long " * 30, hint="use `4`")
    text = screen.getvalue()
    assert "error: \x1b[0m[b]x[/b] long" in text
    assert "\x1b[31m" in text or "31m" in text
    assert len(text.splitlines()) == 2


def test_quiet_keeps_errors_and_results(capsys: pytest.CaptureFixture[str]) -> None:
    show.quiet(True)
    show.note("talk")
    with show.progress() as progress:
        progress(Progress("layers", 1, 2, "x", note="careful"))
    show.error("wrong")
    show.text("result")
    assert capsys.readouterr() == ("result\n", "error: wrong\n")


def test_json_is_one_object_with_a_schema(capsys: pytest.CaptureFixture[str]) -> None:
    show.json({"schema": "x/1", "name": "é", "value": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"schema": "x/1", "name": "é", "value": [1, None]}
    with pytest.raises(ValueError, match="schema"):
        show.json({"value": 1})
    rows = {"none": iter(()), "some": ({"at": at, "of": [at, None]} for at in range(2))}
    show.json({"schema": "x/1", "deep": [{"of": {"it": [{}, ()]}}], "none yet": []}, rows)
    assert json.loads(capsys.readouterr().out) == {
        "schema": "x/1",
        "deep": [{"of": {"it": [{}, []]}}],
        "none yet": [],
        "none": [],
        "some": [{"at": 0, "of": [0, None]}, {"at": 1, "of": [1, None]}],
    }
    with pytest.raises(ValueError, match="not JSON compliant"):
        show.json({"schema": "x/1", "value": float("nan")})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0, "0.0s"),
        (9.94, "9.9s"),
        (9.96, "10s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.6, "1h00m"),
        (7830, "2h10m"),
        (100_000, "27h46m"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert show.duration(seconds) == expected


STEPS = [
    Progress("prepare", 0, 0, "plan", note="experts stay dense"),
    Progress("prepare", 0, 0, "hashing the source"),
    Progress("copy", 0, 0, "model.norm.weight"),
    Progress("copy", 0, 0, "model.embed_tokens.weight"),
    Progress("layers", 0, 5, "q_proj", error=0.01234, tokens_per_s=1234.5, seconds_left=None),
    Progress("layers", 1, 5, "k_proj", error=0.5, tokens_per_s=None, seconds_left=75.0),
]


def test_progress_off_a_terminal_is_a_line_per_step(capsys: pytest.CaptureFixture[str]) -> None:
    with show.progress() as progress:
        for step in STEPS:
            progress(step)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "note: experts stay dense",
        "prepare  hashing the source",
        "copy  model.norm.weight",
        "layers 0/5  q_proj  error 0.0123  1,234 tokens/s",
        "layers 1/5  k_proj  error 0.5  1m15s left",
    ]


def test_what_only_counts_up_is_said_at_every_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with show.progress() as progress:
        for done in range(201):
            progress(Progress("score", done, 200, "windows"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "score 0/200  windows"
    assert lines[-1] == "score 200/200  windows"
    assert len(lines) == 11


def test_progress_on_a_terminal_is_one_live_line(terminal: Callable[[], Drawn]) -> None:
    with terminal() as screen, show.progress() as progress:
        for step in STEPS:
            progress(step)
    text = screen.getvalue()
    assert "note: experts stay dense" in text
    assert "\x1b[2K" in text  # lines are drawn over
    assert text.count("hashing the source") <= 2


def test_bug_shows_where_and_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    def deep(level: int, secret: str) -> Any:
        return deep(level - 1, secret) if level else dict[int, str]()[len(secret)]

    try:
        deep(30, "hunter2")
    except KeyError as failure:
        show.bug(failure)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) < 30
    assert "KeyError: 7" in err
    assert "hunter2" not in err
    assert lines[-2] == "error: this is a bug in unicomp: KeyError"
    assert "`unicomp env`" in lines[-1]


def test_a_closed_pipe_ends_it_silently() -> None:
    code = "from unicomp.cli import show\nfor _ in range(100000): show.text('x' * 100)"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 10)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == show.CLOSED_PIPE

"""Everything the user sees: results to stdout, talk to stderr.

The only file that imports rich, and only when there is something to draw: on a terminal tables
have rules and progress is one live line; anywhere else both are plain lines, never wrapped, that
`grep` and a log can use. `NO_COLOR` is honoured, and no meaning is carried by colour alone.
"""

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from json import JSONEncoder, dumps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

    from unicomp.recipes.stage.progress import Progress

NUMBER = re.compile(r"[-+<>~±]?[\d.,]+(\s?\S{1,8})?|-")
UNWRAPPED = 100_000
FRAMES = 8
CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ended


@dataclass
class _Talk:
    quiet: bool = False


_talk = _Talk()


def quiet(value: bool) -> None:
    """Say nothing on stderr but errors, or talk again."""
    _talk.quiet = value


def text(value: str, *, end: str = "\n") -> None:
    """Write a result to stdout, at once.

    Raises SystemExit, silently, when nobody reads any more (`unicomp inspect ... | head`).
    """
    _write([value, end])


def _write(pieces: Iterable[str]) -> None:
    """Write to stdout piece by piece, and flush once."""
    try:
        sys.stdout.writelines(pieces)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would flush again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(CLOSED_PIPE) from None


def json(value: Mapping[str, Any], rows: Mapping[str, Iterable[Any]] | None = None) -> None:
    """Write the one JSON object of a command to stdout; it names its `schema`.

    rows  further lists by name, each entry made when it is written: a plan has ten thousands
    """
    if "schema" not in value:
        raise ValueError("a JSON result names its schema")
    *told, end = _pieces(value, "")  # whole, so that nothing is written where it is no JSON
    _write(chain(told, _streamed(rows or {}), (end, "\n")))


def _streamed(rows: Mapping[str, Iterable[Any]]) -> Iterator[str]:
    for name, entries in rows.items():
        between = f",\n {dumps(name)}: [\n  "
        for entry in entries:
            yield between + _line(entry)
            between = ",\n  "
        yield "\n ]" if between == ",\n  " else between.rstrip() + "]"


_line = JSONEncoder(ensure_ascii=False, allow_nan=False).encode  # `dumps` makes one a call


def _pieces(value: Any, margin: str) -> Iterator[str]:
    """Yield a value as JSON: what is flat on one line, but not the whole of it.

    A piece at a time, and each flat piece by the encoder in C: with every value on a line of its
    own, the 37000 tensors of a large model took a second and 80 MB.
    """
    nested = isinstance(value, Mapping | list | tuple)
    if not nested or not value or (margin and _flat(value)):
        yield _line(value)
        return
    start, end = "{}" if isinstance(value, Mapping) else "[]"
    inner = margin + " "
    for number, entry in enumerate(value):
        yield f"{',' if number else start}\n{inner}"
        if isinstance(value, Mapping):
            yield f"{_line(str(entry))}: "
            entry = value[entry]
        yield from _pieces(entry, inner)
    yield f"\n{margin}{end}"


def _flat(value: Mapping[str, Any] | Sequence[Any]) -> bool:
    """Tell whether a container holds only plain values, and lists of them."""
    entries = value.values() if isinstance(value, Mapping) else value
    return all(
        not isinstance(one, Mapping | list | tuple)
        or (isinstance(one, list) and not any(isinstance(x, Mapping | list | tuple) for x in one))
        for one in entries
    )


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table to stdout; columns of numbers are set to the right, None shows as `-`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [[_cell(value) for value in row] for row in rows]
    live = sys.stdout.isatty()
    drawn = Table(box=box.SIMPLE_HEAD if live else None, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        numbers = all(NUMBER.fullmatch(row[index]) for row in cells)
        drawn.add_column(
            Text(column),
            justify="right" if numbers and cells else "left",
            overflow="fold",
            no_wrap=not live,
        )
    for row in cells:
        drawn.add_row(*map(Text, row))
    console = Console(file=sys.stdout, width=None if live else UNWRAPPED, highlight=False)
    with console.capture() as capture:
        if title is not None:
            console.print(Text(title, style="bold"))
        console.print(drawn)
    text("\n".join(line.rstrip() for line in capture.get().splitlines()))


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Write names and values to stdout, a line each."""
    pairs = list(pairs)
    width = max((len(name) for name, _ in pairs), default=0)
    text("\n".join(f"{name:<{width}}  {value}" for name, value in pairs))


def note(message: str) -> None:
    """Say something about the work on stderr, unless the user asked for quiet."""
    if not _talk.quiet:
        _say(message)


def error(message: str, *, hint: str | None = None) -> None:
    """Say what is wrong and what to do about it, on stderr, in two lines."""
    _say(message, label="error")
    if hint is not None:
        _say(hint, label="hint")


def hint(message: str) -> None:
    """Say what to do, on stderr, where one hint answers several errors."""
    _say(message, label="hint")


def bug(failure: BaseException) -> None:
    """Show an unexpected failure: the last frames, without values, and how to report it."""
    lines = traceback.format_exception(failure, limit=-FRAMES, chain=False)
    _say("".join(lines).rstrip())
    error(
        f"this is a bug in unicomp: {type(failure).__name__}",
        hint="report it with the lines above, the command and the output of `unicomp env`",
    )


def duration(seconds: float) -> str:
    """Return a time in its two largest units: `48s`, `3m05s`, `2h10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


@contextmanager
def progress() -> Iterator[Callable[["Progress"], None]]:
    """Yield a function that shows each step: a live line on a terminal, else a line per step."""
    if _talk.quiet:
        yield lambda _: None
    elif sys.stderr.isatty():
        with _live() as step:
            yield step
    else:
        yield _lines()


def _lines() -> Callable[["Progress"], None]:
    stage, detail, told = "", "", 0.0

    def show(step: "Progress") -> None:
        nonlocal stage, detail, told
        if step.note is not None:
            _say(f"note: {step.note}")
            return
        # What is not counted is said once; what only counts up, at every tenth of its way.
        share = step.done / step.total if step.total else 0.0
        new = step.stage != stage or (step.total and step.detail != detail)
        if new or share - told >= 0.1 or (step.total and step.done == step.total):
            _say("  ".join(_parts(step)))
            stage, detail, told = step.stage, step.detail, share

    return show


@contextmanager
def _live() -> Iterator[Callable[["Progress"], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, highlight=False)
    words = TextColumn("{task.fields[stage]}", markup=False)
    rest = TextColumn("{task.fields[rest]}", markup=False)
    bar = Bar(words, BarColumn(24), MofNCompleteColumn(), rest, console=console, transient=True)
    with bar:
        task = bar.add_task("", stage="", rest="", total=None)

        def show(step: "Progress") -> None:
            if step.note is not None:
                bar.console.print(f"note: {step.note}", markup=False)
            bar.update(
                task,
                completed=step.done,
                total=step.total or None,
                stage=step.stage,
                rest="  ".join(_parts(step)[1:]),
            )

        yield show


def _parts(step: "Progress") -> list[str]:
    parts = [f"{step.stage} {step.done}/{step.total}" if step.total else step.stage]
    if step.detail:
        parts.append(step.detail)
    if step.error is not None:
        parts.append(f"error {step.error:.3g}")
    if step.tokens_per_s is not None:
        parts.append(f"{step.tokens_per_s:,.0f} tokens/s")
    if step.seconds_left is not None:
        parts.append(f"{duration(step.seconds_left)} left")
    return parts


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def _say(message: str, *, label: str | None = None) -> None:
    if not sys.stderr.isatty():
        prefix = f"{label}: " if label else ""
        print(prefix + message, file=sys.stderr, flush=True)
        return
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(_labelled(label, message))


def _labelled(label: str | None, message: str) -> "Text":
    from rich.text import Text

    if label is None:
        return Text(message)
    style = "bold red" if label == "error" else "bold cyan"
    return Text.assemble((f"{label}: ", style), message)

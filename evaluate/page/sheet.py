"""What every page is made of: the frame that holds it, its style, tables and figures.

A page is one file with no script in it. Its policy lets it load nothing at all; it is dark where
the reader's screen is, and a table's rows become cards where the screen is narrow.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from unicomp.writer import write_file

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
STYLE = """
:root { color-scheme: light dark; --page: #fbfbf9; --card: #fff; --ink: #1d2129; --soft: #5b6472;
  --rule: #dcdfe4; --model: #1763b6; --base: #8a6d1a; --worse: #b3261e; --better: #1c7a3e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1c2027; --ink: #e6e8ec;
  --soft: #a2abb8; --rule: #353b45; --model: #79b4f5; --base: #dcb95a; --worse: #ff8a80;
  --better: #7fd69b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 70rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: .4rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
h3 { font-size: 1rem; margin: .2rem 0 .4rem; }
p, ul { margin: .4rem 0; } .soft, figcaption, footer { color: var(--soft); font-size: .875rem; }
code { font-size: .9em; }
.badge { display: inline-block; padding: 0 .5em; border: 1px solid currentColor;
  border-radius: .8em; font-size: .8125rem; white-space: nowrap; }
.worse, .fail { color: var(--worse); } .better, .pass { color: var(--better); }
.unclear, .inconclusive, .not-applied { color: var(--soft); }
table { border-collapse: collapse; width: 100%; background: var(--card); font-size: .875rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; } td.number { font-variant-numeric: tabular-nums; }
td small { display: block; color: var(--soft); font-size: .8125rem; }
.figures { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); }
figure, .card { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--rule);
  border-radius: .5rem; }
.tiles { display: grid; gap: .6rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
.tiles .card { margin: 0; } .tiles small { display: block; color: var(--soft); }
.tiles b { display: block; font-size: 1.25rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
.tiles .badge { font-weight: 400; vertical-align: middle; }
.worse-list { columns: 26rem 2; padding-left: 1.2rem; } .worse-list li { break-inside: avoid; }
.worse-list span { white-space: nowrap; }
svg { display: block; width: 100%; max-width: 30rem; height: auto; }
svg text { fill: var(--soft); font-size: 11.5px; }
svg line { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg .ideal { stroke: var(--soft); stroke-dasharray: 4 4; } svg .link { stroke: var(--soft); }
svg .whisker { stroke: var(--model); stroke-width: 3; stroke-opacity: .45; }
svg .whisker.worse { stroke: var(--worse); }
svg polyline { fill: none; stroke-width: 1.5; } svg .curve.model { stroke: var(--model); }
svg .curve.base { stroke: var(--base); stroke-dasharray: 5 3; }
svg polygon.model { fill: var(--model); } svg polygon.model.worse { fill: var(--worse); }
svg circle.base { fill: var(--card); stroke: var(--base); stroke-width: 2; }
blockquote { margin: .3rem 0; padding-left: .7rem; border-left: 3px solid var(--rule);
  white-space: pre-wrap; }
@media (max-width: 40rem) {
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { display: block; padding: .5rem .6rem; border-bottom: 1px solid var(--rule); }
  td { display: flex; gap: .6rem; justify-content: space-between; border: 0; padding: .1rem 0;
    text-align: right; }
  td::before { content: attr(data-name); color: var(--soft); text-align: left; flex: none; }
  td:first-child { font-weight: 600; text-align: left; } td:first-child::before { content: none; }
  td:empty { display: none; }
}
"""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def markup(value: str) -> Markup:
    """Return text as HTML; what is HTML already stays as it is."""
    return value if isinstance(value, Markup) else Markup(escape(value))


def page(title: str, parts: Sequence[str]) -> str:
    """Return a whole page; parts are HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table without its empty columns.

    A cell that is no `Markup` is escaped, and an empty one hidden on a phone.
    """
    kept = [at for at in range(len(columns)) if any(row[at] for row in rows)]
    columns = [columns[at] for at in kept]
    rows = [[row[at] for at in kept] for row in rows]
    head = "".join(f"<th>{markup(column)}</th>" for column in columns)
    lines = []
    for row in rows:
        cells = [
            f'<td data-name="{escape(column)}">{markup(cell)}</td>'
            for column, cell in zip(columns, row, strict=True)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def figure(title: str, svg: str, caption: str) -> str:
    """Return a plot under its title, with what it says below."""
    return (
        f"<figure><h3>{markup(title)}</h3>{svg}<figcaption>{markup(caption)}</figcaption></figure>"
    )


def badge(word: str) -> Markup:
    """Return an outcome as a word in a frame; no meaning is by colour alone."""
    return Markup(f'<span class="badge {escape(word.replace(" ", "-"))}">{escape(word)}</span>')


def number(value: float | None) -> str:
    """Return a value with four digits, or nothing."""
    return "" if value is None else f"{value:.4g}"


def span(interval: tuple[float, float] | None) -> str:
    """Return an interval, or nothing."""
    return "" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def write(path: Path, text: str) -> None:
    """Write a page: whole or not at all.

    Raises UnicompError if it cannot be written.
    """
    write_file(path, text.encode())

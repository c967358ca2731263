"""Plots as text: SVG that stands in the page, in the page's colours, with a title in words.

Coordinates are those of a phone's width, so that text keeps its size there; wider screens show a
plot no larger than `WIDTH` allows. What tells two things apart is shape as well as colour.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

WIDTH = 360  # units of a plot, about as many pixels on a phone
LEFT, RIGHT, TOP, BOTTOM = 40.0, 10.0, 12.0, 34.0

Scale = Callable[[float], float]


class Mark(NamedTuple):
    """One row of `dumbbells`: before and after, each a share, and the interval after."""

    name: str
    before: float | None
    after: float
    interval: tuple[float, float] | None
    worse: bool


class Point(NamedTuple):
    """One point of `scatter`."""

    name: str
    x: float
    y: float
    best: bool


def dumbbells(marks: Sequence[Mark], title: str) -> str:
    """Draw before and after on one axis from 0 to 1, a row each."""
    row = 34.0
    height = len(marks) * row + 30
    across = _linear(0, 1, 12, WIDTH - 12)
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = across(share)
        parts.append(_line(x, 4, x, height - 26, "grid"))
        parts.append(_text(x, height - 10, f"{share:g}", "middle"))
    for place, mark in enumerate(marks):
        y = place * row + 24
        parts.append(_text(12, y - 9, mark.name, "start"))
        if mark.before is not None:
            parts.append(_line(across(mark.before), y, across(mark.after), y, "link"))
        if mark.interval is not None:
            low, high = (across(min(1.0, max(0.0, end))) for end in mark.interval)
            parts.append(_line(low, y, high, y, "whisker worse" if mark.worse else "whisker"))
        if mark.before is not None:
            parts.append(_circle(across(mark.before), y, 4.5, "base"))
        parts.append(_diamond(across(mark.after), y, 5, "model worse" if mark.worse else "model"))
    return _svg(height, title, parts)


def reliability(
    bars: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], title: str
) -> str:
    """Draw how often a model is right against how sure it is; on the line, they agree.

    bars, base  of `statistics.reliability.diagram`; `base` may be empty
    """
    height = 300.0
    across = _linear(0, 1, LEFT, WIDTH - RIGHT)
    up = _linear(0, 1, height - BOTTOM, TOP)
    parts = _frame(across, up, height, (0.0, 0.5, 1.0), (0.0, 0.5, 1.0), "confidence", "right")
    parts.append(_line(across(0), up(0), across(1), up(1), "ideal"))
    for kind, found in (("base", base), ("model", bars)):
        seen = [bar for bar in found if bar["count"]]
        total = sum(bar["count"] for bar in seen)
        dots = [(across(bar["confidence"]), up(bar["accuracy"])) for bar in seen]
        parts.append(_path(dots, f"curve {kind}"))
        for bar, (x, y) in zip(seen, dots, strict=True):
            size = 2.5 + 7 * math.sqrt(bar["count"] / total)
            said = f"{bar['count']} predictions, sure {bar['confidence']:.3f}, right "
            said += f"{bar['accuracy']:.3f}"
            draw = _circle if kind == "base" else _diamond
            parts.append(draw(x, y, size, kind, said))
    return _svg(height, title, parts)


def scatter(
    points: Sequence[Point], x: str, y: str, title: str, shown: Callable[[float], str]
) -> str:
    """Draw models by two scores; those on the front are filled.

    shown  how to write a value of x
    """
    height = 260.0
    xs, ys = [point.x for point in points], [point.y for point in points]
    across, up = _padded(xs, LEFT, WIDTH - RIGHT), _padded(ys, height - BOTTOM, TOP)
    parts = _frame(across, up, height, (min(xs), max(xs)), (min(ys), max(ys)), x, y, shown)
    front = sorted((across(point.x), up(point.y)) for point in points if point.best)
    parts.append(_path(front, "curve model"))
    for point in points:
        at = across(point.x), up(point.y)
        kind = "model" if point.best else "base"
        parts.append((_diamond if point.best else _circle)(*at, 5.5, kind, point.name))
        left = at[0] > WIDTH / 2
        parts.append(
            _text(at[0] + (-9 if left else 9), at[1] - 7, point.name, "end" if left else "start")
        )
    return _svg(height, title, parts)


def steps(values: Sequence[float], x: str, y: str, title: str, *, first: int = 0) -> str:
    """Draw one value after another, as of layers or of positions, from zero up.

    first  number of the first one
    """
    height = 200.0
    top = max([*values, 0.0]) or 1.0
    last = first + max(1, len(values) - 1)
    across = _linear(first, last, LEFT + 4, WIDTH - RIGHT - 4)
    up = _linear(0, top, height - BOTTOM, TOP)
    ends = (float(first), float(last))
    parts = _frame(across, up, height, ends, (0.0, top), x, y)
    dots = [(across(first + place), up(value)) for place, value in enumerate(values)]
    parts.append(_path(dots, "curve model"))
    if len(values) <= 64:
        for place, (at, value) in enumerate(zip(dots, values, strict=True)):
            parts.append(_diamond(*at, 4, "model", f"{x} {first + place}: {value:.4g}"))
    return _svg(height, title, parts)


def _linear(low: float, high: float, begin: float, end: float) -> Scale:
    width = (high - low) or 1.0
    return lambda value: begin + (value - low) / width * (end - begin)


def _padded(values: Sequence[float], begin: float, end: float) -> Scale:
    low, high = min(values), max(values)
    room = (high - low) * 0.12 or abs(high) * 0.1 or 1.0
    return _linear(low - room, high + room, begin, end)


def _frame(
    across: Scale,
    up: Scale,
    height: float,
    xs: Sequence[float],
    ys: Sequence[float],
    x: str,
    y: str,
    shown: Callable[[float], str] | None = None,
) -> list[str]:
    """Return axes with some values and their names."""
    floor = height - BOTTOM
    parts = [
        _line(LEFT, TOP, LEFT, floor, "axis"),
        _line(LEFT, floor, WIDTH - RIGHT, floor, "axis"),
        _text((LEFT + WIDTH - RIGHT) / 2, height - 4, x, "middle"),
        f'<text class="name" transform="translate(11 {(TOP + floor) / 2:.1f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y)}</text>',
    ]
    for value in dict.fromkeys(xs):
        at = across(value)
        parts.append(_line(at, floor, at, floor + 4, "axis"))
        anchor = "end" if at > WIDTH - 50 else "start" if at < LEFT + 20 else "middle"
        parts.append(_text(at, floor + 16, (shown or _short)(value), anchor))
    for value in dict.fromkeys(ys):
        at = up(value)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "grid"))
        parts.append(_text(LEFT - 4, at + 4, _short(value), "end"))
    return parts


def _short(value: float) -> str:
    return f"{value:.3g}"


def _svg(height: float, title: str, parts: Sequence[str]) -> str:
    said = escape(title)
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{said}">'
        f"<title>{said}</title>{''.join(parts)}</svg>"
    )


def _line(x: float, y: float, to_x: float, to_y: float, kind: str) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line class="{kind}" {ends}/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _path(dots: Sequence[tuple[float, float]], kind: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
    return f'<polyline class="{kind}" points="{points}"/>'


def _circle(x: float, y: float, size: float, kind: str, said: str = "") -> str:
    title = f"<title>{escape(said)}</title>"
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}">{title}</circle>'


def _diamond(x: float, y: float, size: float, kind: str, said: str = "") -> str:
    corners = ((x - size, y), (x, y - size), (x + size, y), (x, y + size))
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
    return f'<polygon class="{kind}" points="{points}"><title>{escape(said)}</title></polygon>'

"""The page of several reports side by side: every score, who is best, size against quality."""

from collections.abc import Sequence

from unicomp import size
from unicomp.evaluate.page import plots
from unicomp.evaluate.page.scorecard import KINDS, front
from unicomp.evaluate.page.sheet import Markup, badge, figure, markup, number, page, span, table
from unicomp.evaluate.scores import Report, Score
from unicomp.evaluate.verdicts.change import change
from unicomp.evaluate.verdicts.compare import Comparison, Row


def render(found: Comparison, reports: Sequence[Report]) -> str:
    """Return the page of a comparison.

    reports  those that were compared, in the same order
    """
    parts = [
        f"<h1>{len(reports)} models side by side</h1>",
        f'<p class="soft">{markup(", ".join(found.names))}</p>',
        *(f"<p>{markup(note)}</p>" for note in found.notes),
        *_fronts(found),
        *_gates(found),
    ]
    for axis in dict.fromkeys(row.name.partition("/")[0] for row in found.rows):
        rows = [_row(row) for row in found.rows if row.name.startswith(f"{axis}/")]
        parts += [f"<h2>{markup(axis.capitalize())}</h2>"]
        parts.append(table(["score", *found.names, "unit", "better"], rows))
    parts += _reliability(found, reports)
    parts.append(
        "<footer><p><b>*</b> the best value; <b>**</b> its 95% interval lies beyond all others'. "
        "There is no overall mark: a mean over axes would hide what was lost.</p></footer>"
    )
    return page("models side by side", parts)


def _row(row: Row) -> list[str]:
    cells: list[str] = []
    for at, score in enumerate(row.scores):
        mark = "" if at not in row.best else " **" if row.clear else " *"
        cells.append(_cell(score, mark))
    code = Markup(f"<code>{markup(row.name.partition('/')[2])}</code>")
    return [code, *cells, row.unit, "higher" if row.higher_is_better else "lower"]


def _cell(score: Score | None, mark: str) -> Markup:
    if score is None:
        return Markup("-")
    if score.value is None:
        return badge(score.status)
    value = size.show(score.value) if score.unit == "bytes" else number(score.value)
    moved = change(score)
    said = f" {badge('worse')}" if moved == "worse" else ""
    below = f"<small>{markup(span(score.ci95))}</small>" if score.ci95 else ""
    return Markup(f"<span>{markup(value + mark)}{said}{below}</span>")


def _fronts(found: Comparison) -> list[str]:
    made = []
    for own in found.fronts:
        row = next(row for row in found.rows if row.name == own.y)
        points = [
            (name, *point)
            for name, point in zip(found.names, own.points, strict=True)
            if point is not None
        ]
        made.append(front(points, own.x, own.y, higher=row.higher_is_better))
    if not made:
        return []
    return ["<h2>Size and quality</h2>", f'<div class="figures">{"".join(made)}</div>']


def _gates(found: Comparison) -> list[str]:
    rows = [
        [
            name,
            Markup(f"<code>{markup(verdict.score)}</code>"),
            badge(verdict.outcome),
            f"{verdict.check} {number(verdict.limit)}" if verdict.check else "",
            number(verdict.value) + (f" ({span(verdict.interval)})" if verdict.interval else ""),
            verdict.reason or "",
        ]
        for name, verdicts in zip(found.names, found.verdicts, strict=True)
        for verdict in verdicts
        if verdict.outcome != "pass"
    ]
    if not any(found.verdicts):
        return []
    passed = sum(verdict.outcome == "pass" for own in found.verdicts for verdict in own)
    said = f"<p>{passed} bounds passed.</p>"
    columns = ["model", "score", "verdict", "bound", "found, 95%", "why"]
    return ["<h2>Gates</h2>", said, *([table(columns, rows)] if rows else [])]


def _reliability(found: Comparison, reports: Sequence[Report]) -> list[str]:
    made = []
    for name, report in zip(found.names, reports, strict=True):
        for of, key in KINDS.items():
            score = next((own for own in report.scores if own.name == key), None)
            if score is not None and "diagram" in score.detail:
                base = score.detail.get("baseline_diagram") or []
                title = f"{name}: reliability of {of}"
                plot = plots.reliability(score.detail["diagram"], base, title)
                made.append(figure(title, plot, "Circles: its baseline." if base else ""))
    if not made:
        return []
    return ["<h2>Reliability</h2>", f'<div class="figures">{"".join(made)}</div>']

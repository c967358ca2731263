"""Reports side by side: every score of every model, and who is on the front of size and accuracy.

A model is on the front of two scores if no other is at least as good on both and better on one.
There is no overall mark: a mean over axes would hide what was lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unicomp.errors import UnicompError
from unicomp.evaluate.scores import Report, Score
from unicomp.evaluate.verdicts import gates
from unicomp.evaluate.verdicts.gates import Gate, Verdict

SCHEMA = "unicomp.comparison/1"
SIZE = "efficiency/disk_bytes"
QUALITY = ("accuracy/perplexity", "accuracy/bits_per_byte")


@dataclass(frozen=True, slots=True)
class Row:
    """One score of all models.

    scores  in the order of the reports; None where a report has none of that name
    best    places of the reports whose value is best; empty where fewer than two have one
    clear   the best one's interval lies beyond every other's
    """

    name: str
    unit: str
    higher_is_better: bool
    scores: tuple[Score | None, ...]
    best: tuple[int, ...]
    clear: bool


@dataclass(frozen=True, slots=True)
class Front:
    """Models by two scores.

    x, y    the scores' names
    points  (value of x, value of y) of each report; None where one is not known
    on      places of the reports that no other outdoes
    """

    x: str
    y: str
    points: tuple[tuple[float, float] | None, ...]
    on: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Reports side by side.

    names     of the models, told apart by a number where two are alike
    rows      in the order of the first report that has the score
    fronts    size against each score of quality that the reports have
    verdicts  per report; empty lists where there are no gates
    notes     what the reader must know: other baselines, machines or data
    """

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    fronts: tuple[Front, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "schema": SCHEMA,
            "models": list(self.names),
            "scores": [
                {
                    "name": row.name,
                    "unit": row.unit,
                    "higher_is_better": row.higher_is_better,
                    "models": [
                        None if own is None else own.model_dump(mode="json") for own in row.scores
                    ],
                    "best": list(row.best),
                    "clear": row.clear,
                }
                for row in self.rows
            ],
            "fronts": [
                {"x": own.x, "y": own.y, "points": list(own.points), "on": list(own.on)}
                for own in self.fronts
            ],
            "gates": [
                {"outcome": gates.outcome(own), "verdicts": [verdict.to_json() for verdict in own]}
                for own in self.verdicts
            ],
            "notes": list(self.notes),
        }


def compare(reports: Sequence[Report], bounds: Sequence[Gate] = ()) -> Comparison:
    """Put reports side by side.

    bounds  gates that each report is held against

    Raises UnicompError with fewer than two reports.
    """
    if len(reports) < 2:
        raise UnicompError(
            f"{len(reports)} report to compare", hint="name two or more: `unicomp compare A B`"
        )
    names = list(dict.fromkeys(score.name for report in reports for score in report.scores))
    rows = tuple(_row(name, reports) for name in names)
    fronts = [_front(SIZE, name, rows) for name in _quality(rows)]
    return Comparison(
        names=_names(reports),
        rows=rows,
        fronts=tuple(front for front in fronts if front is not None),
        verdicts=tuple(tuple(gates.decide(report, bounds)) for report in reports),
        notes=tuple(_notes(reports, rows)),
    )


def _names(reports: Sequence[Report]) -> tuple[str, ...]:
    plain = [report.model.id for report in reports]
    return tuple(
        f"{name} ({plain[: at + 1].count(name)})" if plain.count(name) > 1 else name
        for at, name in enumerate(plain)
    )


def _row(name: str, reports: Sequence[Report]) -> Row:
    found: list[Score | None] = []
    for report in reports:
        found.append(next((own for own in report.scores if own.name == name), None))
    first = next(own for own in found if own is not None)
    sign = 1 if first.higher_is_better else -1
    known = {
        at: sign * own.value
        for at, own in enumerate(found)
        if own is not None and own.value is not None
    }
    top = max(known.values(), default=0.0)
    best = tuple(at for at, value in known.items() if value == top) if len(known) > 1 else ()
    clear = len(best) == 1 and _beyond(found, best[0], sign)
    return Row(name, first.unit, first.higher_is_better, tuple(found), best, clear)


def _beyond(found: Sequence[Score | None], best: int, sign: int) -> bool:
    """Tell whether one score's interval, or exact value, lies beyond all others'."""

    def ends(score: Score) -> tuple[float, float] | None:
        value = score.value
        if value is None or (score.ci95 is None and score.n is not None):
            return None
        low, high = score.ci95 or (value, value)
        return (low, high) if sign > 0 else (-high, -low)

    kept = found[best]
    own = None if kept is None else ends(kept)
    others = [
        ends(score)
        for at, score in enumerate(found)
        if at != best and score is not None and score.value is not None
    ]
    return own is not None and all(other is not None and own[0] > other[1] for other in others)


def _quality(rows: Sequence[Row]) -> list[str]:
    """Return the scores that size is set against: of text, and every task's accuracy."""
    named = [row.name for row in rows]
    return [name for name in named if name in QUALITY or gates.matches("accuracy/*/acc", name)]


def _front(x: str, y: str, rows: Sequence[Row]) -> Front | None:
    """Return the front of two scores; None where fewer than two models have both."""
    found = {row.name: row for row in rows}
    if x not in found:
        return None
    points: list[tuple[float, float] | None] = []
    for across, up in zip(found[x].scores, found[y].scores, strict=True):
        if across is None or up is None or across.value is None or up.value is None:
            points.append(None)
        else:
            points.append((across.value, up.value))
    signs = [1 if found[name].higher_is_better else -1 for name in (x, y)]
    good = {
        at: (signs[0] * point[0], signs[1] * point[1])
        for at, point in enumerate(points)
        if point is not None
    }
    if len(good) < 2:
        return None
    on = tuple(
        at
        for at, (a, b) in good.items()
        if not any(c >= a and d >= b and (c, d) != (a, b) for c, d in good.values())
    )
    return Front(x, y, tuple(points), on)


def _notes(reports: Sequence[Report], rows: Sequence[Row]) -> list[str]:
    notes = []
    baselines = {None if own.baseline is None else own.baseline.id for own in reports}
    if len(baselines) > 1:
        said = ", ".join(sorted(name or "none" for name in baselines))
        notes.append(f"the reports have different baselines: {said}")
    if len({str(sorted(own.machine.items())) for own in reports}) > 1:
        notes.append("the reports are of different machines: times do not compare")
    for row in rows:
        data = {own.detail.get("sha256") for own in row.scores if own is not None} - {None}
        counts = {own.n for own in row.scores if own is not None and own.n is not None}
        if len(data) > 1 or (len(counts) > 1 and not row.name.endswith("_flips")):
            notes.append(f"`{row.name}` was measured on different data")
    return notes

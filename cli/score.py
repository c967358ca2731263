"""`unicomp score`: measure a model, alone or beside a baseline."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from unicomp import size
from unicomp.cli import show
from unicomp.cli.groups import grouped
from unicomp.cli.options import Json, Model, Quiet
from unicomp.cli.score_options import Baseline, How, Result, What

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unicomp.evaluate.scores import Report, Score
    from unicomp.manifest import Stage

ENDS = {"pass": 0, "fail": 3, "inconclusive": 4}  # outcome of the gates -> exit code
FAILED = 1  # where no gate says more: something that was asked for could not be measured


@grouped
def score(
    model: Model,
    baseline: Baseline = None,
    *,
    what: What,
    how: How,
    result: Result,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what a model predicts and answers, beside a baseline.

    Example: unicomp score builtin:tinyworld-pirate --baseline builtin:tinyworld --suite quick
    """
    from unicomp.evaluate import asked, scores
    from unicomp.evaluate.page import scorecard, sheet
    from unicomp.evaluate.score import measure
    from unicomp.evaluate.verdicts import gates
    from unicomp.evaluate.verdicts import junit as verdict_file
    from unicomp.recipes import gate_file
    from unicomp.recipes.stage.progress import Progress

    bounds = [] if result.gate is None else gate_file.read(result.gate)
    for file in (result.out, result.junit, result.html):
        if file is not None:
            scores.check_target(file)
    stages = _stages(model) if result.html is not None else ()
    words = {
        "axes": None if what.axes is None else _words(what.axes),
        "tasks": _words(what.tasks),
        "by": _words(what.by or ("position,layer" if result.html and baseline else "")),
    }
    wanted, run = asked.What(**asdict(what) | words), asked.How(**asdict(how))
    with show.progress() as progress:
        report = measure(
            model,
            baseline,
            wanted,
            run,
            lambda part, done, total: progress(Progress("score", done, total, part)),
        )
    verdicts = gates.decide(report, bounds)
    report = report.model_copy(update={"gates": [verdict.to_json() for verdict in verdicts]})
    if result.out is not None:
        scores.write(result.out, report)
    if result.junit is not None:
        verdict_file.write(result.junit, report.model.id, verdicts)
    if result.html is not None:
        sheet.write(result.html, scorecard.render(report, stages))
    if json:
        show.json(report.to_json())
    else:
        show_report(report)
        for verdict in verdicts:
            show.text(f"gate {verdict}")
    failed = scores.failures(report)
    for (reason, hint), names in failed.items():
        more = f" and {len(names) - 1} more" if names[1:] else ""
        show.error(f"`{names[0]}`{more}: {reason}", hint=hint)
    if code := ENDS[gates.outcome(verdicts)] or (FAILED if failed else 0):
        raise typer.Exit(code)


def _stages(model: str) -> "Sequence[Stage]":
    """Return the stages that made a model, where its folder says so."""
    from unicomp import manifest
    from unicomp.hub import resolve

    folder = resolve(model).folder
    return manifest.read(folder).stages if (folder / manifest.NAME).is_file() else ()


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


def show_report(report: "Report") -> None:
    """Write a report to stdout as one table, and a note for each score without a value."""
    title = report.model.id
    if report.baseline is not None:
        title += f" beside {report.baseline.id}"
    columns = ["score", "value", "95% interval", "unit"]
    if report.baseline is not None:
        columns[3:3] = ["baseline", "delta", "95% interval of delta", "change"]
    rows = [_row(score, len(columns)) for score in report.scores]
    show.table(title, columns, rows)
    if report.baseline is not None:
        worse = sum(row[-2] == "worse" for row in rows)
        show.text(f"{worse} of {len(rows)} scores are worse by more than their interval")
    for found in report.scores:
        if "reason" in found.detail:
            show.text(f"note: {found.name} {found.status}: {found.detail['reason']}")
        elif found.status == "estimated":
            show.text(f"note: {found.name} estimated: {found.detail.get('note', '')}")


def _row(score: "Score", columns: int) -> list[str | None]:
    from unicomp.evaluate.verdicts.change import change

    row = [score.name, _value(score, score.value), _interval(score, score.ci95), score.unit]
    if columns > len(row):
        delta = [_value(score, score.baseline), _value(score, score.delta)]
        row[3:3] = [*delta, _interval(score, score.delta_ci95), change(score)]
    return row


def _value(score: "Score", value: float | None) -> str | None:
    if value is None:
        return None
    if score.unit == "bytes":
        return size.show(value)
    return f"{value:.4g}"


def _interval(score: "Score", interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else " to ".join(f"{end:.4g}" for end in interval)

"""`unicomp compare`: reports side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicomp import size
from unicomp.cli import show
from unicomp.cli.options import Json, Quiet

if TYPE_CHECKING:
    from unicomp.evaluate.scores import Score
    from unicomp.evaluate.verdicts.compare import Comparison

ENDS = {"pass": 0, "fail": 3, "inconclusive": 4}  # outcome of the gates -> exit code

Reports = Annotated[
    list[Path],
    typer.Argument(
        metavar="REPORT...", help="Reports that `unicomp score --out` wrote.", show_default=False
    ),
]
GateFile = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="FILE",
        help="Bounds to hold every report against: a .yaml file, or `default`. Exits with 3 if "
        "one is broken, with 4 if the evidence is too little.",
        show_default=False,
    ),
]

Html = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Write a page there: one file that loads nothing else."
    ),
]


def compare(
    reports: Reports,
    gate: GateFile = None,
    html: Html = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put reports side by side: every score, and which model is best.

    A `*` marks the best value, `**` one whose 95% interval lies beyond all others'. With `--html`
    the front of size and quality is drawn.

    Example: unicomp compare a.json b.json
    """
    from unicomp.evaluate import scores
    from unicomp.evaluate.page import comparison, sheet
    from unicomp.evaluate.verdicts import compare as side_by_side
    from unicomp.evaluate.verdicts import gates
    from unicomp.recipes import gate_file

    bounds = [] if gate is None else gate_file.read(gate)
    if html is not None:
        scores.check_target(html)
    read = [scores.read(path) for path in reports]
    found = side_by_side.compare(read, bounds)
    if html is not None:
        sheet.write(html, comparison.render(found, read))
    if json:
        show.json(found.to_json())
    else:
        show_comparison(found)
    if bounds:
        every = [verdict for own in found.verdicts for verdict in own]
        if code := ENDS[gates.outcome(every)]:
            raise typer.Exit(code)


def show_comparison(found: "Comparison") -> None:
    """Write a comparison to stdout: a table of scores, the fronts, the verdicts and the notes."""
    rows = []
    for row in found.rows:
        cells = [_cell(score) for score in row.scores]
        for at in row.best:
            cells[at] = f"{cells[at]} {'**' if row.clear else '*'}"
        rows.append([row.name, *cells, row.unit, "higher" if row.higher_is_better else "lower"])
    show.table(None, ["score", *found.names, "unit", "better"], rows)
    for front in found.fronts:
        best = ", ".join(found.names[at] for at in front.on)
        show.text(f"front of {front.x} and {front.y}: {best}")
    for name, verdicts in zip(found.names, found.verdicts, strict=True):
        for verdict in verdicts:
            show.text(f"gate {name}: {verdict}")
    for note in found.notes:
        show.text(f"note: {note}")


def _cell(score: "Score | None") -> str:
    if score is None:
        return "-"
    if score.value is None:
        return score.status
    return size.show(score.value) if score.unit == "bytes" else f"{score.value:.4g}"

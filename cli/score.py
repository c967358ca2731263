"""`unicomp score`: measure a model, alone or beside a baseline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicomp import size
from unicomp.cli import show
from unicomp.cli.options import MODEL, TEXT, Json, Model, Quiet

if TYPE_CHECKING:
    from unicomp.evaluate.scores import Report, Score

Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="MODEL", help=f"What to compare with: {MODEL}."),
]
Axes = Annotated[
    str,
    typer.Option(
        "--axes",
        metavar="AXIS,...",
        help="Some of accuracy, fidelity (needs --baseline), efficiency.",
    ),
]
ScoredText = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="TEXT",
        help=f"What to predict: {TEXT}. Default: builtin:tinyworld for a builtin model.",
    ),
]
Field = Annotated[
    str, typer.Option("--field", metavar="NAME", help="Field of a record that holds the text.")
]
SeqLen = Annotated[
    int | None,
    typer.Option(
        "--seq-len",
        metavar="N",
        min=2,
        help="Tokens of a window. Default: the model's context, at most 2048.",
        show_default=False,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", metavar="N", min=1, help="At most N windows, drawn by --seed. Default: all."
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Which windows --limit draws.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="A BOS token before each window. Default: where the tokenizer puts one first.",
        show_default=False,
    ),
]
Compute = Annotated[
    str | None,
    typer.Option(
        "--compute",
        metavar="int8|exact",
        help="Leave the model's weights packed, and score what kernels compute. Default: "
        "dequantize them.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write the report there too, as JSON."),
]


def score(
    model: Model,
    baseline: Baseline = None,
    axes: Axes = "accuracy,fidelity,efficiency",
    text: ScoredText = None,
    field: Field = "text",
    seq_len: SeqLen = None,
    limit: Limit = None,
    seed: Seed = 0,
    bos: Bos = None,
    compute: Compute = None,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model: perplexity, bits per byte, closeness to a baseline, size.

    Example: unicomp score builtin:tinyworld-pirate --baseline builtin:tinyworld
    """
    from unicomp.evaluate import scores
    from unicomp.evaluate.score import score as measure
    from unicomp.recipes.run import Progress

    wanted = [axis for part in axes.split(",") if (axis := part.strip())]
    if out is not None:
        scores.check_target(out)
    with show.progress() as progress:
        report = measure(
            model,
            baseline,
            axes=wanted,
            text=text,
            field=field,
            seq_len=seq_len,
            limit=limit,
            seed=seed,
            bos=bos,
            compute=compute,  # type: ignore[arg-type]
            progress=lambda done, total: progress(Progress("score", done, total, "windows")),
        )
    if out is not None:
        scores.write(out, report)
    if json:
        show.json(report.to_json())
    else:
        show_report(report)


def show_report(report: "Report") -> None:
    """Write a report to stdout as one table, and a note for each score without a value."""
    title = report.model.id
    if report.baseline is not None:
        title += f" beside {report.baseline.id}"
    columns = ["score", "value", "95% interval", "unit"]
    if report.baseline is not None:
        columns[3:3] = ["baseline", "delta", "95% interval of delta"]
    show.table(title, columns, [_row(score, len(columns)) for score in report.scores])
    for found in report.scores:
        if "reason" in found.detail:
            show.text(f"note: {found.name} {found.status}: {found.detail['reason']}")
        elif found.status == "estimated":
            show.text(f"note: {found.name} estimated: {found.detail.get('note', '')}")


def _row(score: "Score", columns: int) -> list[str | None]:
    row = [score.name, _value(score, score.value), _interval(score, score.ci95), score.unit]
    if columns > len(row):
        delta = [_value(score, score.baseline), _value(score, score.delta)]
        row[3:3] = [*delta, _interval(score, score.delta_ci95)]
    return row


def _value(score: "Score", value: float | None) -> str | None:
    if value is None:
        return None
    if score.unit == "bytes":
        return size.show(value)
    return f"{value:.4g}"


def _interval(score: "Score", interval: tuple[float, float] | None) -> str | None:
    return None if interval is None else " to ".join(f"{end:.4g}" for end in interval)

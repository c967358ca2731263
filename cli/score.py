"""`unicomp score`: measure a model, alone or beside a baseline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unicomp import size
from unicomp.cli import show
from unicomp.cli.options import MODEL, TEXT, Json, Model, Quiet

if TYPE_CHECKING:
    from unicomp.evaluate.scores import Report, Score

ENDS = {"pass": 0, "fail": 3, "inconclusive": 4}  # outcome of the gates -> exit code

Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="MODEL", help=f"What to compare with: {MODEL}."),
]
Axes = Annotated[
    str | None,
    typer.Option(
        "--axes",
        metavar="AXIS,...",
        help="Some of accuracy, fidelity (needs --baseline), calibration (needs tasks), safety "
        "(needs --suite quick, or --harmful and --benign), efficiency. Default: all with --suite "
        "or --tasks, else those that need none.",
        show_default=False,
    ),
]
Suite = Annotated[
    str | None,
    typer.Option(
        "--suite",
        metavar="quick|standard|full",
        help="Tasks to run: quick needs no network and takes minutes.",
        show_default=False,
    ),
]
Tasks = Annotated[
    str,
    typer.Option(
        "--tasks",
        metavar="T,...",
        help="More tasks: names of ours or of lm-eval's, or files: a task's .yaml, or .jsonl or "
        ".txt rows.",
        show_default=False,
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
        "--limit",
        metavar="N",
        min=1,
        help="At most N windows, drawn by --seed, and the first N documents of a task. "
        "Default: all.",
        show_default=False,
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
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        metavar="N",
        min=1,
        help="Requests of a task at once. Default: what fits 256 MiB of logits, at most 64.",
        show_default=False,
    ),
]
Shots = Annotated[
    int | None,
    typer.Option(
        "--shots",
        metavar="N",
        min=0,
        help="Examples in front of a task's question. Default: as the task has it.",
        show_default=False,
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put tasks' prompts into the model's chat template.")
]
Harmful = Annotated[
    str | None,
    typer.Option(
        "--harmful",
        metavar="FILE",
        help="Prompts to refuse, one a line (.txt) or a row (.jsonl). Default: the suite's.",
        show_default=False,
    ),
]
Benign = Annotated[
    str | None,
    typer.Option(
        "--benign",
        metavar="FILE",
        help="Safe prompts that look like those, to help with. Default: the suite's.",
        show_default=False,
    ),
]
Power = Annotated[
    float | None,
    typer.Option(
        "--power",
        metavar="W",
        min=0,
        help="Watts that the machine takes while a model decodes: an estimate of its energy where "
        "no meter can be read.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume/--fresh", help="Go on with the tasks of an interrupted score."),
]
Gate = Annotated[
    str | None,
    typer.Option(
        "--gate",
        metavar="FILE",
        help="Bounds to hold the scores against: a .yaml file, or `default`. Exits with 3 if one "
        "is broken, with 4 if the evidence is too little.",
        show_default=False,
    ),
]
Junit = Annotated[
    Path | None,
    typer.Option(
        "--junit", metavar="FILE", help="Write the gates' verdicts there, as JUnit XML for CI."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write the report there too, as JSON."),
]


def score(
    model: Model,
    baseline: Baseline = None,
    axes: Axes = None,
    suite: Suite = None,
    tasks: Tasks = "",
    text: ScoredText = None,
    field: Field = "text",
    seq_len: SeqLen = None,
    limit: Limit = None,
    seed: Seed = 0,
    bos: Bos = None,
    compute: Compute = None,
    batch_size: BatchSize = None,
    shots: Shots = None,
    chat: Chat = False,
    harmful: Harmful = None,
    benign: Benign = None,
    power: Power = None,
    resume: Resume = True,
    gate: Gate = None,
    junit: Junit = None,
    out: Out = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure a model: what it predicts and answers, how close it stays to a baseline, its size.

    Example: unicomp score builtin:tinyworld-pirate --baseline builtin:tinyworld --suite quick
    """
    from unicomp.evaluate import scores
    from unicomp.evaluate.score import score as measure
    from unicomp.evaluate.verdicts import gates
    from unicomp.evaluate.verdicts import junit as verdict_file
    from unicomp.recipes import gate_file
    from unicomp.recipes.run import Progress

    bounds = [] if gate is None else gate_file.read(gate)
    for file in (out, junit):
        if file is not None:
            scores.check_target(file)
    with show.progress() as progress:
        report = measure(
            model,
            baseline,
            axes=None if axes is None else _words(axes),
            suite=suite,
            tasks=_words(tasks),
            text=text,
            field=field,
            seq_len=seq_len,
            limit=limit,
            seed=seed,
            bos=bos,
            compute=compute,  # type: ignore[arg-type]
            batch_size=batch_size,
            shots=shots,
            chat=chat,
            harmful=harmful,
            benign=benign,
            power=power,
            resume=resume,
            progress=lambda what, done, total: progress(Progress("score", done, total, what)),
        )
    verdicts = gates.decide(report, bounds)
    report = report.model_copy(update={"gates": [verdict.to_json() for verdict in verdicts]})
    if out is not None:
        scores.write(out, report)
    if junit is not None:
        verdict_file.write(junit, report.model.id, verdicts)
    if json:
        show.json(report.to_json())
    else:
        show_report(report)
        for verdict in verdicts:
            show.text(f"gate {verdict}")
    if code := ENDS[gates.outcome(verdicts)]:
        raise typer.Exit(code)


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


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

"""The options of `unicomp score`, in groups: what is measured, how, and what becomes of it.

A group is a dataclass whose fields are options; `grouped` lets a command take groups as parameters.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from unicomp.cli.options import MODEL, TEXT


def _option(name: str, metavar: str, said: str, *, least: float | None = None) -> Any:
    """Return an option whose help says what its default means, so that typer need not."""
    return typer.Option(name, metavar=metavar, help=said, min=least, show_default=False)


Baseline = Annotated[
    str | None,
    typer.Option("--baseline", metavar="MODEL", help=f"What to compare with: {MODEL}."),
]
Axes = Annotated[
    str | None,
    _option(
        "--axes",
        "AXIS,...",
        "Some of accuracy, fidelity (needs --baseline), calibration (needs tasks), safety "
        "(needs --suite quick, or --harmful and --benign), efficiency. Default: all with --suite "
        "or --tasks, else those that need none.",
    ),
]
Suite = Annotated[
    str | None,
    _option(
        "--suite",
        "quick|standard|full",
        "Tasks to run: quick needs no network and takes minutes.",
    ),
]
Tasks = Annotated[
    str,
    _option(
        "--tasks",
        "T,...",
        "More tasks: names of ours or of lm-eval's, or files: a task's .yaml, or .jsonl or "
        ".txt rows.",
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
    _option(
        "--seq-len",
        "N",
        "Tokens of a window. Default: the model's context, at most 2048.",
        least=2,
    ),
]
Limit = Annotated[
    int | None,
    _option(
        "--limit",
        "N",
        "At most N windows, drawn by --seed, and the first N documents of a task. Default: all.",
        least=1,
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
    _option(
        "--compute",
        "int8|exact",
        "Leave the model's weights packed, and score what kernels compute. Default: "
        "dequantize them.",
    ),
]
BatchSize = Annotated[
    int | None,
    _option(
        "--batch-size",
        "N",
        "Requests of a task at once. Default: what fits 256 MiB of logits, at most 64.",
        least=1,
    ),
]
Shots = Annotated[
    int | None,
    _option(
        "--shots",
        "N",
        "Examples in front of a task's question. Default: as the task has it.",
        least=0,
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Put tasks' prompts into the model's chat template.")
]
Harmful = Annotated[
    str | None,
    _option(
        "--harmful",
        "FILE",
        "Prompts to refuse, one a line (.txt) or a row (.jsonl). Default: the suite's.",
    ),
]
Benign = Annotated[
    str | None,
    _option(
        "--benign",
        "FILE",
        "Safe prompts that look like those, to help with. Default: the suite's.",
    ),
]
Judge = Annotated[
    str | None,
    _option(
        "--judge",
        "MODEL",
        "A model that tells refusals, in place of the rules; it runs here, and how far both "
        f"agree is reported: {MODEL}.",
    ),
]
By = Annotated[
    str,
    _option(
        "--by",
        "position,layer",
        "Say at which positions and layers the model departs from the baseline. Default: "
        "both with --html, else neither.",
    ),
]
Power = Annotated[
    float | None,
    _option(
        "--power",
        "W",
        "Watts that the machine takes while a model decodes: an estimate of its energy where "
        "no meter can be read.",
        least=0,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume/--fresh", help="Go on with the tasks of an interrupted score."),
]
Gate = Annotated[
    str | None,
    _option(
        "--gate",
        "FILE",
        "Bounds to hold the scores against: a .yaml file, or `default`. Exits with 3 if one "
        "is broken, with 4 if the evidence is too little.",
    ),
]
Junit = Annotated[
    Path | None,
    typer.Option(
        "--junit", metavar="FILE", help="Write the gates' verdicts there, as JUnit XML for CI."
    ),
]
Html = Annotated[
    Path | None,
    typer.Option(
        "--html", metavar="FILE", help="Write a page there: one file that loads nothing else."
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="Write the report there too, as JSON."),
]


@dataclass(frozen=True, slots=True)
class What:
    """What is measured."""

    axes: Axes = None
    suite: Suite = None
    tasks: Tasks = ""
    text: ScoredText = None
    field: Field = "text"
    seq_len: SeqLen = None
    limit: Limit = None
    seed: Seed = 0
    bos: Bos = None
    harmful: Harmful = None
    benign: Benign = None
    judge: Judge = None
    by: By = ""


@dataclass(frozen=True, slots=True)
class How:
    """How it is measured."""

    compute: Compute = None
    batch_size: BatchSize = None
    shots: Shots = None
    chat: Chat = False
    power: Power = None
    resume: Resume = True


@dataclass(frozen=True, slots=True)
class Result:
    """What becomes of it."""

    gate: Gate = None
    junit: Junit = None
    html: Html = None
    out: Out = None

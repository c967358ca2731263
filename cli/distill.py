"""`unicomp distill`: one stage of a recipe, from the command line alone."""

from typing import Annotated, Any

import typer

from unicomp.cli import method_options, stage
from unicomp.cli.groups import grouped
from unicomp.cli.options import TEXT, Model
from unicomp.cli.work import Work

VERB = "distill"

Method = Annotated[
    str,
    stage.method(VERB, "What the student learns from. Default: logits."),
]
Teacher = Annotated[
    str,
    typer.Option(
        "--teacher", metavar="MODEL", help="The model to learn from, with the same tokenizer."
    ),
]
Data = Annotated[
    str,
    typer.Option("--data", metavar="TEXT", help=f"The text to train on: {TEXT}."),
]
OWN = ("teacher", "data")


@grouped
@method_options.accept([one for one in method_options.of_verb(VERB) if one.name not in OWN])
def distill(
    model: Model,
    teacher: Teacher,
    data: Data,
    work: Work,
    method: Method = "logits",
    **words: Any,
) -> None:
    """Train a pruned or quantized model to answer as its teacher does.

    What is packed stays packed, and what is zero stays zero. Every option is the key of the same
    name in a recipe. Example: unicomp distill out/quickstart --teacher builtin:tinyworld
    --data builtin:tinyworld --max-steps 20 --out out/distilled
    """
    stage.run_stage(
        VERB,
        method,
        words | {"teacher": teacher, "data": data},
        work,
        model=model,
        calibrated=False,
    )

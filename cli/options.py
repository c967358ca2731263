"""The options that several commands share, each spelt and explained once.

`Json` and `Quiet` are on every command. `Quiet` acts when it is parsed; a command takes its value
and may ignore it.
"""

import os
from pathlib import Path
from typing import Annotated

import typer

from unicomp import size
from unicomp.cli import show


def parse_size(text: str) -> int:
    """Return the bytes that a SIZE on the command line means; a wrong one is a usage error."""
    try:
        return size.parse(text)
    except ValueError as problem:
        raise typer.BadParameter(str(problem)) from None


def _quiet(value: bool) -> bool:
    show.quiet(value)
    if value:  # huggingface_hub reads this when it is first imported, which is later
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    return value


MODEL = "a folder, a `.gguf` file, a Hub id `org/name[@revision]`, or `builtin:tinyworld`"
TEXT = "a .txt, .jsonl or .parquet file, `builtin:tinyworld`, or `hub:org/name[:config][/split]`"

Json = Annotated[
    bool, typer.Option("--json", help="Print exactly one JSON object, with a `schema` key.")
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="No talk on stderr but errors.", callback=_quiet)
]
Model = Annotated[str, typer.Argument(metavar="MODEL", help=f"The checkpoint: {MODEL}.")]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A shipped name (`unicomp recipes list`) or the path of a YAML file."
    ),
]
RecipeModel = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help=f"In place of the recipe's model: {MODEL}."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the recipe, as `stages.0.bits=3`; stages count from 0. Repeatable.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The folder to make; the work happens in DIR.partial. Needed unless `--dry-run`.",
    ),
]
MaxMemory = Annotated[
    int | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        parser=parse_size,
        help="Most host memory to use, as `8GB`, `512MiB` or `1.5e9`; obeyed, or declined before "
        "any work. Default: what the machine has.",
    ),
]
Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="LOADER,...",
        help="Loaders that are to take the output, as `transformers>=5,vllm==0.33,llama.cpp`: what "
        "they would not take is listed. Repeatable.",
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tp", min=1, metavar="N", help="Processes that a loader cuts each linear into, for vLLM."
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="cpu", show_default=False, help="Where to compute. Default: cpu."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume/--fresh",
        show_default=False,
        help="Go on from an interrupted run, or throw its work away. Default: resume.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace DIR if it exists. Default: refuse.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only show what would happen, as `plan` does.")
]

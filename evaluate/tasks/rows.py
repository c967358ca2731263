"""Rows of local files as the dataset of an lm-eval task, with no network.

A task file names `custom_dataset: !function unicomp.evaluate.tasks.rows.load` and, in its
`dataset_kwargs`, a `file`:

    builtin:NAME       a held-out set of the embedded world (`unicomp.builtin.HELDOUT`)
    benchmarks:PATH    below the folder that `UNICOMP_BENCHMARKS` names
    any other          a path; a relative one starts at the working directory

`.jsonl` has one object a line; `.txt` has documents separated by empty lines, each one row with a
`text`. The same files serve `unicomp score` and `lm_eval` run by hand.
"""

import json
import os
from pathlib import Path
from typing import Any

from datasets import Dataset

from unicomp import builtin
from unicomp.errors import UnicompError

VARIABLE = "UNICOMP_BENCHMARKS"


def load(*, file: str, **_: Any) -> dict[str, Dataset]:
    """Return the rows of a file as the split `test`, as lm-eval's `custom_dataset` wants them.

    file  as the module says; whatever else lm-eval hands over (metadata, model arguments) is not
          looked at

    Raises UnicompError for a file that cannot be read, naming the line.
    """
    return {"test": Dataset.from_list(read(find(file)))}


def find(file: str) -> Path:
    """Return the path that a task's `file` stands for.

    Raises UnicompError where it names the benchmarks' folder and there is none.
    """
    kind, _, rest = file.partition(":")
    if kind == "builtin":
        return builtin.heldout(rest)
    if kind != "benchmarks":
        return Path(file)
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise UnicompError(
            f"`{rest}` is a benchmark's own file, and nothing says where those are",
            hint=f"put the files of evaluate/tasks/local in a folder and set `{VARIABLE}` to it",
        )
    return Path(folder, rest)


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a `.jsonl` or `.txt` file, at least one.

    Raises UnicompError if there is none, or the file is not what its name says.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnicompError(
            f"cannot read `{path}`: {error.strerror if isinstance(error, OSError) else error}",
            hint="give a `.jsonl` or `.txt` file in UTF-8",
        ) from error
    rows = _lines(path, text) if path.suffix == ".jsonl" else _documents(path, text)
    if not rows:
        raise UnicompError(f"`{path}` is empty", hint="give a file with at least one row")
    return rows


def _documents(path: Path, text: str) -> list[dict[str, Any]]:
    if path.suffix != ".txt":
        raise UnicompError(
            f"`{path}`: rows are read from `.jsonl` and `.txt`, not `{path.suffix}`",
            hint="write one JSON object a line, in a file that ends in `.jsonl`",
        )
    return [{"text": part.strip("\n")} for part in text.split("\n\n") if part.strip()]


def _lines(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UnicompError(
                f"`{path}:{number}` is not JSON: {error}", hint="write one JSON object a line"
            ) from error
        if not isinstance(row, dict):
            raise UnicompError(
                f"`{path}:{number}` is not an object", hint='write a line as {"field": value, ...}'
            )
        rows.append(row)
    return rows

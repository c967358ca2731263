"""Prompts to ask, from a file of one's own or of the embedded world.

`.jsonl` rows have a `prompt`; a `.txt` file has one prompt a line.
"""

import json
from pathlib import Path

from unicomp import builtin
from unicomp.errors import UnicompError


def read(word: str, *, limit: int | None = None) -> list[str]:
    """Return the prompts of a file, or of `builtin:NAME`, the first `limit` of them.

    Raises UnicompError, with the line, for a file that cannot be read or has none, or an empty one.
    """
    kind, _, name = word.partition(":")
    path = builtin.heldout(name) if kind == "builtin" else Path(word)
    if path.suffix not in (".jsonl", ".txt"):
        raise UnicompError(
            f"prompts are read from `.jsonl` and `.txt`, not `{path}`",
            hint="write one prompt a line, in a file that ends in `.txt`",
        )
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UnicompError(
            f"cannot read `{path}`: {error.strerror if isinstance(error, OSError) else error}",
            hint="give a `.txt` or `.jsonl` file in UTF-8",
        ) from error
    found = [
        _prompt(f"{path}:{number}", line, path.suffix == ".jsonl")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise UnicompError(f"`{path}` has no prompts", hint="write one prompt a line")
    return found[:limit]


def _prompt(place: str, line: str, json_: bool) -> str:
    if not json_:
        return line.strip()
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UnicompError(
            f"`{place}` is not JSON: {error}", hint="write one JSON object a line"
        ) from error
    prompt = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UnicompError(f"`{place}` has no `prompt`", hint='write a line as {"prompt": "..."}')
    return prompt

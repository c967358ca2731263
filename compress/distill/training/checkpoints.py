"""Checkpoints of a training: everything that decides its next step, in one file each.

Weights, optimizer, schedule, the state of the random numbers and how far the data is: a run that is
killed at any moment and started again makes the same weights, bit for bit. A file appears under its
name only when it is whole, and the one before it stays, so that there is a good one at any time.
"""

import os
import re
from pathlib import Path
from typing import Any

import torch

from unicomp.errors import CheckpointError

FILE = re.compile(r"step-(\d+)\.pt")
FOLDER = "checkpoints"  # inside the folder of a training
KEPT = 2


def save(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of a step, on the disk when this returns; drop all but the last two."""
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step}.pt"
    fresh = path.with_suffix(".new")
    with fresh.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
    for old in _found(folder)[:-KEPT]:
        old.unlink()


def latest(folder: Path) -> dict[str, Any] | None:
    """Return the state of the last checkpoint; None where there is none.

    Raises CheckpointError for a file that does not load.
    """
    found = _found(folder)
    if not found:
        return None
    try:
        state: dict[str, Any] = torch.load(found[-1], map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"`{found[-1]}` cannot be read: {error}", hint="start over with `--fresh`"
        ) from error
    return state


def kept(folder: Path) -> bool:
    """Tell whether the training of a folder has anything to go on from."""
    return bool(_found(folder / FOLDER))


def _found(folder: Path) -> list[Path]:
    """Return the checkpoint files, oldest first."""
    steps = {int(m[1]): path for path in folder.glob("*.pt") if (m := FILE.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]

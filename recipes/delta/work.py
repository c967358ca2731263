"""What every part of a delta's compression is given: what is known so far, and what was added."""

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from unicomp import machine
from unicomp.checkpoint import check_finite
from unicomp.compress.method import DeltaMethod
from unicomp.kernels.delta_folder import Stored, Trained
from unicomp.manifest import Calibration
from unicomp.recipes.delta.plan import DeltaPlan
from unicomp.recipes.stage.journal import Journal
from unicomp.recipes.stage.progress import Show

ROWS = 256  # that the base is taken off at once


@dataclass(slots=True)
class Work:
    """What a compression gathers on its way.

    tensors  name -> its fate, with bytes and error as they become known
    hashes   stored name -> sha256
    sums     name -> squares of its delta, and of what is missed
    """

    plan: DeltaPlan
    folder: Path
    journal: Journal
    show: Show
    source: dict[str, str]
    windows: Tensor | None
    calibration: Calibration | None
    tensors: dict[str, Stored]
    base: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    trained: Trained | None = None

    def done(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the journal's entries of a kind by what they are about."""
        return {entry[kind]: entry for entry in self.journal.entries if kind in entry}


def seed_of(method: DeltaMethod, name: str) -> int:
    """Return the seed of one tensor: its own, whatever was done before it."""
    return zlib.crc32(f"{method.seed}/{name}".encode())


def delta_of(plan: DeltaPlan, own: Stored, name: str, index: int) -> Tensor:
    """Return float32 [out, in]: what the fine-tune added to a matrix, of experts to one."""
    common = own.common
    part = slice(0, common[0]) if len(common) == 2 else slice(index, index + 1)
    delta = plan.tuned.read(name, part).float()
    check_finite(name, delta)
    base = plan.base.read(name, part)
    # By rows: torch would first make float32 of the whole base (2.13).
    for mine, theirs in zip(delta.split(ROWS, -2), base.split(ROWS, -2), strict=True):
        mine -= theirs
    del base, theirs
    check_finite(name, delta)
    machine.return_freed_memory()  # of what was read, and of the matrix before
    return delta.reshape(common[-2:])

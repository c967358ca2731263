"""What a stage says of itself while it runs, for whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of a run, for whoever shows it.

    stage         what is going on: prepare, copy, layers, finish, score
    done, total   units of the stage: layers, or 0 where there is none
    detail        module, file or layer
    error         the module's relative output error, where one was solved
    note          something the user must know, said once
    """

    stage: str
    done: int
    total: int
    detail: str
    error: float | None = None
    tokens_per_s: float | None = None
    seconds_left: float | None = None
    note: str | None = None


Show = Callable[[Progress], None]

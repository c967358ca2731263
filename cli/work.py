"""How a command that makes a folder works: the options of any run, and how one ends early.

A command takes one parameter, `work: Work`, and `@grouped` makes the options of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import typer

from unicomp.cli import show
from unicomp.cli.groups import LAST
from unicomp.cli.options import (
    Device,
    DryRun,
    Json,
    MaxMemory,
    Out,
    Overwrite,
    Quiet,
    Resume,
)
from unicomp.errors import UnsupportedError

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Work:
    """What the user says of a run, whatever is run; each field is an option."""

    out: Out = None
    max_memory: MaxMemory = field(default=None, metadata=LAST)
    device: Device = field(default="cpu", metadata=LAST)
    resume: Resume = field(default=True, metadata=LAST)
    overwrite: Overwrite = field(default=False, metadata=LAST)
    dry_run: DryRun = field(default=False, metadata=LAST)
    json: Json = field(default=False, metadata=LAST)
    quiet: Quiet = field(default=False, metadata=LAST)

    @property
    def folder(self) -> Path | None:
        """The folder to make; None: only the plan is shown."""
        return None if self.dry_run else self.out

    def check(self) -> None:
        """Refuse, before anything is imported, a command line that cannot be carried out."""
        if self.out is None and not self.dry_run:
            raise typer.BadParameter("missing; give DIR, or `--dry-run`", param_hint="'--out'")
        if self.device != "cpu":
            raise UnsupportedError(
                f"cannot compute on device `{self.device}`", hint="use `--device cpu`"
            )


@contextmanager
def resumable(out: Path) -> Iterator[Callable[..., None]]:
    """Show how a run goes; one that the user interrupts ends with 130, and how to go on is said."""
    try:
        with show.progress() as progress:
            yield progress
    except KeyboardInterrupt:
        show.error(
            "interrupted",
            hint=f"the same command resumes from `{out}.partial`; `--fresh` starts over",
        )
        raise typer.Exit(INTERRUPTED) from None

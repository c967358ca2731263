"""How a command that makes a folder works: the options of any run, and how one ends early.

A command takes one parameter, `work: Work`, and `@takes_work` makes the options of it.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import typer

from unicomp.cli import show
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

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Work:
    """What the user says of a run, whatever is run; each field is an option."""

    out: Out = None
    max_memory: MaxMemory = None
    device: Device = "cpu"
    resume: Resume = True
    overwrite: Overwrite = False
    dry_run: DryRun = False
    json: Json = False
    quiet: Quiet = False

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


def takes_work(function: Function) -> Function:
    """Give a command the options of `Work` in place of its `work`: `--out` there, the rest last."""
    hints = dict(function.__annotations__)
    del hints["work"]
    parameters = list(inspect.signature(function).parameters.values())
    place = next(i for i, one in enumerate(parameters) if one.name == "work")
    added = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=one.default,
            annotation=one.type,
        )
        for one in fields(Work)
    ]
    parameters[place : place + 1] = added[:1]
    parameters += added[1:]

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        work = Work(**{one.name: given.pop(one.name) for one in fields(Work)})
        return function(**given, work=work)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = hints | {one.name: one.annotation for one in added}
    return command  # type: ignore[return-value]


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

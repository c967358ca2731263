"""The command line: every command, and the one place where failures become words and exit codes.

    0    done
    1    the user can mend it: `error:` and `hint:` lines
    2    usage; typer says it
    70   a bug of ours: the last frames, and how to report it
    130  interrupted
    141  nobody reads our output any more

Commands import the library inside their functions: help and completion work without torch.
"""

import atexit
import errno
import gc
import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from unicomp import __version__, machine, processes
from unicomp.cli import bench, delta, recipes, show
from unicomp.cli.compare import compare
from unicomp.cli.distill import distill
from unicomp.cli.env import env
from unicomp.cli.export import export
from unicomp.cli.generate import generate
from unicomp.cli.inspect_checkpoint import inspect_checkpoint
from unicomp.cli.plan import plan
from unicomp.cli.prune import prune
from unicomp.cli.push import push
from unicomp.cli.quantize import quantize
from unicomp.cli.run import run
from unicomp.cli.score import score
from unicomp.cli.verify import verify
from unicomp.errors import UnicompError

USER, BUG, INTERRUPTED = 1, 70, 130

# What an operating system refuses to anybody; any other OSError is a surprise, so a bug.
REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE)

app = typer.Typer(
    name="unicomp",
    help="Compress Hugging Face checkpoints, and prove what was lost.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


app.command("run")(run)
app.command("quantize")(quantize)
app.command("prune")(prune)
app.command("distill")(distill)
app.command("plan")(plan)
app.command("export")(export)
app.command("inspect")(inspect_checkpoint)
app.command("verify")(verify)
app.command("score")(score)
app.command("compare")(compare)
app.command("generate")(generate)
app.command("push")(push)
app.add_typer(delta.app, name="delta")
app.add_typer(bench.app, name="bench")
app.add_typer(recipes.app, name="recipes")
app.command("env")(env)


def _end_with_examples(group: typer.Typer) -> None:
    """Put what each docstring says after `Example:` at the end of its help, as one line."""
    for command in group.registered_commands:
        about, _, example = (command.callback.__doc__ or "").partition("Example:")
        if example:
            command.help = about.strip()
            command.epilog = f"\b\nExample: {' '.join(example.split())}"
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            _end_with_examples(inner.typer_instance)


_end_with_examples(app)


def _version(value: bool) -> None:
    if value:
        show.text(f"unicomp {__version__}")
        raise typer.Exit


@app.callback()
def _unicomp(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def exit_code(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing but SystemExit's code leaves it.

    arguments  without the program's name; None: those of the process
    """
    show.quiet(False)
    try:
        app(args=arguments, prog_name="unicomp")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except UnicompError as failure:
        for message, hint in failure.problems() if processes.first() else ():
            show.error(message, hint=hint)
        return USER
    except KeyboardInterrupt:
        return INTERRUPTED
    except MemoryError:
        show.error("out of memory", hint="give `--max-memory`, or use a machine with more")
        return USER
    except Exception as failure:
        if isinstance(failure, OSError) and failure.errno in REFUSALS:
            where = f"`{failure.filename}`: " if failure.filename else ""
            reason = (failure.strerror or str(failure)).lower()
            show.error(f"{where}{reason}", hint="check the disk and the permissions")
            return USER
        show.bug(failure)
        return BUG
    return 0


def main() -> NoReturn:
    """Run the command of this process and end it with the command's exit code.

    The libraries make a million objects that live as long as the process: looking for garbage among
    them as often as Python does, and taking them down one by one at the end, takes seconds.
    """
    gc.set_threshold(100_000, 50, 100)
    machine.keep_freed_memory()
    code = exit_code()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or show.CLOSED_PIPE
    os._exit(code)

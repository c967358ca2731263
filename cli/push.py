"""`unicomp push`: a finished folder to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from unicomp import size
from unicomp.cli import show
from unicomp.cli.options import Json, Quiet

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that unicomp made.")]
Repository = Annotated[str, typer.Argument(metavar="REPO_ID", help="`org/name` on the Hub.")]
Private = Annotated[
    bool, typer.Option("--private", help="Make the repository private, if it is made now.")
]
Revision = Annotated[
    str | None,
    typer.Option("--revision", metavar="R", help="The branch to commit to. Default: main."),
]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check and list, send nothing.")]
Allow = Annotated[
    bool,
    typer.Option("--allow-failed-gates", help="Send it although gates failed or were not decided."),
]


def push(
    folder: Folder,
    repository: Repository,
    private: Private = False,
    revision: Revision = None,
    create_pr: CreatePr = False,
    dry_run: DryRun = False,
    allow_failed_gates: Allow = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send a folder that a run made to the Hub.

    A folder that `verify` rejects or whose gates are not passed is refused. The token comes from
    `hf auth login` or HF_TOKEN. The same command goes on where an interrupted one stopped.

    Example: unicomp push out/quickstart org/name --dry-run
    """
    from unicomp.recipes.publish.push import push as carry_out

    done = carry_out(
        folder,
        repository,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        allow_failed_gates=allow_failed_gates,
    )
    if json:
        show.json(done.to_json())
        return
    rows = [(name, size.show(nbytes)) for name, nbytes in done.files.items()]
    show.table(f"{folder.name} to {repository}", ("file", "bytes"), rows)
    show.text("")
    for gate in done.failed:
        show.text(f"note: a gate is not passed: {gate}")
    total = size.show(sum(done.files.values()))
    show.text(f"would send {total}" if done.url is None else f"sent {total}: {done.url}")

"""`unicomp verify`: that a checkpoint is whole, and equal to its manifest."""

import typer

from unicomp.cli import show
from unicomp.cli.options import Json, Model, Quiet


def verify(model: Model, json: Json = False, quiet: Quiet = False) -> None:
    """Check that a checkpoint is whole, free of NaN and infinite values, and as its manifest says.

    Every file is hashed and every tensor read. All problems are listed, and the exit code is 1. A
    folder that `delta compress` made is checked likewise.

    Example: unicomp verify builtin:tinyworld
    """
    from unicomp import manifest
    from unicomp.hub import resolve
    from unicomp.kernels import delta_folder

    source = resolve(model)
    compared = (source.folder / manifest.NAME).is_file()
    delta = delta_folder.is_delta(source.folder)
    problems = (delta_folder if delta else manifest).verify(source.folder)
    if json:
        show.json(
            {
                "schema": "unicomp.verify/1",
                "id": source.id,
                "revision": source.revision,
                "manifest": compared,
                "problems": problems,
            }
        )
    for problem in problems:
        show.error(problem)
    if problems:
        show.hint("fetch the checkpoint again, or make it again from its `recipe.yaml`")
        raise typer.Exit(1)
    if not json:
        against = (
            f"every file is as `{manifest.NAME}` says"
            if compared
            else f"there is no `{manifest.NAME}` to compare it with"
        )
        show.text(f"{source.id}: whole, all values finite; {against}")

"""`unicomp verify`: that a checkpoint is whole, and equal to its manifest."""

import typer

from unicomp.cli import lint, show
from unicomp.cli.options import Json, Model, Quiet, Target, TensorParallel


def verify(
    model: Model,
    target: Target = None,
    tp: TensorParallel = 1,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check that a checkpoint is whole and as its manifest says.

    Every file is hashed, every tensor read and searched for NaN and infinite values. All problems
    are listed, and the exit code is 1. A folder that `delta compress` made is checked likewise.
    What a loader of `--target` would not take counts as a problem.

    Example: unicomp verify builtin:tinyworld
    """
    from unicomp import manifest
    from unicomp.hub import resolve
    from unicomp.kernels import delta_folder

    lint.check_targets(target or [])
    source = resolve(model)
    compared = (source.folder / manifest.NAME).is_file()
    delta = delta_folder.is_delta(source.folder)
    if delta:
        lint.refuse_delta(target)
    problems = (delta_folder if delta else manifest).verify(source.folder)
    asked = lint.of_source(source, target, tp) if target and not problems else None
    if json:
        said = {
            "schema": "unicomp.verify/1",
            "id": source.id,
            "revision": source.revision,
            "manifest": compared,
            "problems": problems,
        }
        show.json(said | (asked.to_json() if asked else {}))
    for problem in problems:
        show.error(problem)
    for finding in asked.findings if asked else ():
        show.error(finding.words())
    if asked and asked.findings:
        raise typer.Exit(1)
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
    if asked and not json:
        asked.show()

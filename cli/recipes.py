"""`unicomp recipes`: the shipped recipes, and whether a recipe of one's own is sound."""

from pathlib import Path
from typing import Annotated

import typer

from unicomp.cli import show
from unicomp.cli.options import Json, Quiet

app = typer.Typer(no_args_is_help=True, help="The shipped recipes: list, show, copy, check.")

Name = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A shipped name (`recipes list`) or a path.")
]


@app.command("list")
def list_(json: Json = False, quiet: Quiet = False) -> None:
    """List the recipes that come with unicomp.

    Example: unicomp recipes list
    """
    from unicomp.recipes.load import comment, find, read_text, shipped

    rows = [(name, comment(read_text(find(name)))[0]) for name in shipped()]
    if json:
        found = [{"name": name, "about": about} for name, about in rows]
        show.json({"schema": "unicomp.recipes/1", "recipes": found})
    else:
        show.table(None, ["recipe", "about"], rows)


@app.command("show")
def show_(recipe: Name, json: Json = False, quiet: Quiet = False) -> None:
    """Print a recipe as it is written; with --json, every default too.

    Example: unicomp recipes show w4-gptq
    """
    from unicomp.recipes.load import find, load, read_text

    path = find(recipe)
    text = read_text(path)
    if json:
        data = load(text, file=str(path)).to_dict()
        show.json({"schema": "unicomp.recipe/1", "name": path.stem, "text": text, "recipe": data})
    else:
        show.text(text, end="")


@app.command("cp")
def cp(
    recipe: Name,
    to: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="File or folder. Default: this folder, under the same name.",
        ),
    ] = Path(),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FILE if it exists. Default: refuse.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy a recipe to a file of your own, to change.

    Example: unicomp recipes cp w4-gptq mine.yaml
    """
    from unicomp.recipes.load import copy, find

    written = copy(find(recipe), to, overwrite=overwrite)
    if json:
        show.json({"schema": "unicomp.recipes.cp/1", "path": str(written)})
    else:
        show.text(str(written))


@app.command("check")
def check(
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Shipped names or paths.")
    ],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Check recipes and say everything that is wrong with them, with line and column.

    Example: unicomp recipes check quickstart w4-gptq
    """
    from unicomp.errors import RecipeError
    from unicomp.recipes.load import problems

    found = {recipe: problems(recipe) for recipe in recipes}
    wrong = [problem for several in found.values() for problem in several]
    if json:
        files = [
            {
                "recipe": recipe,
                "ok": not several,
                "problems": [{"message": message, "hint": hint} for message, hint in several],
            }
            for recipe, several in found.items()
        ]
        show.json({"schema": "unicomp.recipes.check/1", "ok": not wrong, "recipes": files})
        if wrong:
            raise typer.Exit(1)
        return
    for recipe, several in found.items():
        if not several:
            show.text(f"{recipe}: ok")
    if wrong:
        raise RecipeError(wrong)


@app.command("schema")
def schema(json: Json = False, quiet: Quiet = False) -> None:
    """Print the JSON Schema of recipes, for editors; with --json, inside an object of ours.

    Example: unicomp recipes schema > recipe.schema.json
    """
    from json import dumps

    from unicomp.recipes.json_schema import json_schema

    found = json_schema()
    if json:
        show.json({"schema": "unicomp.recipes.schema/1", "json_schema": found})
    else:
        show.text(dumps(found, indent=2, ensure_ascii=False))

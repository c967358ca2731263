"""YAML text, `--set` and command-line options become a `Recipe` through one validator.

Errors come all at once. Those of a file start with `file:line:col`, those of `--set` quote it, and
those of a command's options name the flag. Importing this module does not import torch: recipes are
listed, shown and copied without it.
"""

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path as File
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from unicomp.errors import RecipeError
from unicomp.recipes.shelf import Shelf
from unicomp.recipes.tree import Path, Place, Problem, Tree, parse, shorten, shown

if TYPE_CHECKING:
    from unicomp.recipes.schema import Recipe

FOLDER = File(__file__).parent
SHELF = Shelf(FOLDER, "recipe")
WORD = re.compile(r'"([^"]+)"|([^".=]+)')
OVERRIDE = re.compile(
    rf"(?P<key>(?:{WORD.pattern})(?:\.(?:{WORD.pattern}))*)=(?P<value>.*)", re.DOTALL
)
FLAGS = {"data": "--calibration"}


def shipped() -> list[str]:
    """Return the names of the recipes that come with unicomp, sorted."""
    return SHELF.names()


def find(name: str | File) -> File:
    """Return the file of a recipe: a shipped name, or a path (anything with `/` or `.yaml`)."""
    return SHELF.find(name)


def read_text(path: File) -> str:
    """Return the text of a file; RecipeError if it is absent, too large or not UTF-8."""
    return SHELF.read_text(path)


def load(text: str, *, file: str, overrides: Sequence[str] = ()) -> "Recipe":
    """Return the recipe that YAML text stands for.

    file       what errors call the text
    overrides  texts such as `stages.1.bits=3`; stages count from 0

    Raises RecipeError with every problem.
    """
    from unicomp.recipes.check import check

    tree, problems = parse(text, file=file)
    return check(tree, [*problems, *override(tree, overrides)])


def read(name: str | File, *, overrides: Sequence[str] = ()) -> tuple["Recipe", str]:
    """Return a recipe by shipped name or path, and its exact text (without the overrides)."""
    path = find(name)
    text = SHELF.read_text(path)
    return load(
        text, file=path.name if path.parent == FOLDER else str(path), overrides=overrides
    ), text


def override(tree: Tree, texts: Sequence[str]) -> list[Problem]:
    """Set `key.key=value` in a tree of recipe data, in the order given; return what cannot be set.

    A list's items are named by their index, so `stages.1.bits=3` means the second stage. A key that
    holds dots stands in double quotes: `stages.0.modules."re:.*down_proj".bits=8`. The value is
    read as YAML. A key that does not exist yet is added, for `check` to judge.
    """
    problems: list[Problem] = []
    for number, text in enumerate(texts):
        spot, order = f"`--set {shorten(text)}`", (1, number, 0)
        try:
            _set(tree, text, spot, number)
        except RecipeError as error:
            problems += [Problem(order, message, hint) for message, hint in error.problems()]
    return problems


def from_options(verb: str, method: str, options: Mapping[str, Any], **top: Any) -> "Recipe":
    """Return a recipe of one stage from the options of a command.

    options  the method's; None means not given; a `pathlib.Path` means the YAML file that holds
             the value
    top      `model`, `calibration`, `format`, `target`, `score`, `gates`, likewise

    Raises RecipeError whose messages name flags, such as `--group-size`.
    """
    from unicomp.recipes.check import check
    from unicomp.recipes.schema import VERSION

    tree = Tree({"version": VERSION, "stages": [{verb: method}]})
    first = Place("`--method`", "`--method`", (0, 0, 0), (0, 0, 0), method, named=True)
    for made in ((), ("version",), ("stages",), ("stages", 0), ("stages", 0, verb)):
        tree.places[made] = first
    problems: list[Problem] = []
    stage: dict[Path, Any] = {("stages", 0, name): value for name, value in options.items()}
    for number, (path, value) in enumerate((stage | _flat(top)).items(), start=1):
        if value is None:
            continue
        place = _flag(path, value, number)
        try:
            if isinstance(value, File):
                branch, found = parse(SHELF.read_text(value), file=str(value), rank=number)
                problems += found
            else:
                branch = _branch(_plain(value), place)
        except RecipeError as error:
            problems += [Problem((number, 0, 0), *problem) for problem in error.problems()]
            continue
        if len(path) == 2 and path[0] not in tree.data:
            tree.graft(path[:1], _branch({}, _flag((path[0], "data"), "", number)), first)
        tree.graft(path, branch, place)
    return check(tree, problems)


def _flat(top: Mapping[str, Any]) -> dict[Path, Any]:
    """Return the top-level options by path, those of `calibration` one by one."""
    found: dict[Path, Any] = {}
    for name, value in top.items():
        given = value.model_dump() if isinstance(value, BaseModel) else value
        if name == "calibration" and isinstance(given, Mapping):
            found |= {(name, key): item for key, item in given.items()}
        else:
            found[(name,)] = given
    return found


def _flag(path: Path, value: Any, number: int) -> Place:
    word = str(path[-1])
    flag = f"--{word.replace('_', '-')}"
    if path[0] == "calibration":
        flag = FLAGS.get(word, flag)
    if word == "symmetric" and value is False:
        flag = "--asymmetric"
    if word == "model":
        flag = "MODEL"
    order = (number, 0, 0)
    return Place(f"`{flag}`", f"`{flag}`", order, order, shown(value), named=True)


def _plain(value: Any) -> Any:
    """Return the value in YAML's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value


def _branch(data: Any, place: Place) -> Tree:
    """Return a tree whose every part has the place of the whole."""
    tree = Tree(data)
    todo: list[tuple[Path, Any]] = [((), data)]
    while todo:
        path, part = todo.pop()
        source = shown(part)
        tree.places[path] = Place(
            place.key, place.value, place.key_order, place.value_order, source, place.named
        )
        if isinstance(part, dict):
            todo += [((*path, key), item) for key, item in part.items()]
        elif isinstance(part, list):
            todo += [((*path, index), item) for index, item in enumerate(part)]
    return tree


def _set(tree: Tree, text: str, spot: str, number: int) -> None:
    """Carry out one override; RecipeError if it cannot be done."""
    found = OVERRIDE.fullmatch(text)
    if found is None:
        raise RecipeError([(f"{spot}: not `key=value`", "write it as `stages.0.bits=3`")])
    words = [quoted or word for quoted, word in WORD.findall(found["key"])]
    value = found["value"]
    branch = Tree(None)
    order = (1, number, 0)
    place = Place(spot, spot, order, order, "null")
    branch.places[()] = place
    if value.strip():
        branch = _branch(_value(value, spot), place)
    path: Path = ()
    data = tree.data
    for index, word in enumerate(words):
        last = index == len(words) - 1
        if isinstance(data, list):
            if not word.isdecimal() or int(word) >= len(data):
                raise RecipeError([(f"{spot}: {_no_item(path, word, data)}", _items(path, data))])
            path = (*path, int(word))
            data = data[int(word)]
        elif isinstance(data, dict):
            path = (*path, word)
            if not last and data.get(word) is None:
                tree.graft(path, _branch({}, place), place)
            data = data.get(word)
        else:
            held = ".".join(map(str, path)) or "the recipe"
            raise RecipeError([(f"{spot}: `{held}` holds no keys", None)])
    tree.graft(path, branch, place)


def _value(text: str, spot: str) -> Any:
    """Return the value that YAML text stands for; what is wrong has no line, only the text."""
    try:
        tree, problems = parse(text, file=spot)
    except RecipeError as error:
        found = list(error.problems())
    else:
        found = [(problem.message, problem.hint) for problem in problems]
    if not found:
        return tree.data
    prefix = re.compile(re.escape(spot) + r":\d+:\d+: ")
    raise RecipeError([(prefix.sub(lambda _: f"{spot}: ", m), hint) for m, hint in found])


def _no_item(path: Path, word: str, data: list[Any]) -> str:
    what = "stages" if path == ("stages",) else f"items in `{'.'.join(map(str, path))}`"
    return f"no `{shown(word)}` among the {len(data)} {what}, which count from 0"


def _items(path: Path, data: list[Any]) -> str | None:
    """List the stages by their numbers."""
    if path != ("stages",) or not data:
        return None
    stages = [
        f"{index} is `{shown(verb)}: {shown(method)}`"
        for index, stage in enumerate(data)
        if isinstance(stage, dict) and stage
        for verb, method in [next(iter(stage.items()))]
    ]
    return ", ".join(stages) or None


def comment(text: str) -> list[str]:
    """Return the lines of the comment block that opens a recipe, without `#`."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return lines


def problems(name: str | File) -> list[tuple[str, str | None]]:
    """Return every (message, hint) that is wrong with a recipe; none if it is sound."""
    try:
        read(name)
    except RecipeError as error:
        return list(error.problems())
    return []


def copy(path: File, to: File, *, overwrite: bool = False) -> File:
    """Copy the text of a recipe to a file, or into a folder under its own name; return the file.

    Raises RecipeError if the file exists, unless `overwrite`, or cannot be written.
    """
    text = SHELF.read_text(path)
    target = to / path.name if to.is_dir() else to
    try:
        with target.open("w" if overwrite else "x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
    except FileExistsError as error:
        hint = "name another file, or add `--overwrite`"
        raise RecipeError([(f"{target}: exists already", hint)]) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        hint = "name a file in a folder that exists and can be written"
        raise RecipeError([(f"{target}: cannot be written: {reason}", hint)]) from error
    return target

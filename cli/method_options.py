"""Command-line options read from the fields that a recipe has for the same thing.

A method's fields are the keys of its recipe stage (`compress/method.py`), so they are also the
options of its command: name, default and explanation stand in one place. Importing a method would
import torch, which `--help` and shell completion must not; so the fields are read from the source
instead. `tests/cli/test_method_options.py` holds that this reading equals what pydantic makes of
the same classes.

A field is read when it is written `name: type = Field(default, description="...")`. The kind of
option follows from the default:

    bool               `--name/--no-name` (`--symmetric/--asymmetric`)
    int, float, str    one value
    tuple              one value, may be given again
    dict               the name of a YAML or JSON file that holds the mapping
    None               one value of the type that the annotation `type | None` names
"""

import ast
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

ROOT = Path(__file__).resolve().parent.parent
COMPRESS = ROOT / "compress"
OPPOSITES = {"symmetric": "asymmetric"}
FLAGS = {"data": "calibration"}
REQUIRED = object()
TYPES: Mapping[str, type] = {"int": int, "float": float}
LITERAL = re.compile(r"\bLiteral\[([^]]*)\]")

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Option:
    """One key of a recipe.

    choices   the words it may be, as far as the source says
    optional  its type where the default is None
    defaults  method -> default; what is common to all stands under the empty name
    """

    name: str
    description: str
    choices: tuple[str, ...] = ()
    optional: type = str
    defaults: dict[str, Any] = field(default_factory=dict)

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return "--" + FLAGS.get(self.name, self.name).replace("_", "-")

    @property
    def kind(self) -> type:
        """The type of the default; str where there is none to read."""
        default = next(iter(self.defaults.values()))
        if default is None:
            return self.optional
        return str if default is REQUIRED else type(default)

    @property
    def help(self) -> str:
        """The explanation, with the default of each method that has this option."""
        known = {n: value for n, value in self.defaults.items() if value not in (None, REQUIRED)}
        if not known:
            return f"{self.description}."
        said = [f"{_shown(value)}{f' ({name})' * bool(name)}" for name, value in known.items()]
        return f"{self.description}. Default: {', '.join(said)}."


@lru_cache(maxsize=8)
def of_verb(verb: str, folder: Path = COMPRESS) -> tuple[Option, ...]:
    """Return the options of every method of a verb, those common to all first.

    folder  has `method.py`, or of a verb a file of its own, and a folder per verb with a file per
            method
    """
    options: dict[str, Option] = {}
    common = folder / f"{verb}_method.py"
    sources: list[tuple[str, Path, str | None]] = [
        ("", common if common.is_file() else folder / "method.py", f"{verb.title()}Method")
    ]
    sources += [
        (name, folder / verb / f"{name}.py".replace("-", "_"), None)
        for name in methods(verb, folder)
    ]
    for method, path, wanted in sources:
        for option, default in _fields(path, wanted):
            known = options.setdefault(option.name, option)
            if not set(option.choices) <= set(known.choices):
                words = tuple(dict.fromkeys((*known.choices, *option.choices)))
                known = options[option.name] = replace(known, choices=words)
            known.defaults[method] = default
    return tuple(options.values())


@lru_cache(maxsize=8)
def of_class(path: Path, name: str) -> tuple[Option, ...]:
    """Return the options that the fields of one class make."""
    options = []
    for option, default in _fields(path, name):
        option.defaults[""] = default
        options.append(option)
    return tuple(options)


def methods(verb: str, folder: Path = COMPRESS) -> list[str]:
    """Return the names of the verb's own methods; those of other packages are not looked for."""
    return sorted(p.stem.replace("_", "-") for p in (folder / verb).glob("[!_]*.py"))


def accept(
    options: Iterable[Option], *, before: str | None = None
) -> Callable[[Function], Function]:
    """Give a command more options, in place of its `**words`.

    An option that the user did not give is None, or empty where it may be given again.

    before  the parameter that they stand before in the help; None: they are the last
    """

    def decorate(function: Function) -> Function:
        hints = dict(function.__annotations__)
        parameters = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
            or hints.pop(parameter.name, None) is None
        ]
        names = [parameter.name for parameter in parameters]
        place = len(names) if before is None else names.index(before)
        for option in options:
            hints[option.name] = _annotation(option)
            parameter = inspect.Parameter(
                option.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=None,
                annotation=hints[option.name],
            )
            parameters.insert(place, parameter)
            place += 1
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = hints
        return function

    return decorate


def given(options: Iterable[Option], words: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the options that the user gave, keys and values as in a recipe."""
    values = {option.name: words.get(option.name) for option in options}
    return {name: value for name, value in values.items() if value not in (None, [], ())}


def _annotation(option: Option) -> Any:
    flag, kind, metavar = option.flag, option.kind, None
    if kind is bool:
        opposite = OPPOSITES.get(option.name, f"no-{option.flag.removeprefix('--')}")
        flag = f"{flag}/--{opposite}"
    elif kind is tuple:
        kind, metavar = list[str], "PATTERN"
    elif kind is dict:
        kind, metavar = Path, "FILE"
    elif option.choices:
        metavar = "|".join(option.choices)
    elif option.name in FLAGS:
        metavar = "TEXT"

    def complete(incomplete: str) -> list[str]:
        return [word for word in option.choices if word.startswith(incomplete)]

    chooser = complete if option.choices else None
    return Annotated[
        kind | None,
        typer.Option(flag, help=option.help, metavar=metavar, autocompletion=chooser),
    ]


def _fields(path: Path, wanted: str | None) -> Iterator[tuple[Option, Any]]:
    """Yield the fields of the classes of a file, or of one of them, with their defaults."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if wanted is None:
        own = path.parent.parent / f"{path.parent.name}_method.py"
        for name, file in _inherited(tree, classes, (COMPRESS / "method.py", own)):
            yield from _fields(file, name)
    for node in list(classes.values()) if wanted is None else _with_bases(wanted, classes):
        for statement in node.body:
            if not isinstance(statement, ast.AnnAssign) or not isinstance(
                statement.value, ast.Call
            ):
                continue
            call = statement.value
            words = {word.arg: word.value for word in call.keywords}
            if ast.unparse(call.func) != "Field" or "description" not in words:
                continue
            name = ast.unparse(statement.target)
            description = ast.literal_eval(words["description"])
            choices = _choices(statement.annotation, tree)
            optional = TYPES.get(ast.unparse(statement.annotation).removesuffix(" | None"), str)
            yield Option(name, description, choices, optional), _default(call, words)


def _inherited(
    tree: ast.Module, classes: Mapping[str, ast.ClassDef], common: tuple[Path, ...]
) -> Iterator[tuple[str, Path]]:
    """Yield the bases that a method's file imports of ours, but for those in the files `common`."""
    bases = {ast.unparse(base) for node in classes.values() for base in node.bases}
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("unicomp."):
            continue
        path = ROOT.joinpath(*str(node.module).split(".")[1:]).with_suffix(".py")
        if path not in common:
            yield from ((one.name, path) for one in node.names if one.name in bases)


def _with_bases(name: str, classes: Mapping[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    """Yield a class and, of its bases, those that the same file defines."""
    if name in classes:
        yield classes[name]
        for base in classes[name].bases:
            yield from _with_bases(ast.unparse(base), classes)


def _default(call: ast.Call, words: Mapping[str | None, ast.expr]) -> Any:
    if "default_factory" in words:
        return {}
    default = call.args[0] if call.args else words.get("default")
    return REQUIRED if default is None else ast.literal_eval(default)


def _choices(annotation: ast.expr, tree: ast.Module) -> tuple[str, ...]:
    """Return the words of a `Literal`, also of one that the file imports from another of ours."""
    written = ast.unparse(annotation)
    found = LITERAL.search(written)
    if found is None and isinstance(annotation, ast.Name):
        for node in tree.body:
            names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else ()
            if isinstance(node, ast.ImportFrom) and written in names and node.module:
                path = ROOT.joinpath(*node.module.split(".")[1:]).with_suffix(".py")
                if node.module.startswith("unicomp.") and path.is_file():
                    text = path.read_text(encoding="utf-8")
                    found = re.search(rf"^{written} = Literal\[([^]]*)\]", text, re.MULTILINE)
    if found is None:
        return ()
    values = ast.literal_eval(f"({found[1]},)")
    return tuple(value for value in values if isinstance(value, str))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ", ".join(value)
    return "none" if value == {} else str(value)

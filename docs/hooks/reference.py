"""The reference, written by the code itself each time the site is built.

    commands  the words of `--help`, command by command (typer)
    recipes   every key of a recipe and of every method, with its default and range (pydantic)
    python    the public names of `unicomp`, with their signatures and docstrings
    files     the files that unicomp writes, from the docstrings of the modules that write them

Docstrings are read from the source, since importing all of it would import torch many times over.
"""

import ast
import inspect
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

import unicomp
from unicomp.cli.main import app
from unicomp.compress.methods import find
from unicomp.recipes.json_schema import json_schema

SOURCE = Path(unicomp.__file__).resolve().parent
FOLDER = "reference"
# What unicomp writes: a title, the module that writes it, and those of its classes that say more.
WRITTEN = (
    ("The manifest: unicomp.json", "unicomp.manifest", ()),
    ("The report: report.json", "unicomp.evaluate.scores", ("Score", "Subject", "Report")),
    ("Gates", "unicomp.evaluate.verdicts.gates", ()),
    ("A delta", "unicomp.kernels.delta_folder", ()),
    ("compressed-tensors", "unicomp.kernels.formats.compressed_tensors", ()),
    ("GPTQ", "unicomp.kernels.formats.gptq", ()),
    ("GGUF", "unicomp.kernels.exports.gguf", ()),
    ("BitNet", "unicomp.kernels.exports.bitnet", ()),
)
# What the words of `unicomp.score` are.
WORDS = ("unicomp.evaluate.asked", ("What", "How"))

# `name    what it is`: how a docstring says what each of several things is.
ENTRY = re.compile(r"(\S+(?:, \S+)*) {2,}(\S.*)")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of the reference, and put them into the navigation."""
    commands = {}
    for name, command in getattr(typer.main.get_command(app), "commands", {}).items():
        commands[f"unicomp {name}"] = "\n".join(of_command(command, f"unicomp {name}"))
    pages = {
        "Recipes": "\n".join(of_recipes(json_schema())),
        "From Python": "\n".join(of_python()),
        "Files": "\n".join(of_files()),
    }
    entries: list[Any] = [_add(files, config, *item) for item in commands.items()]
    entries = [{"Command line": entries}]
    entries += [_add(files, config, *item) for item in pages.items()]
    config["nav"].insert(-1, {"Reference": entries})
    return files


def _add(files: Files, config: Any, title: str, text: str) -> dict[str, str]:
    uri = f"{FOLDER}/{title.lower().replace(' ', '-')}.md"
    files.append(File.generated(config, uri, content=f"# {title}\n\n{text}\n"))
    return {title: uri}


def of_command(command: Any, name: str, level: int = 1) -> Iterator[str]:
    """Yield the Markdown of a command, or of each command of a group, from its own help.

    name   as it is typed
    level  of the heading that stands above
    """
    context = type(command).context_class(command, info_name=name)
    yield f"{command.help or ''}\n"
    if hasattr(command, "commands"):
        for inner, sub in command.commands.items():
            yield f"{'#' * (level + 1)} {name} {inner}\n"
            yield from of_command(sub, f"{name} {inner}", level + 1)
        return
    yield f"```text\n{command.get_usage(context)}\n```\n"
    records = [param.get_help_record(context) for param in command.params]
    yield from _table(("option", "means"), filter(None, records))
    example = (command.epilog or "").partition("Example: ")[2]
    if example:
        yield f"\n```sh\n{example}\n```\n"


def of_recipes(schema: dict[str, Any]) -> Iterator[str]:
    """Yield the Markdown of every key of a recipe, from its JSON Schema."""
    parts = schema["$defs"]
    yield "`unicomp recipes schema` prints all of this as JSON Schema, for editors.\n"
    yield "## A recipe\n"
    yield from _keys(schema)
    for title, part in (("calibration", "recipe.Calibration"), ("gates", "recipe.Gate")):
        yield f"\n## {title}\n\n{parts[part].get('description', '')}\n"
        yield from _keys(parts[part])
    verb = ""
    for reference in schema["properties"]["stages"]["items"]["oneOf"]:
        part = reference["$ref"].rpartition("/")[2]
        first, method = part.split(".")
        if first != verb:
            verb = first
            yield f"\n## Stage: {verb}\n"
        yield f"\n### {verb}: {method}\n"
        yield markdown(inspect.getdoc(inspect.getmodule(find(verb, method))) or "")
        yield from _keys(parts[part], without=(verb,))
        override = parts.get(f"{part}.Override")
        if override is not None:
            yield "\nOf one module, in `modules`:\n"
            yield from _keys(override)


def _keys(schema: dict[str, Any], without: Iterable[str] = ()) -> Iterator[str]:
    needed = schema.get("required", ())
    rows = []
    for name, about in schema["properties"].items():
        if name not in without:
            default = "needed" if name in needed else _value(about.get("default"))
            rows.append((name, kind(about), default, about.get("description", "")))
    yield from _table(("key", "is", "default", "means"), rows, code=(0, 2))


def kind(schema: dict[str, Any]) -> str:
    """Say what a value of a JSON Schema may be, in a few words: `integer, 2 to 8`."""
    if "anyOf" in schema or "oneOf" in schema:
        several = [kind(one) for one in schema.get("anyOf", schema.get("oneOf", ()))]
        return " or ".join(dict.fromkeys(word for word in several if word != "null"))
    if "const" in schema or "enum" in schema:
        words = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{_value(word)}`" for word in words)
    if "$ref" in schema:
        return "mapping"
    said = str(schema.get("type", "any"))
    words = {"object": "mapping", "array": "list"}.get(said, said)
    if said == "array" and "items" in schema:
        words += f" of {kind(schema['items'])}"
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if low is not None:
        above = "exclusiveMinimum" in schema
        words += f", {'above ' * above}{low}{' or more' * (high is None and not above)}"
    if high is not None:
        below = "below " if "exclusiveMaximum" in schema else ""
        words += f" to {below}{high}" if low is not None else f", at most {below}{high}"
    return words


def _value(value: Any) -> str:
    if value is None or value in ([], {}):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def of_python() -> Iterator[str]:
    """Yield the Markdown of the public names, and of the words that `score` takes."""
    yield markdown(inspect.getdoc(unicomp) or "")
    for name, module in sorted(unicomp._HOMES.items()):
        node = _defined(module, name)
        arguments = ast.unparse(node.args)
        yield f"## unicomp.{name}\n\n```python\nunicomp.{name}({_wrapped(arguments)})\n```\n"
        yield markdown(ast.get_docstring(node) or "")
    for name in WORDS[1]:
        yield f"## {name}: words of unicomp.score\n"
        yield markdown(ast.get_docstring(_defined(WORDS[0], name)) or "")


def of_files() -> Iterator[str]:
    """Yield the Markdown of what unicomp writes."""
    for title, module, classes in WRITTEN:
        text = _path(module).read_text(encoding="utf-8")
        yield f"## {title}\n"
        yield markdown(ast.get_docstring(ast.parse(text)) or "")
        for name in classes:
            yield f"### {name}\n"
            yield markdown(ast.get_docstring(_defined(module, name)) or "")


def _path(module: str) -> Path:
    return SOURCE.joinpath(*module.split(".")[1:]).with_suffix(".py")


def _defined(module: str, name: str) -> Any:
    """Return the last definition of a name in a module's source; those before are overloads."""
    body = ast.parse(_path(module).read_text(encoding="utf-8")).body
    return [node for node in body if getattr(node, "name", None) == name][-1]


def _wrapped(arguments: str) -> str:
    """Return arguments on lines of their own where one line would be too long."""
    if len(arguments) < 70:
        return arguments
    parts = re.split(r", (?![^\[(]*[\])])", arguments)
    return "\n    " + ",\n    ".join(parts) + ",\n"


def markdown(docstring: str) -> str:
    """Return a docstring as Markdown: paragraphs `name  meaning` become tables.

    Blocks that are indented stay as they are, which Markdown shows as code.
    """
    found = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip("\n")):
        lines = paragraph.splitlines()
        rows: list[tuple[str, str]] = []
        for line in lines:
            entry = ENTRY.fullmatch(line)
            if entry is not None:
                rows.append((entry[1], entry[2]))
            elif rows and line.startswith("  "):
                rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
            else:
                rows = []
                break
        table = "\n".join(_table(("name", "is"), rows)) if rows else ""
        found.append(table or paragraph)
    return "\n\n".join(found) + "\n"


def _table(
    head: Iterable[str], rows: Iterable[Iterable[str]], code: Iterable[int] = (0,)
) -> Iterator[str]:
    head, code = list(head), set(code)
    yield f"| {' | '.join(head)} |\n|{'---|' * len(head)}"
    for row in rows:
        cells = [" ".join(cell.split()) for cell in row]
        marked = [
            f"`{c}`" if i in code and c else c.replace("|", "\\|") for i, c in enumerate(cells)
        ]
        yield f"| {' | '.join(marked)} |"
    yield ""

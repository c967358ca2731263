"""YAML text as plain data in which every part still knows where it was written.

The reading is narrower than YAML's, so that a recipe means one thing to every reader:

* Scalars follow the core schema of YAML 1.2, not PyYAML's 1.1: `2:4` is a string (1.1: the integer
  124, in base 60), `1e-4` a float (1.1: a string), `off` a string (1.1: false). `010` is refused,
  for it is 8 to one version and 10 to the other.
* No anchors, aliases, tags, directives, second documents or repeated keys; keys are words.
* At most `LARGEST` bytes and `DEEPEST` levels, so a hostile file costs little.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml  # type: ignore[import-untyped]

from unicomp.errors import RecipeError

LARGEST = 1 << 20
DEEPEST = 12
LONGEST_NUMBER = 40
SHOWN = 60

Path = tuple[str | int, ...]
Order = tuple[int, int, int]

NULL = re.compile(r"(null|Null|NULL|~)?")
TRUE = re.compile(r"true|True|TRUE")
FALSE = re.compile(r"false|False|FALSE")
DECIMAL = re.compile(r"[-+]?[0-9]+")
LEADING_ZERO = re.compile(r"[-+]?0+[0-9]+")
OCTAL = re.compile(r"0o[0-7]+")
HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, and where it goes among the others."""

    order: Order
    message: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """Where a part of a recipe was written.

    key     what an error about its key starts with: `file:line:col` or a flag in backticks
    value   the same for its value
    source  the value as written, shortened
    named   `value` already says which option it is
    """

    key: str
    value: str
    key_order: Order
    value_order: Order
    source: str
    named: bool = False


@dataclass(slots=True)
class Tree:
    """Plain data (dict, list, str, int, float, bool, None) and the place of each part by its path.

    Every path of the data has a place; the root's path is `()`.
    """

    data: Any
    places: dict[Path, Place] = field(default_factory=dict)

    def place(self, path: Path) -> Place:
        """Return the place of a path, or of the nearest part around it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]

    def graft(self, path: Path, branch: "Tree", key: Place) -> None:
        """Put a branch where the parent of `path` is; `key` is the place of its key."""
        self.prune(path)
        parent = self.data
        for part in path[:-1]:
            parent = parent[part]
        parent[path[-1]] = branch.data
        for below, place in branch.places.items():
            self.places[path + below] = place
        root = branch.places[()]
        self.places[path] = Place(
            key.key, root.value, key.key_order, root.value_order, root.source, root.named
        )

    def prune(self, path: Path) -> None:
        """Forget the places at and below a path."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]


def shorten(text: str) -> str:
    """Return the text on one line of at most `SHOWN` characters, with nothing unprintable."""
    line = CONTROL.sub("?", " ".join(text.split()))
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def shown(data: Any) -> str:
    """Return plain data as a reader of YAML would write it, shortened."""
    if data is None or isinstance(data, bool):
        return str(data).lower().replace("none", "null")
    return shorten(str(data))


def parse(text: str, *, file: str, rank: int = 0) -> tuple[Tree, list[Problem]]:
    """Read one YAML document.

    rank  where this text's problems go among those of other texts

    Returns the tree and what is wrong with numbers and repeated keys, so that the caller can go on
    and find the rest. Raises RecipeError at once for text that is not YAML, or uses what recipes
    do without (anchors, tags, ...), where what follows would be guesswork.
    """
    if len(text.encode("utf-8", "replace")) > LARGEST:
        raise RecipeError([(f"{file}: is larger than {LARGEST} bytes", "a recipe is a short text")])
    reader = _Reader(text, file, rank)
    try:
        return reader.document()
    except yaml.YAMLError as error:
        line, column, message, hint = _complaint(error, text)
        raise RecipeError([(f"{file}:{line}:{column}: {message}", hint)]) from error


class _Reader:
    """Builds a tree from PyYAML's events."""

    def __init__(self, text: str, file: str, rank: int) -> None:
        self.text, self.file, self.rank = text, file, rank
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.tree = Tree(None)
        self.problems: list[Problem] = []
        self.fatal: list[Problem] = []

    def document(self) -> tuple[Tree, list[Problem]]:
        next(self.events)  # the start of the stream
        start = next(self.events)
        if isinstance(start, yaml.StreamEndEvent):
            hint = "start from a shipped one: `unicomp recipes cp quickstart`"
            raise RecipeError([(f"{self.file}: is empty", hint)])
        if start.version or start.tags:
            self._refuse(start, "recipes have no `%` directives", "remove the line")
        self.tree.data = self._node(next(self.events), (), None)
        next(self.events)  # the end of the document
        more = next(self.events)
        if not isinstance(more, yaml.StreamEndEvent):
            self._refuse(more, "a second document", "write each recipe to a file of its own")
        if self.fatal:
            found = sorted([*self.problems, *self.fatal], key=lambda problem: problem.order)
            raise RecipeError([(problem.message, problem.hint) for problem in found])
        return self.tree, self.problems

    def _spot(self, event: Any) -> tuple[str, Order]:
        line, column = event.start_mark.line + 1, event.start_mark.column + 1
        return f"{self.file}:{line}:{column}", (self.rank, line, column)

    def _complain(self, event: Any, message: str, hint: str | None) -> None:
        spot, order = self._spot(event)
        self.problems.append(Problem(order, f"{spot}: {message}", hint))

    def _refuse(self, event: Any, message: str, hint: str | None) -> None:
        spot, order = self._spot(event)
        self.fatal.append(Problem(order, f"{spot}: {message}", hint))

    def _node(self, event: Any, path: Path, key: Any) -> Any:
        if len(path) > DEEPEST:
            spot, _ = self._spot(event)
            message = f"{spot}: nested deeper than {DEEPEST} levels"
            raise RecipeError(
                [(message, "a recipe is nearly flat: `unicomp recipes show w4-gptq`")]
            )
        spot, order = self._spot(event)
        key_spot, key_order = (spot, order) if key is None else self._spot(key)
        if isinstance(event, yaml.AliasEvent):
            self._refuse(event, f"an alias, `*{event.anchor}`", "write the value out")
        elif event.anchor is not None:
            self._refuse(event, f"an anchor, `&{event.anchor}`", "remove it; recipes have none")
        if getattr(event, "tag", None) is not None:
            self._refuse(event, f"a tag, `{shorten(event.tag)}`", "remove it; recipes have none")
        first = event.start_mark.index
        data: Any = None
        end = event
        if isinstance(event, yaml.MappingStartEvent):
            data, end = self._mapping(path)
        elif isinstance(event, yaml.SequenceStartEvent):
            data, end = self._sequence(path)
        elif isinstance(event, yaml.ScalarEvent):
            data = self._scalar(event)
        source = shorten(self.text[first : end.end_mark.index]) or "null"
        self.tree.places[path] = Place(key_spot, spot, key_order, order, source)
        return data

    def _mapping(self, path: Path) -> tuple[dict[str, Any], Any]:
        data: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(key := next(self.events), yaml.MappingEndEvent):
            word = self._key(key, path)
            value = next(self.events)
            if word in lines:
                message = f"`{shorten(word)}` is given twice, first on line {lines[word]}"
                self._complain(key, message, "keep one of them")
                self._skip(value, (*path, word))
                continue
            lines[word] = key.start_mark.line + 1
            data[word] = self._node(value, (*path, word), key)
        return data, key

    def _key(self, event: Any, path: Path) -> str:
        if isinstance(event, yaml.ScalarEvent):
            if event.anchor is not None or event.tag is not None:
                self._refuse(event, "an anchor or a tag before a key", "remove it")
            if not event.value or CONTROL.search(event.value):
                self._complain(event, "a key that is empty or unprintable", "keys are words")
            return str(event.value)
        self._refuse(event, "a key that is not a word", "quote it if it is one")
        self._skip(event, (*path, "?"))
        return "?"

    def _skip(self, event: Any, path: Path) -> None:
        """Read past a value; what is wrong inside it is still found."""
        kept = self.tree
        self.tree = Tree(None)
        self._node(event, path, None)
        self.tree = kept

    def _sequence(self, path: Path) -> tuple[list[Any], Any]:
        data: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            data.append(self._node(event, (*path, len(data)), None))
        return data, event

    def _scalar(self, event: Any) -> Any:
        word = str(event.value)
        if CONTROL.search(word):
            self._complain(event, "an unprintable character in a value", "remove it")
        if not event.implicit[0]:
            return word
        if NULL.fullmatch(word):
            return None
        if TRUE.fullmatch(word):
            return True
        if FALSE.fullmatch(word):
            return False
        number = _number(word)
        if number is None:
            return word
        if len(word) > LONGEST_NUMBER:
            hint = f"use at most {LONGEST_NUMBER} characters"
            self._complain(event, f"a number of {len(word)} characters", hint)
            return 0
        if LEADING_ZERO.fullmatch(word):
            message = f"`{word}` is 8 based to some readers of YAML and 10 based to others"
            self._complain(event, message, f"write `{number}`, or quote it if it is a word")
        return number


def _number(word: str) -> int | float | None:
    """Return the number that a plain scalar is under YAML 1.2's core schema, or None."""
    if len(word) > LONGEST_NUMBER:
        return 0 if DECIMAL.fullmatch(word) or FLOAT.fullmatch(word) else None
    if DECIMAL.fullmatch(word):
        return int(word)
    if OCTAL.fullmatch(word):
        return int(word[2:], 8)
    if HEXADECIMAL.fullmatch(word):
        return int(word[2:], 16)
    if FLOAT.fullmatch(word):
        return float(word)
    if SPECIAL.fullmatch(word):
        return float(word.replace(".", ""))
    return None


def _complaint(error: yaml.YAMLError, text: str) -> tuple[int, int, str, str | None]:
    """Return line, column, message and hint of what PyYAML says."""
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line = before.count("\n") + 1
        column = error.position - (before.rfind("\n") + 1) + 1
        return line, column, f"the character U+{ord(text[error.position]):04X}", "remove it"
    mark = error.problem_mark or error.context_mark
    line, column = mark.line + 1, mark.column + 1
    if text[mark.index : mark.index + 1] == "\t":
        return line, column, "a tab where YAML wants spaces", "indent with spaces"
    said = str(error.problem).replace("'", "`").replace("<stream end>", "the end of the file")
    if said == "mapping values are not allowed here":
        return line, column, "a `:` where no key can be", "quote a value that holds `: `"
    context = f" {error.context}" if error.context else ""
    return line, column, f"not YAML: {said}{context}", None

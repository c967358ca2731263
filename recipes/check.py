"""A tree of plain data becomes a `Recipe`, or everything that is wrong with it at once.

pydantic finds the problems; here each gets its place, a sentence in our words and a hint.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from unicomp import suggest
from unicomp.compress import methods
from unicomp.errors import RecipeError, UnicompError
from unicomp.recipes.schema import VERSION, Gate, Head, Recipe, Stage
from unicomp.recipes.tree import DECIMAL, FLOAT, Path, Problem, Tree, shown

Checked = TypeVar("Checked", bound=BaseModel)

MOST = 100  # problems said of one recipe
TRUTH_WORDS = frozenset({"on", "off", "yes", "no", "y", "n", "true", "false"})
NO_LIST = frozenset({"tuple_type", "list_type"})
NO_MAPPING = frozenset({"dict_type", "mapping_type", "model_type", "model_attributes_type"})
ADD_TEXT = "add `calibration: {data: FILE.jsonl, samples: 128, seq_len: 512}`"
ADD_TEXT_FLAG = "add `--calibration FILE.jsonl`, or `.txt`, `.parquet`, `hub:...`"


def check(tree: Tree, problems: Sequence[Problem] = ()) -> Recipe:
    """Return the recipe that a tree stands for.

    problems  what was already found wrong while the tree was read

    Raises RecipeError with every problem, in the order in which they stand in the text.
    """
    return _Check(tree, problems).recipe()


def check_gates(tree: Tree, problems: Sequence[Problem] = ()) -> tuple[Gate, ...]:
    """Return the gates that a tree stands for, a list of mappings; as `check`."""
    return _Check(tree, problems).gates()


class _Check:
    """Collects problems while it goes through a tree."""

    def __init__(self, tree: Tree, problems: Sequence[Problem]) -> None:
        self.tree = tree
        self.problems = list(problems)
        self.unsaid = 0

    def recipe(self) -> Recipe:
        data = self.tree.data
        if not isinstance(data, dict):
            got = "a list" if isinstance(data, list) else f"`{self.tree.place(()).source}`"
            self._add((), f"a recipe is a mapping of keys, got {got}", f"begin with {_first()}")
        elif self._version(data):
            head = self._checked(Head, {k: v for k, v in data.items() if k != "stages"}, ())
            stages = self._stages(data)
            if head is not None and not self.problems:
                parts = {name: getattr(head, name) for name in Head.model_fields}
                return Recipe(stages=stages, **parts)
        raise self._error()

    def gates(self) -> tuple[Gate, ...]:
        data = self.tree.data
        found: list[Gate | None] = []
        if not isinstance(data, list) or not data:
            self._add((), "a gate file is a list of gates", "begin with `- score: NAME`")
        else:
            for index, gate in enumerate(data):
                if isinstance(gate, dict):
                    found.append(self._checked(Gate, gate, (index,)))
                else:
                    got = self.tree.place((index,)).source
                    message = f"a gate is a mapping of keys, got `{got}`"
                    self._add((index,), message, "write `- score: NAME` and a bound")
        if self.problems:
            raise self._error()
        return tuple(gate for gate in found if gate is not None)

    def _error(self) -> RecipeError:
        self.problems.sort(key=lambda problem: problem.order)
        found = [(problem.message, problem.hint) for problem in self.problems[:MOST]]
        more = self.unsaid + len(self.problems) - len(found)
        if more:
            found.append((f"and {more} more problems", "mend these first"))
        return RecipeError(found)

    def _version(self, data: dict[str, Any]) -> bool:
        """Look at the version first: of a version that we do not know, we know nothing."""
        if "version" not in data:
            self._add((), "`version` is missing", f"begin with {_first()}")
            return True
        version = data["version"]
        if type(version) is not int or version == VERSION:
            return True
        hint = "upgrade unicomp" if version > VERSION else f"write {_first()}"
        message = f"`version`: this unicomp reads `{VERSION}`, got `{shown(version)}`"
        self._add(("version",), message, hint)
        return False

    def _stages(self, data: dict[str, Any]) -> tuple[Stage, ...]:
        stages = data.get("stages")
        if isinstance(stages, list) and stages:
            found = [self._stage(index, stage) for index, stage in enumerate(stages)]
            return tuple(stage for stage in found if stage is not None)
        if stages is None or stages == []:
            message = "`stages` is empty" if "stages" in data else "`stages` is missing"
        else:
            message = "`stages`: input should be a list"
        self._add(("stages",), message, "add `stages:` and under it `- quantize: gptq`")
        return ()

    def _stage(self, index: int, data: Any) -> Stage | None:
        path: Path = ("stages", index)
        if not isinstance(data, dict) or not data:
            got = self.tree.place(path).source
            self._add(path, f"a stage is a mapping, got `{got}`", "write `- quantize: gptq`")
            return None
        verb, method = next(iter(data.items()))
        verbs = methods.verbs()
        if verb not in verbs:
            later = next((key for key in data if key in verbs), None)
            hint = suggest.hint(verb, verbs)
            if later is not None:
                hint = f"the first key of a stage is its verb: begin with `{later}`"
            self._add((*path, verb), f"unknown stage `{shown(verb)}`", hint, key=True)
            return None
        known = methods.methods(verb)
        if not isinstance(method, str):
            hint = f"write `{verb}: {known[0]}`; there are {suggest.listed(known)}"
            self._add((*path, verb), f"`{verb}` needs the name of a method", hint)
            return None
        if method not in known:
            message = f"unknown method `{shown(method)}` for `{verb}`"
            self._add((*path, verb), message, suggest.hint(method, known))
            return None
        try:
            kind = methods.find(verb, method)
        except UnicompError as error:  # of another package, and broken
            self._add((*path, verb), error.message, error.hint)
            return None
        given = {key: value for key, value in data.items() if key != verb}
        options = self._checked(kind, given, path, f"{verb}: {method}")
        if kind.needs and self.tree.data.get("calibration") is None:
            hint = ADD_TEXT_FLAG if self.tree.place((*path, verb)).named else ADD_TEXT
            self._add((*path, verb), f"`{verb}: {method}` needs calibration text", hint)
        return None if options is None else Stage(verb=verb, method=method, options=options)

    def _checked(
        self, kind: type[Checked], data: dict[str, Any], path: Path, stage: str | None = None
    ) -> Checked | None:
        """Return the model made of the data, or None after noting every problem."""
        try:
            # as JSON, where strict still takes a list for a tuple and a word for an enumeration
            return kind.model_validate_json(json.dumps(data))
        except ValidationError as error:
            grouped: dict[tuple[Path, bool], list[Any]] = {}
            for detail in error.errors(include_url=False):
                grouped.setdefault(self._located(path, detail["loc"]), []).append(detail)
            self.unsaid += max(0, len(grouped) - MOST)
            for (where, on_key), details in islice(grouped.items(), MOST):
                inner = where[len(path) :]
                if details[0]["type"] == "extra_forbidden":
                    known = list(_model(kind, inner[:-1]).model_fields)
                    known += ["stages"] if kind is Head and len(inner) == 1 else []
                    self._unknown(where, known, inner[:-1], stage)
                elif details[0]["type"] == "missing":
                    for detail in details:
                        self._missing(where, str(detail["loc"][-1]), kind, inner)
                else:
                    self._invalid(where, inner, details, on_key)
            return None

    def _located(self, base: Path, loc: tuple[int | str, ...]) -> tuple[Path, bool]:
        """Return the path that pydantic's location means, and whether its key is meant.

        What is not in the tree is left out: fields that are missing, and the names of the members
        of a union, which pydantic puts among the keys.
        """
        path = base
        for part in loc:
            if (*path, part) in self.tree.places:
                path = (*path, part)
            elif part == "[key]":
                return path, True
        return path, False

    def _unknown(self, path: Path, known: Sequence[str], holder: Path, stage: str | None) -> None:
        word = str(path[-1])
        hint = suggest.hint(word, known)
        if holder:
            message = f"`{_dotted(holder)}` has no key `{shown(word)}`"
        elif stage is None:
            message = f"unknown key `{shown(word)}`"
        else:
            message = f"`{stage}` has no option `{shown(word)}`"
            if suggest.closest(word, known) is None:
                hint = self._elsewhere(path, word, stage) or hint
        self._add(path, message, hint, key=True)

    def _elsewhere(self, path: Path, word: str, stage: str) -> str | None:
        """Say what has an option that this stage lacks: another stage, or another method."""
        for index, other in enumerate(self.tree.data["stages"]):
            verb, method = (
                next(iter(other.items())) if isinstance(other, dict) and other else ("", "")
            )
            if index != path[1] and word in _options(verb, method):
                return f"stage {index}, `{verb}: {method}`, has it; stages count from 0"
        verb = stage.partition(":")[0]
        having = [m for m in methods.methods(verb) if word in _options(verb, m)]
        return f"it is an option of {suggest.listed(having)}" if having else None

    def _missing(self, path: Path, word: str, kind: type[BaseModel], inner: Path) -> None:
        place = self.tree.place(path)
        if place.named:
            self.problems.append(Problem(place.value_order, f"{place.value} is missing", None))
            return
        message = f"`{word}` is missing"
        field = _model(kind, inner).model_fields[word]
        hint = f"`{word}`: {field.description}" if field.description else None
        self._add(path, f"`{_dotted(inner)}`: {message}" if inner else message, hint)

    def _invalid(self, path: Path, inner: Path, details: list[Any], on_key: bool) -> None:
        place = self.tree.place(path)
        detail = details[0]
        message = " or ".join(dict.fromkeys(map(_wording, details)))
        scalar = not isinstance(detail["input"], dict | list)
        if not on_key and scalar and detail["type"] != "unknown_word":
            message = f"{message}, got `{place.source}`"
        if inner and not place.named:
            message = f"`{_dotted(inner)}`: {message}"
        self._add(path, message, _hint(detail, place.source), key=on_key)

    def _add(self, path: Path, message: str, hint: str | None, *, key: bool = False) -> None:
        place = self.tree.place(path)
        spot = place.key if key else place.value
        order = place.key_order if key else place.value_order
        self.problems.append(Problem(order, f"{spot}: {message}", hint))


def _first() -> str:
    return f"`version: {VERSION}`"


def _options(verb: str, method: Any) -> Collection[str]:
    """Return the options of a method; none for one that does not exist or does not load."""
    if method not in methods.methods(verb):
        return ()
    try:
        return methods.find(verb, method).model_fields
    except UnicompError:
        return ()


def _dotted(path: Path) -> str:
    return shown(".".join(map(str, path)))


def _model(kind: type[BaseModel], path: Path) -> type[BaseModel]:
    """Return the model that stands at a path within a model."""
    for part in path:
        field = kind.model_fields.get(str(part))
        inner = _inside(field.annotation) if field is not None else None
        kind = inner if inner is not None else kind
    return kind


def _inside(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `Mapping[str, Override]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _inside(part))), None)


def _wording(detail: Mapping[str, Any]) -> str:
    """Return pydantic's message in our words."""
    if detail["type"] in NO_LIST:
        return "input should be a list"
    if detail["type"] in NO_MAPPING:
        return "input should be a mapping"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in ("literal_error", "enum"):
        message = re.sub(r"'([^']*)'", r"`\1`", message)
    return message[:1].lower() + message[1:]


def _hint(detail: Mapping[str, Any], source: str) -> str | None:
    """Return what to write instead, where that can be told."""
    kind, given = detail["type"], detail["input"]
    if kind == "unknown_word":
        near = suggest.closest(detail["ctx"]["given"], detail["ctx"]["known"])
        return f"did you mean `{near}`?" if near else None
    if kind in ("literal_error", "enum") and isinstance(given, str):
        near = suggest.closest(given, re.findall(r"'([^']*)'", detail["ctx"]["expected"]))
        return f"did you mean `{near}`?" if near else None
    if kind == "bool_type" and isinstance(given, str) and given.casefold() in TRUTH_WORDS:
        return "write `true` or `false`"
    if kind in ("int_type", "float_type") and isinstance(given, str):
        bare = given.replace("_", "")
        known = DECIMAL if kind == "int_type" else FLOAT
        return f"write `{bare}`" if known.fullmatch(bare) else None
    if kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        return f"write `{int(given)}`"
    if kind == "string_type" and not isinstance(given, dict | list) and given is not None:
        return "put it in quotes"
    if kind in NO_LIST and isinstance(given, str | int | float):
        return f"write `[{source}]`"
    return None

"""Options read from source are those that pydantic has; what is read is shown and passed on."""

import inspect
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic_core import PydanticUndefined

from unicomp.cli import method_options
from unicomp.cli.method_options import Option
from unicomp.compress import methods
from unicomp.recipes.schema import Calibration

VERBS = ["delta", "distill", "prune", "quantize"]
SCHEMA = method_options.ROOT / "recipes/schema.py"


def fields(kind: Any) -> dict[str, tuple[str, Any]]:
    """Name -> description and default of a pydantic class, as `of_verb` tells them."""
    found = {}
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if default is PydanticUndefined:
            default = method_options.REQUIRED
        found[name] = (field.description, default)
    return found


@pytest.mark.parametrize("verb", VERBS)
def test_options_are_the_fields_of_every_method(verb: str) -> None:
    options = {option.name: option for option in method_options.of_verb(verb)}
    for method in methods.methods(verb):
        kind = methods.find(verb, method)
        for name, (description, default) in fields(kind).items():
            known = options[name].defaults
            overridden = name in kind.__annotations__ and next(iter(known)) != method
            assert overridden or options[name].description == description
            assert known.get(method, known.get("")) == default, f"{verb} {method} {name}"


@pytest.mark.parametrize("verb", VERBS)
def test_no_option_that_no_method_has(verb: str) -> None:
    kinds = {method: methods.find(verb, method) for method in methods.methods(verb)}
    common = [k for k in kinds.values() if f"{verb.title()}Method" in {c.__name__ for c in k.mro()}]
    assert common
    for option in method_options.of_verb(verb):
        for method in option.defaults:
            owners = common if method == "" else [kinds[method]]
            assert all(option.name in owner.model_fields for owner in owners)


@pytest.mark.parametrize("verb", VERBS)
def test_choices_are_those_of_the_literals(verb: str) -> None:
    words: dict[str, set[str]] = {}
    for method in methods.methods(verb):
        for name, field in methods.find(verb, method).model_fields.items():
            known = (word for word in get_args(field.annotation) if isinstance(word, str))
            words.setdefault(name, set()).update(known)
    for option in method_options.of_verb(verb):
        if option.kind is str:
            assert sorted(option.choices) == sorted(words[option.name]), option.name


def test_calibration_options_are_those_of_the_recipe() -> None:
    options = method_options.of_class(SCHEMA, "Calibration")
    assert {o.name: (o.description, o.defaults[""]) for o in options} == fields(Calibration)
    assert next(o for o in options if o.name == "data").flag == "--calibration"


def test_methods_are_those_of_the_registry() -> None:
    for verb in VERBS:
        assert method_options.methods(verb) == methods.methods(verb)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A verb of two methods with every kind of option."""
    (tmp_path / "prune").mkdir()
    (tmp_path / "method.py").write_text(
        "class Method: ...\n"
        "class PruneMethod(Method):\n"
        "    sparsity: float = Field(0.5, description='share of zeros')\n"
        "    symmetric: bool = Field(True, description='even')\n"
        "    fast: bool = Field(False, description='quick')\n"
        "    ignore: Patterns = Field(('a', 'b'), description='left')\n"
        "    modules: Mapping[str, X] = Field(default_factory=dict, description='by name')\n"
        "    hidden = 3\n"
        "class Elsewhere:\n"
        "    other: int = Field(1, description='not of this verb')\n"
    )
    (tmp_path / "prune" / "two_words.py").write_text(
        "class TwoWords(PruneMethod):\n"
        "    scope: Literal['row', 'global'] = Field('row', description='where')\n"
        "    sparsity: float = Field(default=0.7, description='share of zeros')\n"
        "    length: int | None = Field(None, description='how many, or what fits')\n"
        "    needs: ClassVar[int] = field(3)\n"
    )
    (tmp_path / "prune" / "__init__.py").write_text("class X:\n    y: int = Field(1)\n")
    return tmp_path


def test_every_kind_of_option(folder: Path) -> None:
    options = {option.name: option for option in method_options.of_verb("prune", folder)}
    assert list(options) == [
        "sparsity",
        "symmetric",
        "fast",
        "ignore",
        "modules",
        "scope",
        "length",
    ]
    kinds = {name: option.kind for name, option in options.items()}
    assert list(kinds.values()) == [float, bool, bool, tuple, dict, str, int]
    assert options["length"].help == "how many, or what fits."
    assert options["scope"].choices == ("row", "global")
    assert options["sparsity"].help == "share of zeros. Default: 0.5, 0.7 (two-words)."
    assert options["scope"].help == "where. Default: row (two-words)."
    assert options["ignore"].help == "left. Default: a, b."
    assert options["modules"].help == "by name. Default: none."


def test_accept_and_given(folder: Path) -> None:
    options = method_options.of_verb("prune", folder)

    @method_options.accept(options, before="json")
    def command(model: str, json: bool = False, **words: Any) -> dict[str, Any]:
        return words

    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["model", *(o.name for o in options), "json"]
    assert all(parameters[o.name].default is None for o in options)
    flags = {o.name: get_args(parameters[o.name].annotation)[1] for o in options}
    declared = {name: flag.default for name, flag in flags.items()}
    assert declared["symmetric"] == "--symmetric/--asymmetric"
    assert declared["fast"] == "--fast/--no-fast"
    assert declared["sparsity"] == "--sparsity"
    words = {"sparsity": 0.0, "symmetric": False, "ignore": [], "scope": None, "json": True}
    assert method_options.given(options, words) == {"sparsity": 0.0, "symmetric": False}


def test_a_default_that_cannot_be_read_is_said_loudly(tmp_path: Path) -> None:
    (tmp_path / "method.py").write_text(
        "class PruneMethod:\n    a: int = Field(len('x'), description='d')\n"
    )
    with pytest.raises(ValueError, match="malformed"):
        method_options.of_verb("prune", tmp_path)


def test_option_without_default() -> None:
    option = Option("data", "a text", defaults={"": method_options.REQUIRED})
    assert (option.kind, option.help) == (str, "a text.")

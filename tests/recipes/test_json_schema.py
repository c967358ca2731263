"""The JSON Schema takes what the validator takes, and refuses what it refuses."""

import re
from typing import Any

import pytest

from unicomp.compress import methods
from unicomp.kernels.format import formats
from unicomp.recipes.json_schema import json_schema
from unicomp.recipes.load import load, read, shipped
from unicomp.recipes.tree import parse

TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
ANNOTATIONS = {"title", "description", "default", "format", "$defs", "$schema"}


def conforms(schema: dict[str, Any], data: Any, root: dict[str, Any]) -> bool:
    """Tell whether data conforms, for the keywords we use; KeyError for any other keyword."""
    rules = {
        "$ref": lambda ref: conforms(root["$defs"][ref.removeprefix("#/$defs/")], data, root),
        "type": lambda kind: (
            isinstance(data, TYPES[kind]) and (kind == "boolean" or not isinstance(data, bool))
        ),
        "const": lambda value: data == value and type(data) is type(value),
        "enum": lambda values: data in values,
        "anyOf": lambda parts: any(conforms(part, data, root) for part in parts),
        "oneOf": lambda parts: sum(conforms(part, data, root) for part in parts) == 1,
        "minimum": lambda limit: not isinstance(data, int | float) or data >= limit,
        "maximum": lambda limit: not isinstance(data, int | float) or data <= limit,
        "exclusiveMinimum": lambda limit: not isinstance(data, int | float) or data > limit,
        "exclusiveMaximum": lambda limit: not isinstance(data, int | float) or data < limit,
        "minLength": lambda limit: not isinstance(data, str) or len(data) >= limit,
        "maxLength": lambda limit: not isinstance(data, str) or len(data) <= limit,
        "pattern": lambda text: not isinstance(data, str) or re.search(text, data) is not None,
        "minItems": lambda limit: not isinstance(data, list) or len(data) >= limit,
        "items": lambda part: (
            not isinstance(data, list) or all(conforms(part, item, root) for item in data)
        ),
        "required": lambda keys: not isinstance(data, dict) or set(keys) <= set(data),
        "properties": lambda parts: (
            not isinstance(data, dict)
            or all(conforms(parts[key], data[key], root) for key in data if key in parts)
        ),
        "propertyNames": lambda part: (
            not isinstance(data, dict) or all(conforms(part, key, root) for key in data)
        ),
        "additionalProperties": lambda part: (
            not isinstance(data, dict)
            or all(
                part is not False and (part is True or conforms(part, data[key], root))
                for key in data
                if key not in schema.get("properties", {})
            )
        ),
    }
    return all(rules[key](value) for key, value in schema.items() if key not in ANNOTATIONS)


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """The schema under test."""
    return json_schema()


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_conform(schema: dict[str, Any], name: str) -> None:
    recipe, text = read(name)
    tree, _ = parse(text, file=name)
    assert conforms(schema, tree.data, schema)
    assert conforms(schema, recipe.to_dict(), schema)


WRONG = [
    "stages: [{quantize: rtn}]",
    "version: 2\nstages: [{quantize: rtn}]",
    "version: 1",
    "version: 1\nstages: []",
    "version: 1\nstages: [{quantize: nope}]",
    "version: 1\nstages: [{prune: rtn}]",
    "version: 1\nstages: [{quantize: rtn, bits: 9}]",
    "version: 1\nstages: [{quantize: rtn, bits: '4'}]",
    "version: 1\nstages: [{quantize: rtn, group_size: 7}]",
    "version: 1\nstages: [{quantize: rtn, damp: 0.1}]",
    "version: 1\nstages: [{quantize: rtn, scale_search: x}]",
    "version: 1\nstages: [{quantize: rtn, modules: {a: {bit: 3}}}]",
    "version: 1\nstages: [{quantize: rtn, ignore: lm_head}]",
    "version: 1\nstages: [{quantize: rtn}]\nfoo: 1",
    "version: 1\nstages: [{quantize: rtn}]\nformat: nope",
    "version: 1\nstages: [{quantize: rtn}]\nscore: [speed]",
    "version: 1\nstages: [{quantize: rtn}]\ncalibration: {samples: 3}",
    "version: 1\nstages: [{quantize: rtn}]\ngates: [{score: fidelity/kl, retention: 3}]",
]


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_schema_and_validator_refuse_alike(schema: dict[str, Any], text: str) -> None:
    tree, _ = parse(text, file="x")
    assert not conforms(schema, tree.data, schema)
    with pytest.raises(Exception, match="x:"):
        load(text, file="x")


def test_every_verb_method_and_option_is_covered(schema: dict[str, Any]) -> None:
    wanted = {f"{verb}.{m}" for verb in methods.verbs() for m in methods.methods(verb)}
    refs = {part["$ref"] for part in schema["properties"]["stages"]["items"]["oneOf"]}
    assert refs == {f"#/$defs/{name}" for name in wanted}
    for name in wanted:
        verb, method = name.split(".")
        options = methods.find(verb, method).model_fields
        assert set(schema["$defs"][name]["properties"]) == {verb} | set(options)
        assert schema["$defs"][name]["additionalProperties"] is False
    assert schema["properties"]["format"]["enum"] == formats()


def test_every_option_is_explained(schema: dict[str, Any]) -> None:
    for name, definition in schema["$defs"].items():
        verb = name.split(".")[0]
        for key, part in definition["properties"].items():
            explained = "description" in part or key == verb or name.endswith(".Override")
            assert explained, f"{name}: {key} has no description"


def test_every_reference_leads_somewhere(schema: dict[str, Any]) -> None:
    def refs(part: Any) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if "$ref" in part else []
            return own + [ref for value in part.values() for ref in refs(value)]
        return [ref for value in part for ref in refs(value)] if isinstance(part, list) else []

    assert refs(schema)
    assert all(ref.removeprefix("#/$defs/") in schema["$defs"] for ref in refs(schema))

"""JSON Schema of a recipe, for editors: every verb, every method, every option.

What a schema cannot say, `load.py` says: that the verb comes first, patterns that do not compile,
keys given twice, and which methods need calibration text.
"""

from typing import Any

from pydantic import BaseModel

from unicomp.compress import methods
from unicomp.kernels.format import formats
from unicomp.recipes.schema import VERSION, Head

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of every recipe that this unicomp reads."""
    shared: dict[str, Any] = {}
    head = _plain(Head, "recipe", shared)
    stages = []
    for verb in methods.verbs():
        for method in methods.methods(verb):
            name = f"{verb}.{method}"
            stage = _plain(methods.find(verb, method), name, shared)
            stage["properties"] = {verb: {"const": method}, **stage["properties"]}
            stage["required"] = [verb, *stage.get("required", [])]
            stage["title"] = f"{verb}: {method}"
            shared[name] = stage
            stages.append({"$ref": f"#/$defs/{name}"})
    properties = head["properties"]
    properties["version"] = {"const": VERSION, "description": properties["version"]["description"]}
    properties["format"]["enum"] = formats()
    properties["stages"] = {
        "type": "array",
        "minItems": 1,
        "description": "what to do, in order; the first key of a stage is its verb",
        "items": {"oneOf": stages},
    }
    return {
        "$schema": DIALECT,
        "title": "unicomp recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["version", "stages"],
        "properties": properties,
        "$defs": dict(sorted(shared.items())),
    }


def _plain(kind: type[BaseModel], name: str, shared: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a model; move its parts to `shared` under names of their own."""
    schema = kind.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
    for part, definition in schema.pop("$defs", {}).items():
        shared[f"{name}.{part}"] = definition
    return schema

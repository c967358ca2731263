"""The metadata of a model card: the fields that the Hub reads from its first lines, and no others.

`Fields` is the schema: what is written is made through it, and `push` refuses a card that does not
fit it. Scores stand in the Hub's `model-index`, one result for each measured score, its interval
and the base's value under the metric's `args`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unicomp.errors import UnicompError
from unicomp.folder import read_small
from unicomp.manifest import Manifest
from unicomp.recipes.emit import emit

LIMIT = 1_000_000
"""Most bytes of a card that is read."""

HUB_ID = r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$"
Word = Annotated[str, Field(min_length=1, max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Task(_Part):
    """What a model was asked to do, in the Hub's words."""

    type: Word


class Dataset(_Part):
    """On what; `type` is an identifier, `name` is for people."""

    type: Word
    name: Word


class Metric(_Part):
    """One score; `args` holds `ci95`, `n` and `baseline` where they are known."""

    type: Word
    name: Word
    value: float
    args: dict[str, float | list[float]] = Field(default_factory=dict)


class Result(_Part):
    """The scores of one task on one data set."""

    task: Task
    dataset: Dataset
    metrics: list[Metric] = Field(min_length=1)


class Entry(_Part):
    """One model of a `model-index`."""

    name: Word
    results: list[Result] = Field(min_length=1)


class Fields(_Part):
    """Everything that the first lines of a card may say."""

    library_name: Literal["transformers"] = "transformers"
    pipeline_tag: Literal["text-generation"] = "text-generation"
    license: Word | None = None
    base_model: Annotated[str, Field(pattern=HUB_ID)] | None = None
    base_model_relation: Literal["quantized", "finetune"] | None = None
    tags: list[Word]
    model_index: list[Entry] | None = Field(None, alias="model-index", max_length=1)


def fields(manifest: Manifest, report: Mapping[str, Any] | None) -> Fields:
    """Return the metadata of a model, by its manifest and the report of its scores."""
    quantized = any(own.bits is not None for own in manifest.stages[-1].modules.values())
    verbs = {"prune": "pruned", "quantize": "quantized", "distill": "distilled"}
    done = [verbs[stage.verb] for stage in manifest.stages if stage.verb in verbs]
    hub = "/" in manifest.source.id
    results = [] if report is None else list(_results(report["scores"]))
    index = None
    if results:
        index = [Entry(name=manifest.source.id.split("/")[-1].split(":")[-1], results=results)]
    return Fields.model_validate(
        {
            "license": "apache-2.0" if manifest.source.id.startswith("builtin:") else None,
            "base_model": manifest.source.id if hub else None,
            "base_model_relation": ("quantized" if quantized else "finetune") if hub else None,
            "tags": list(dict.fromkeys(["unicomp", *done])),
            "model-index": index,
        }
    )


def _results(scores: Iterable[Mapping[str, Any]]) -> Iterable[Result]:
    """Yield a result for each data set, with its measured scores."""
    found: dict[tuple[str, str], list[Metric]] = {}
    for score in scores:
        if score["status"] != "measured":
            continue
        parts = score["name"].split("/")
        of_task = parts[0] == "accuracy" and len(parts) == 3
        key = (parts[1], parts[1]) if of_task else ("unicomp", f"{parts[0]} by unicomp")
        args: dict[str, float | list[float]] = {}
        for name in ("ci95", "n", "baseline"):
            if score.get(name) is not None:
                args[name] = score[name]
        metric = Metric(type=parts[-1], name=score["name"], value=score["value"], args=args)
        found.setdefault(key, []).append(metric)
    for (kind, name), metrics in found.items():
        yield Result(
            task=Task(type="text-generation"),
            dataset=Dataset(type=kind, name=name),
            metrics=metrics,
        )


def front(own: Fields) -> str:
    """Return the first lines of a card, `---` before and after."""
    data = own.model_dump(mode="json", by_alias=True, exclude_none=True)
    return f"---\n{emit(data)}---\n"


def check(path: Path) -> Fields:
    """Read the metadata of a card.

    Raises UnicompError if there is no card, or its first lines do not fit the schema.
    """
    if not path.is_file():
        raise UnicompError(
            f"`{path}` is absent: a model without a card is not published",
            hint="`unicomp run`, `quantize`, `prune` and `export` write it",
        )
    text = read_small(path, LIMIT).decode("utf-8", "replace")
    head, found, _ = text.removeprefix("---\n").partition("\n---\n")
    if not text.startswith("---\n") or not found:
        raise _bad(path, "it does not start with metadata between two lines of `---`")
    try:
        return Fields.model_validate(yaml.safe_load(head))
    except yaml.YAMLError as error:
        raise _bad(path, f"its metadata are no YAML: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise _bad(path, f"`{where}`: {first['msg'].lower()}") from error


def _bad(path: Path, why: str) -> UnicompError:
    return UnicompError(
        f"`{path}` is no model card: {why}", hint="mend it, or make the folder again"
    )

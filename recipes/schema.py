"""Recipe and its parts: what the user wrote, checked and frozen, every default visible.

A stage is flat in YAML (`quantize: gptq` and that method's options beside it) and three fields
here, so that a stage is checked in two steps: verb and method pick one class, then only that class
looks at the options. `load.py` makes recipes from text and says where text is wrong; the types
here refuse the same things from Python.
"""

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    Strict,
    model_validator,
)
from pydantic_core import PydanticCustomError

from unicomp import mixture, suggest
from unicomp.compress import methods
from unicomp.compress.method import Method
from unicomp.errors import UnicompError
from unicomp.recipes.emit import emit

VERSION: Final = 1
LOADERS = ("transformers", "vllm", "llama.cpp")
SEQ_LEN = 512
DEFAULT_FORMAT = "compressed-tensors"
TEXT_FILES = (".txt", ".jsonl", ".parquet")
HUB_TEXT = re.compile(r"hub:[^/:\s]+/[^/:\s]+(:[^/:\s]+)?(/[^/:\s]+)?")
BUILTIN = re.compile(r"builtin:[a-z0-9-]+")
TARGET = re.compile(r"(?P<name>[a-z][a-z0-9.-]*?)((==|!=|~=|<=|>=|<|>)(?P<version>\d+(\.\w+)*))?")
SCORE_NAME = re.compile(r"(?P<axis>[a-z]+|\*)/[^/\s]+(/[^/\s]+)*")

Axis = Literal["accuracy", "fidelity", "calibration", "safety", "efficiency"]
AXES: tuple[str, ...] = get_args(Axis)


def unknown(what: str, given: str, known: Iterable[str]) -> PydanticCustomError:
    """Return the error for a word that is none of those known; `load.py` suggests the nearest."""
    words = list(known)
    return PydanticCustomError(
        "unknown_word",
        "unknown {what} `{given}`; known: {listed}",
        {"what": what, "given": given, "listed": suggest.listed(words), "known": words},
    )


def _text(spec: str) -> str:
    for part in mixture.parse(spec):
        _one_text(part.data)
    return spec


def _one_text(spec: str) -> None:
    named = spec.startswith(("hub:", "builtin:"))
    if named and not (HUB_TEXT.fullmatch(spec) or BUILTIN.fullmatch(spec)):
        raise ValueError("input should read `builtin:NAME` or `hub:org/name[:config][/split]`")
    if not named and not spec.endswith(TEXT_FILES):
        raise ValueError(
            f"input should be a {', '.join(TEXT_FILES[:-1])} or {TEXT_FILES[-1]} file, "
            "`builtin:NAME` or `hub:org/name[:config][/split]`"
        )


def _format(name: str) -> str:
    from unicomp.kernels.format import formats

    if name not in formats():
        raise unknown("format", name, formats())
    return name


def _target(spec: str) -> str:
    found = TARGET.fullmatch(spec)
    if found is None:
        raise ValueError(
            "input should be a loader's name, or name and version such as `vllm==0.33`"
        )
    if found["name"] not in LOADERS:
        raise unknown("loader", found["name"], LOADERS)
    return spec


def _score_name(pattern: str) -> str:
    found = SCORE_NAME.fullmatch(pattern)
    if found is None:
        raise ValueError("input should be a score's name such as `accuracy/*/acc`")
    if found["axis"] not in (*AXES, "*"):
        raise unknown("axis", found["axis"], AXES)
    return pattern


def _distinct(words: tuple[str, ...]) -> tuple[str, ...]:
    for index, word in enumerate(words):
        if word in words[:index]:
            raise ValueError(f"`{word}` is given twice")
    return words


class Part(BaseModel):
    """A frozen part of a recipe that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )


class Calibration(Part):
    """The text that a method's statistics are gathered on."""

    data: Annotated[str, AfterValidator(_text)] = Field(
        description="a .txt, .jsonl or .parquet file, `builtin:NAME`, "
        "`hub:org/name[:config][/split]`, or a mix such as `builtin:tinyworld=0.5,task.jsonl=0.5`"
    )
    samples: int = Field(128, ge=1, le=1_000_000, description="windows of text")
    seq_len: int | None = Field(
        None,
        ge=2,
        le=1 << 20,
        description="tokens per window; default 512, or the model's context if shorter",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed that draws the windows")
    field: str = Field("text", min_length=1, description="field of each record that holds the text")

    @model_validator(mode="after")
    def _shared_out(self) -> Self:
        mixture.counts(mixture.parse(self.data), self.samples)
        return self

    def settled(self, context: int | None) -> Self:
        """Return it with its windows' length for a model of this context.

        Raises UnicompError if a longer one was asked for.
        """
        if self.seq_len is None:
            length = SEQ_LEN if context is None else min(SEQ_LEN, context)
            return self.model_copy(update={"seq_len": length})
        if context is not None and self.seq_len > context:
            raise UnicompError(
                f"seq_len {self.seq_len} is longer than the model's context of {context} tokens",
                hint=f"use `seq_len: {context}` or less",
            )
        return self

    @property
    def length(self) -> int:
        """The tokens of a window, once `settled`."""
        if self.seq_len is None:
            raise ValueError("the length of the windows is not settled")
        return self.seq_len


class Gate(Part):
    """Bounds that a score must keep; decided by the confidence bound, not by the point value."""

    score: Annotated[str, AfterValidator(_score_name)] = Field(
        description="name of the scores meant, with `*` for any part, such as `accuracy/*/acc`"
    )
    min: float | None = Field(None, description="least value, in the score's unit")
    max: float | None = Field(None, description="greatest value, in the score's unit")
    max_drop: float | None = Field(None, ge=0, description="greatest fall below the baseline")
    max_rise: float | None = Field(None, ge=0, description="greatest rise above the baseline")
    retention: float | None = Field(
        None, gt=0, le=1, description="least share of the baseline's value that is kept, 0 to 1"
    )
    confidence: float = Field(0.95, ge=0.5, lt=1, description="confidence of the bound")
    unmeasurable: Literal["skip", "inconclusive", "fail"] = Field(
        "inconclusive", description="what a score that cannot be measured counts as"
    )

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        bounds = (self.min, self.max, self.max_drop, self.max_rise, self.retention)
        if all(bound is None for bound in bounds):
            raise ValueError("give `min`, `max`, `max_drop`, `max_rise` or `retention`")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"`min` {self.min} is above `max` {self.max}")
        return self


class Stage(Part):
    """One step: what to do, by which method, with which options."""

    verb: str
    method: str
    options: SerializeAsAny[Method]

    @model_validator(mode="after")
    def _belongs(self) -> Self:
        found = methods.find(self.verb, self.method)
        if type(self.options) is not found:
            raise ValueError(
                f"`{self.verb}: {self.method}` takes `{found.__name__}`, "
                f"not `{type(self.options).__name__}`"
            )
        return self


class Head(Part):
    """Everything in a recipe but its stages."""

    version: int = Field(
        VERSION, ge=VERSION, le=VERSION, description="version of the recipe's layout"
    )
    model: str | None = Field(
        None,
        min_length=1,
        description="a folder, a Hub id `org/name[@revision]` or `builtin:NAME`; "
        "left out where the command line gives it",
    )
    calibration: Calibration | None = Field(None, description="text for methods that need it")
    format: Annotated[str, AfterValidator(_format)] = Field(
        DEFAULT_FORMAT, description="layout on disk"
    )
    target: Annotated[
        tuple[Annotated[str, AfterValidator(_target)], ...],
        Strict(False),
        AfterValidator(_distinct),
    ] = Field((), description="loaders that must take the result, such as `vllm==0.33`")
    score: Annotated[tuple[Axis, ...], Strict(False), AfterValidator(_distinct)] = Field(
        (), description="axes to score before and after"
    )
    gates: Annotated[tuple[Gate, ...], Strict(False)] = Field(
        (), description="bounds that decide whether the result may be pushed"
    )


class Recipe(Head):
    """A whole recipe."""

    stages: Annotated[tuple[Stage, ...], Strict(False)] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        for stage in self.stages:
            if stage.options.needs and self.calibration is None:
                raise ValueError(f"`{stage.verb}: {stage.method}` needs `calibration`")
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data in its YAML layout, every default visible."""
        data: dict[str, Any] = {"version": self.version}
        if self.model is not None:
            data["model"] = self.model
        if self.calibration is not None:
            data["calibration"] = _plain(self.calibration)
        data["stages"] = [
            {stage.verb: stage.method, **_plain(stage.options)} for stage in self.stages
        ]
        for name in ("format", "target", "score", "gates"):
            data[name] = _plain(getattr(self, name))
        return data

    def dump(self) -> str:
        """Return YAML text that loads back equal to this recipe."""
        return emit(self.to_dict())


def _plain(value: Any) -> Any:
    """Return the value in YAML's types; a field that is None by default and None is left out."""
    if isinstance(value, BaseModel):
        return {
            name: _plain(getattr(value, name))
            for name, field in type(value).model_fields.items()
            if not (field.default is None and getattr(value, name) is None)
        }
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(_plain(item) for item in value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, Enum) else value

"""Suites: named lists of tasks, each with its version, licence and the field it stands for.

`suites/*.yaml` are the shipped ones. Their layout is that of UniComp (arXiv:2602.09130): four
fields of performance (knowledge, reasoning, instruction following, multilingual) and six of
reliability (truthfulness, safety, fairness, robustness, privacy, ethics). What a suite leaves out
it says, with the reason.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel, ConfigDict, ValidationError

from unicomp import suggest
from unicomp.errors import UnicompError

FOLDER = Path(__file__).parent

Area = Literal[
    "knowledge",
    "reasoning",
    "reading",
    "grammar",
    "text",
    "chances",
    "instructions",
    "multilingual",
    "truthfulness",
    "safety",
    "fairness",
    "robustness",
    "privacy",
    "ethics",
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Entry(_Part):
    """One task of a suite.

    task     its name in our files or in lm-eval's
    version  that its file says; a test holds that the installed one says the same
    data     the data set, a Hub id or a file's name, and its licence as its authors state it
    shots    examples in the context; None: as the task has it
    chat     put prompts into the chat template, where the model has one
    """

    task: str
    area: Area
    version: str
    data: str
    licence: str
    shots: int | None = None
    chat: bool = False


class Suite(_Part):
    """A suite's file.

    text             to predict, as the contract's TEXT; None: the caller's
    harmful, benign  prompts for safety: files of `builtin.HELDOUT`; None: the caller's
    missing          area -> why no task stands for it
    """

    name: str
    about: str
    text: str | None = None
    harmful: str | None = None
    benign: str | None = None
    tasks: tuple[Entry, ...]
    missing: Mapping[Area, str] = {}


def names() -> list[str]:
    """Return the shipped suites, smallest first."""
    return ["quick", "standard", "full"]


def load(name: str) -> Suite:
    """Return a shipped suite.

    Raises UnicompError for any other name.
    """
    if name not in names():
        raise UnicompError(f"unknown suite: `{name}`", hint=suggest.hint(name, names()))
    return parse((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"), name)


def parse(text: str, name: str) -> Suite:
    """Return the suite that a file's text says; ValueError where it says none."""
    try:
        return Suite.model_validate({"name": name, **yaml.safe_load(text)})
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise ValueError(f"suite `{name}`: {error}") from error

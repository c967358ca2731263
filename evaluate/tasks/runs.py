"""Tasks run on a model and on its baseline; one that fails leaves the others.

A task is loaded once and given to both models, so that they answer the same documents with the
same examples in front. What is done is kept in a scratch folder (`scratch.py`) at once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from unicomp import machine
from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnicompError
from unicomp.evaluate.tasks import harness
from unicomp.evaluate.tasks.harness import Catalogue, Options
from unicomp.evaluate.tasks.result import Result
from unicomp.evaluate.tasks.scratch import Scratch

Progress = Callable[[str, int, int], None]
MEND = "mend the task, or leave it out"  # hint for one that failed


def versions() -> dict[str, str]:
    """Return the releases, beside the machine's, that a task's result depends on."""
    return {"lm_eval": metadata.version("lm_eval"), "datasets": metadata.version("datasets")}


@dataclass(frozen=True, slots=True)
class Wanted:
    """A task to run: its name or file, and how.

    metric  what it would have given, for the name of the score where it fails
    about   what the suite says of it
    """

    word: str
    shots: int | None = None
    chat: bool = False
    metric: str = "acc"
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What to call it: a file's name without its ending."""
        return Path(self.word).stem if "/" in self.word or "." in self.word else self.word


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a task: results of the model and of the baseline, or why there are none.

    error, hint  where there are none: why, and what the user can do
    """

    wanted: Wanted
    ours: list[Result] | None
    theirs: list[Result] | None
    error: str = ""
    hint: str = MEND


@dataclass
class Side:
    """A model in memory, and what decides its results.

    how  of the loading, for the key: compute, backend
    """

    folder: Path
    network: PreTrainedModel
    tokenizer: Any
    how: Mapping[str, Any]
    batch_size: int

    @cached_property
    def lm(self) -> Any:
        """The lm-eval model."""
        return harness.wrap(self.network, self.tokenizer, self.batch_size)

    @cached_property
    def key(self) -> list[Any]:
        """What decides its results, as JSON has it."""
        hashes = sorted(Checkpoint.open(self.folder).sha256().items())
        return [
            hashes,
            dict(self.how),
            str(self.network.dtype),
            self.batch_size,
            torch.get_num_threads(),
            sorted((machine.versions() | versions()).items()),
        ]


def check(wanted: Sequence[Wanted], catalogue: Catalogue) -> None:
    """Refuse tasks that there are not, before any work."""
    for one in wanted:
        catalogue.check(one.word)


def run(
    wanted: Sequence[Wanted],
    catalogue: Catalogue,
    model: Side,
    base: Side | None,
    options: Options,
    scratch: Scratch,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Run tasks, one after the other.

    options   for all of them; a task's own shots and template come first
    progress  called with what is being done, requests done and requests in all
    """
    found = []
    for one in wanted:
        own = replace(
            options,
            shots=options.shots if one.shots is None else one.shots,
            chat=(options.chat or one.chat) and model.tokenizer.chat_template is not None,
        )
        try:
            found.append(_one(one, catalogue, model, base, own, scratch, progress))
        except UnicompError as error:
            found.append(Outcome(one, None, None, error.message, error.hint or MEND))
        except Exception as error:  # a task's file is anybody's code
            text = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
            found.append(Outcome(one, None, None, reason))
    return found


def _one(
    wanted: Wanted,
    catalogue: Catalogue,
    model: Side,
    base: Side | None,
    options: Options,
    scratch: Scratch,
    progress: Progress | None,
) -> Outcome:
    with harness.seeded(options.seed):
        loaded = catalogue.load(wanted.word)
        task = harness.fingerprint(loaded, options)
    results: list[list[Result] | None] = []
    for side, who in ((model, ""), (base, ", baseline")):
        if side is None:
            results.append(None)
            continue
        key = [*side.key, wanted.word, task, asdict(options)]
        done = scratch.read(key)
        if done is None:
            label = wanted.name + who

            def tell(count: int, total: int, label: str = label) -> None:
                if progress is not None:
                    progress(label, count, total)

            with harness.seeded(options.seed):
                cache = scratch.requests(["requests", *key])
                done = harness.run(side.lm, loaded, options, tell, cache=cache)
            scratch.write(key, done)
        results.append(done)
    ours, theirs = results
    return Outcome(wanted, ours, theirs)

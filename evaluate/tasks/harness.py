"""lm-eval's tasks, run by lm-eval's own evaluator, with every document's result kept.

A task is what its file says and its figures are lm-eval's own, to the last digit: `evaluate` is
called as `lm_eval --tasks TASK` calls it, one task or group at a time, so that one that fails
leaves the others. Beside the figures come the documents' values, so that intervals and paired
differences are over documents, and the log-likelihoods of choices.

Our own task files (`tasks/`) are looked at first; lm-eval's several thousand are only read when a
name is not among ours.
"""

import contextlib
import json
import logging
import random
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluator, utils
from lm_eval.api import metrics as known
from lm_eval.api import model as requests
from lm_eval.api import task as tasks
from lm_eval.models import huggingface
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedModel

from unicomp import suggest
from unicomp.errors import UnicompError
from unicomp.evaluate.tasks import rows
from unicomp.evaluate.tasks.choices import Choices
from unicomp.evaluate.tasks.model import Unicomp
from unicomp.evaluate.tasks.result import Kind, Metric, Result

FOLDER = Path(__file__).parent
# Fields of the first row -> the file of `tasks/own` that such rows go with.
FORMS = {
    ("prompt", "choices", "answer"): "choices",
    ("good", "bad"): "pairs",
    ("prompt", "expected"): "answers",
    ("text",): "text",
}

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Options:
    """How tasks are run; lm-eval's words.

    limit  at most this many documents of a task, the first; None: all
    shots  examples in the context; None: as the task has it
    chat   put prompts into the model's chat template
    seed   of the examples and whatever a task draws
    """

    limit: int | None = None
    shots: int | None = None
    chat: bool = False
    seed: int = 1234


class Catalogue:
    """The tasks that there are."""

    @cached_property
    def ours(self) -> TaskManager:
        """Our own task files."""
        return TaskManager(include_path=str(FOLDER), include_defaults=False)

    @cached_property
    def all(self) -> TaskManager:
        """Ours and lm-eval's."""
        return TaskManager(include_path=str(FOLDER))

    def check(self, word: str) -> None:
        """Refuse a task that there is not, before any work.

        word  a name; or a file: a task's `.yaml`, or rows in one of `FORMS`

        Raises UnicompError with what was probably meant.
        """
        path = Path(word)
        if path.suffix in (".yaml", ".jsonl", ".txt"):
            if not path.is_file():
                raise UnicompError(f"no such file: `{word}`", hint="give a task's name or file")
            if path.suffix != ".yaml":
                form(path)
        elif word not in self.ours.all_tasks and word not in self.all.all_tasks:
            raise UnicompError(
                f"unknown task: `{word}`", hint=suggest.hint(word, self._suggestions(word))
            )

    def load(self, word: str) -> Any:
        """Return lm-eval's tasks and groups for a word that `check` passed; reads their data.

        Raises whatever a task's own functions raise, and what reading its data does.
        """
        with _quiet(None):
            return self._load(word)

    def _load(self, word: str) -> Any:
        path = Path(word)
        if path.suffix in (".jsonl", ".txt"):
            config = load_yaml(FOLDER / "own" / f"{form(path)}.yaml")
            return self.ours.load(
                [{**config, "task": path.stem, "dataset_kwargs": {"file": str(path)}}]
            )
        if path.suffix == ".yaml":
            return self.ours.load([str(path.absolute())])
        manager = self.ours if word in self.ours.all_tasks else self.all
        return manager.load([word])

    def _suggestions(self, word: str) -> list[str]:
        """Return names that share a beginning, ours first; of lm-eval's, only groups beside."""
        near = [name for name in self.all.all_tasks if name[:3] == word[:3]]
        return [*self.ours.all_tasks, *near]


def form(path: Path) -> str:
    """Return the file of `tasks/own` that goes with the rows of a file.

    Raises UnicompError if the first row has the fields of none.
    """
    first = rows.read(path)[0]
    for fields, name in FORMS.items():
        if all(field in first for field in fields):
            return name
    forms = "; ".join(" ".join(f"`{field}`" for field in fields) for fields in FORMS)
    raise UnicompError(
        f"`{path}`: rows with {suggest.listed(tuple(first))} are of no task that is known",
        hint=f"rows have {forms}",
    )


def run(
    lm: Any,
    loaded: Any,
    options: Options,
    progress: Progress | None = None,
    *,
    cache: Path | None = None,
) -> list[Result]:
    """Run tasks and groups, and return a result for each, groups last.

    lm        an lm-eval model
    loaded    of `Catalogue.load`
    progress  called with the requests done and the requests in all
    cache     a file of requests that this very model has answered, to read and to add to

    Raises whatever a task's own functions raise.
    """
    for task in loaded["tasks"].values():
        if options.shots is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=options.shots)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=options.seed)
    with _quiet(progress), _cached(lm, cache) as asked:
        found = evaluator.evaluate(
            asked,
            loaded,
            limit=options.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=options.chat,
            fewshot_as_multiturn=options.chat,
        )
    results = [
        _result(task, found["samples"][name], found) for name, task in loaded["tasks"].items()
    ]
    return results + [_group(group, results, found) for group in loaded.get("groups", {}).values()]


def wrap(network: PreTrainedModel, tokenizer: Any, batch_size: int) -> Unicomp:
    """Return a model that is in memory as lm-eval's `--model unicomp` has it."""
    with _quiet(None):
        return Unicomp(network, tokenizer, batch_size=batch_size)


def fingerprint(loaded: Any, options: Options) -> str:
    """Return a hash of what decides a result beside the model: files, documents and options.

    The documents are those that would be run, so that a changed file of rows is another task.
    """
    digest = sha256(json.dumps(asdict(options)).encode())
    for name, task in sorted(loaded["tasks"].items()):
        config = json.dumps([name, task.dump_config()], default=str, sort_keys=True)
        digest.update(config.encode())
        for _, document in task.doc_iterator(limit=options.limit):
            digest.update(json.dumps(document, default=str).encode())
    return digest.hexdigest()


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed what tasks draw from while they load and run, and put all of it back.

    seed  of numpy and torch; Python's own generator starts at 0, as lm-eval has it
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(0)
    np.random.seed(seed)
    utils.set_torch_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _result(task: Any, samples: Sequence[Mapping[str, Any]], found: Mapping[str, Any]) -> Result:
    """Gather one task from lm-eval's samples, which come filter by filter."""
    name = task.task_name
    filters = list(dict.fromkeys(sample["filter"] for sample in samples))
    first = sorted(
        (sample for sample in samples if sample["filter"] == filters[0]),
        key=lambda sample: int(sample["doc_id"]),
    )
    metrics = {}
    for metric in task.aggregation():
        for filter_ in filters:
            key = f"{metric},{filter_}"
            if key in found["results"][name]:
                own = [one[metric] for one in samples if one["filter"] == filter_]
                label = metric if len(filters) == 1 else key
                metrics[label] = _metric(task, metric, found["results"][name][key], own)
    generated = task.OUTPUT_TYPE == "generate_until"
    outputs = [str(sample["filtered_resps"][0]) for sample in first] if generated else None
    return Result(
        name=name,
        version=str(found["versions"].get(name)),
        shots=int(found["n-shot"].get(name) or 0),
        metrics=metrics,
        ids=tuple(_id(sample) for sample in first),
        choices=_choices(task, first) if task.OUTPUT_TYPE == "multiple_choice" else None,
        outputs=None if outputs is None else tuple(outputs),
        members={},
    )


def _id(sample: Mapping[str, Any]) -> str:
    return f"{sample['doc_id']}:{sample['doc_hash'][:12]}"


def _metric(task: Any, metric: str, value: float, own: Sequence[Any]) -> Metric:
    up = bool(task.higher_is_better().get(metric, True))
    aggregate = task.aggregation()[metric]
    kinds: dict[Any, Kind] = {
        known.mean: "mean",
        known.weighted_perplexity: "perplexity",
        known.bits_per_byte: "bits",
    }
    kind = kinds.get(aggregate, "other")
    if kind == "mean":
        return Metric(float(value), up, kind, tuple(float(one) for one in own))
    if kind == "other":
        return Metric(float(value), up, kind, ())
    values, weights = zip(*own, strict=True)
    return Metric(
        float(value), up, kind, tuple(map(float, values)), tuple(float(one) for one in weights)
    )


def _choices(task: Any, samples: Sequence[Mapping[str, Any]]) -> Choices:
    loglikelihoods, lengths, golds, right = [], [], [], []
    several = False
    for sample in samples:
        document = sample["doc"]
        words = task.doc_to_choice(document)
        # Mutual information asks for every choice once more, without context, after the others.
        values = [float(value) for value, _ in sample["filtered_resps"]][: len(words)]
        loglikelihoods.append(torch.tensor(values, dtype=torch.float64))
        lengths.append(torch.tensor([len(word.encode()) for word in words]))
        gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        all_ = [words.index(gold)] if isinstance(gold, str) else gold
        all_ = all_ if isinstance(all_, list) else [all_]
        known_true = document.get("mc2_targets") or {}
        labels = known_true.get("labels")
        # The same questions are asked with one true choice too.
        if labels is not None and list(known_true.get("choices", ())) == list(words):
            all_ = [at for at, label in enumerate(labels) if label == 1]
        several = several or len(all_) > 1
        golds.append(int(all_[0]))
        right.append(torch.tensor([at in all_ for at in range(len(words))]))
    return Choices(
        task.task_name,
        loglikelihoods,
        lengths,
        torch.tensor(golds),
        [_id(sample) for sample in samples],
        right if several else None,
        [_plain(sample["doc"]) for sample in samples],
    )


def _plain(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return a document as JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(document, default=str))
    return plain


def _group(group: Any, results: Sequence[Result], found: Mapping[str, Any]) -> Result:
    """Return a group's own figures, if it has any, and what each task weighs in them."""
    mine = {task.task_name for task in group.get_all_tasks()}
    inside = [result for result in results if result.name in mine]
    sizes = {result.name: len(result.ids) for result in inside}
    metrics, weights = {}, dict.fromkeys(sizes, 0.0)
    for wanted in group.aggregate_metric_list or []:
        name, by_size = wanted.metric, wanted.weight_by_size
        weights = {
            task: size / sum(sizes.values()) if by_size else 1 / len(sizes)
            for task, size in sizes.items()
        }
        for key, value in found["groups"].get(group.name, {}).items():
            label, _, filter_ = key.partition(",")
            if label == name and not isinstance(value, str):
                shown = label if filter_ == "none" else key
                ups = [
                    own.metrics[shown].higher_is_better for own in inside if shown in own.metrics
                ]
                metrics[shown] = Metric(float(value), all(ups), "mean", ())
    return Result(
        name=group.name,
        version=str(found["versions"].get(group.name)),
        shots=inside[0].shots,
        metrics=metrics,
        ids=(),
        choices=None,
        outputs=None,
        members=weights,
    )


@contextlib.contextmanager
def _cached(lm: Any, cache: Path | None) -> Iterator[Any]:
    """Give a model that reads what it has answered from a file; without one, the model itself.

    Where the file cannot be used, it goes on without.
    """
    if cache is None:
        yield lm
        return
    try:
        found = requests.CachingLM(lm, str(cache))
    except (OSError, sqlite3.Error, RuntimeError):
        yield lm
        return
    try:
        yield found
    finally:
        lm.set_cache_hook(requests.CacheHook(None))
        found.dbdict.close()


@contextlib.contextmanager
def _quiet(progress: Progress | None) -> Iterator[None]:
    """Let lm-eval say nothing but errors, and give its progress bars' counts to the caller."""
    log = logging.getLogger("lm_eval")
    level, other = log.level, logging.getLogger("transformers").level
    homes = (tasks, huggingface, requests)
    before = [home.tqdm for home in homes]

    def bar(items: Any = None, **options: Any) -> _Bar:
        return _Bar(items, progress, **options)

    log.setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for home in homes:
        home.tqdm = bar
    try:
        yield
    finally:
        log.setLevel(level)
        logging.getLogger("transformers").setLevel(other)
        for home, bars in zip(homes, before, strict=True):
            home.tqdm = bars


class _Bar:
    """Stands in for lm-eval's progress bars."""

    def __init__(
        self,
        items: Any,
        progress: Progress | None,
        *,
        total: int = 0,
        desc: str | None = None,
        **_: Any,
    ) -> None:
        self.items, self.progress, self.total, self.done = items, progress, total, 0
        self.counts = desc is not None and desc.startswith("Running")

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def update(self, count: int) -> None:
        """Count what is done."""
        self.done += count
        if self.progress is not None and self.counts:
            self.progress(self.done, self.total)

    def close(self) -> None:
        """Do nothing: there is no bar."""

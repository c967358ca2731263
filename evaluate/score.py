"""Model, baseline and axes in, one report out.

Everything that can be wrong with the words, the text, the tasks' names and the two tokenizers is
found before any weight is read. Model and baseline are then held in float32, with dequantized
weights, and read the same windows side by side (`windows/stream.py` says what that takes) and the
same tasks one after the other (`tasks/runs.py`). Asked for, the model's weights are left packed:
beside its own dequantized weights as the baseline, that is what kernels lose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unicomp import hub, machine, suggest, text
from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.evaluate import accuracy, calibration, efficiency, fidelity, safety
from unicomp.evaluate.cost import running
from unicomp.evaluate.dialogue import prompts
from unicomp.evaluate.scores import SCHEMA, Report, Score, Subject, missing
from unicomp.evaluate.suites import suite
from unicomp.evaluate.tasks import figures, scratch
from unicomp.evaluate.tasks.result import Result
from unicomp.evaluate.windows import stream
from unicomp.kernels import packed_model
from unicomp.kernels.blocked import Compute
from unicomp.kernels.linear import check_compute
from unicomp.kernels.load import load

AXES = ("accuracy", "fidelity", "calibration", "safety", "efficiency")
ALONE = ("accuracy", "fidelity", "efficiency")  # without a suite or tasks
LONGEST = 2048  # tokens of a window, unless asked for more
LOGITS = 1 << 28  # bytes of the logits of a batch of requests, unless one request has more
BATCH = 64
SEED = 1234  # of lm-eval's few-shot examples; its own default

Progress = Callable[[str, int, int], None]


def score(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    axes: Sequence[str] | None = None,
    suite: str | None = None,
    tasks: Sequence[str] = (),
    text: str | None = None,
    field: str = "text",
    seq_len: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    compute: Compute | None = None,
    batch_size: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    harmful: str | None = None,
    benign: str | None = None,
    power: float | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Score a model, and say how far it is from a baseline.

    model, baseline  a folder, a Hub id or `builtin:NAME`
    axes             of `AXES`; None: all with a suite or tasks, else `ALONE`
    suite            `quick`, `standard` or `full`
    tasks            names of ours or of lm-eval's, or files: a task's `.yaml`, or rows (`.jsonl`,
                     `.txt`)
    text             what to predict, as the contract's TEXT; None: the suite's, else
                     `builtin:tinyworld` where the model is a builtin
    field            of a record of that text
    seq_len          tokens of a window; None: the model's context, at most 2048
    limit            at most this many windows, drawn by `seed`, and the first so many documents of
                     a task; None: all
    bos              a BOS token before each window; None: where the tokenizer puts one by default
    compute          `int8` or `exact`: leave the model's weights packed, as `unicomp.load` does;
                     None: dequantize them. The baseline is always dequantized
    batch_size       requests of a task at once; None: as many as `LOGITS` allows, at most `BATCH`
    shots            examples in front of a task's question; None: as the task has it
    chat             put tasks' prompts into the chat template
    harmful, benign  prompts for safety: to refuse, and safe ones that look like them; a `.txt` or
                     `.jsonl` file each. None: the suite's
    power            watts that the machine takes while a model decodes, for an estimate of its
                     energy where no meter can be read
    resume           use what an interrupted score of the same things has kept
    progress         called with what is done, and how much of how much

    Raises UnicompError for anything the user can mend, before any weight is read where it can.
    """
    wanted_suite = None if suite is None else _suite(suite)
    if axes is None:
        axes = AXES if suite is not None or tasks else ALONE
    check_axes(axes)
    if compute is not None:
        check_compute(compute)
    if limit is not None and limit < 1:
        raise UnicompError(f"limit {limit} leaves nothing to score", hint="use 1 or more windows")
    runs = None if wanted_suite is None and not tasks else _Tasks(wanted_suite, tasks)
    asked = None if "safety" not in axes else _prompts(wanted_suite, harmful, benign, limit)
    source = hub.resolve(str(model))
    base = None if baseline is None else hub.resolve(str(baseline))
    models = _Models(source.folder, None if base is None else base.folder, compute)
    if text is None and wanted_suite is not None:
        text = wanted_suite.text
    if text is None and source.id.startswith(hub.BUILTIN):
        text = "builtin:tinyworld"
    found: list[Score] = []
    compare = base is not None and "fidelity" in axes
    if {"accuracy", "calibration"} & set(axes) or compare:
        if text is not None:
            ask = _Ask(text, field, seq_len, limit, seed, bos)
            found += _predictions(models, axes, ask, progress)
        elif runs is not None:
            found += _without_text(axes, compare)
        else:
            raise UnicompError(
                f"no text to score `{source.id}` on",
                hint="give one with `--text`, or `--axes efficiency`",
            )
    if "fidelity" in axes and not compare:
        found += fidelity.skipped("no baseline was given")
    if runs is not None and {"accuracy", "fidelity", "calibration"} & set(axes):
        options = {"limit": limit, "shots": shots, "chat": chat, "seed": SEED}
        found += runs.scores(models, axes, options, batch_size, resume, progress)
    elif "calibration" in axes:
        found += calibration.skipped("no tasks were asked for (`--suite`, `--tasks`)")
    if "safety" in axes:
        found += _safety(models, asked, progress)
    if "efficiency" in axes:
        found += efficiency.scores(source.folder, None if base is None else base.folder)
        if suite is not None or power is not None:
            found += _running(models, power, progress)
    if runs is not None:
        runs.finish()
    return Report(
        schema=SCHEMA,
        model=Subject(id=source.id, revision=source.revision),
        baseline=None if base is None else Subject(id=base.id, revision=base.revision),
        machine=machine.describe(),
        versions=machine.versions() | ({} if runs is None else runs.versions()),
        seeds={"windows": seed} | ({} if runs is None else {"tasks": SEED}),
        scores=sorted(found, key=lambda one: AXES.index(one.axis)),
    )


def check_axes(axes: Sequence[str]) -> None:
    """Refuse an axis that there is not, and an empty list."""
    for axis in axes:
        if axis not in AXES:
            raise UnicompError(f"unknown axis: `{axis}`", hint=suggest.hint(axis, AXES))
    if not axes:
        raise UnicompError("no axes to score", hint=f"use some of {suggest.listed(AXES)}")


_suite = suite.load  # `score` has an argument of that name


@dataclass(frozen=True, slots=True)
class _Ask:
    """What to predict, as the caller of `score` said it."""

    text: str
    field: str
    seq_len: int | None
    limit: int | None
    seed: int
    bos: bool | None


@dataclass
class _Models:
    """The model and the baseline, each loaded when it is first needed, and once."""

    folder: Path
    baseline: Path | None
    compute: Compute | None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model to score."""
        if self.compute is None:
            return load(self.folder, dtype=torch.float32)
        return packed_model.load(self.folder, compute=self.compute, dtype=torch.float32)

    @cached_property
    def base(self) -> PreTrainedModel | None:
        """The baseline, dequantized."""
        return None if self.baseline is None else load(self.baseline, dtype=torch.float32)

    @property
    def how(self) -> dict[str, Any]:
        """What to say of how the model computes; empty where its weights are dequantized."""
        if self.compute is None:
            return {}
        said = packed_model.loaded(self.model).to_json()
        return {key: said[key] for key in ("compute", "backend", "isa", "packed")}


class _Tasks:
    """The tasks of a suite and those asked for by name, checked when they are made.

    lm-eval is only imported here: it takes seconds.
    """

    def __init__(self, chosen: suite.Suite | None, words: Sequence[str]) -> None:
        from unicomp.evaluate.tasks import harness, runs

        self.runs = runs
        self.options = harness.Options
        self.scratch: scratch.Scratch | None = None
        self.catalogue = harness.Catalogue()
        entries = () if chosen is None else chosen.tasks
        self.wanted = [
            runs.Wanted(
                entry.task,
                entry.shots,
                entry.chat,
                about={
                    "suite": chosen.name if chosen is not None else None,
                    "area": entry.area,
                    "data": entry.data,
                    "licence": entry.licence,
                },
            )
            for entry in entries
        ]
        known = {one.word for one in self.wanted}
        more = [runs.Wanted(word) for word in dict.fromkeys(words) if word not in known]
        self.wanted += more
        # A suite's own tasks are held by a test; to look for all of them takes a while.
        runs.check(more, self.catalogue)

    def versions(self) -> dict[str, str]:
        """Return the releases that tasks depend on."""
        return self.runs.versions()

    def scores(
        self,
        models: _Models,
        axes: Sequence[str],
        options: Mapping[str, Any],
        batch_size: int | None,
        resume: bool,
        progress: Progress | None,
    ) -> list[Score]:
        """Run them and return what the axes ask for."""
        runs = self.runs
        size = batch_size or _batch(models.folder)
        ours = runs.Side(
            models.folder, models.model, text.tokenizer(models.folder), models.how, size
        )
        theirs = None
        if models.baseline is not None and models.base is not None:
            theirs = runs.Side(
                models.baseline, models.base, text.tokenizer(models.baseline), {}, size
            )
        kept = self.scratch = scratch.Scratch(scratch.folder(), resume=resume)
        outcomes = runs.run(
            self.wanted, self.catalogue, ours, theirs, self.options(**options), kept, progress
        )
        found: list[Score] = []
        detail = {"batch_size": size, "dtype": "float32", **models.how}
        if options["limit"] is not None:
            detail["limit"] = options["limit"]
        for outcome in outcomes:
            about = {**detail, **outcome.wanted.about}
            if "accuracy" in axes:
                if outcome.ours is None:
                    found.append(_failed(outcome.wanted, outcome.error or "", about))
                else:
                    found += figures.scores(outcome.ours, outcome.theirs, about)
        done = [own for outcome in outcomes for own in outcome.ours or ()]
        base = [own for outcome in outcomes for own in outcome.theirs or ()]
        compared = models.baseline is not None
        if "fidelity" in axes:
            found.append(figures.flips(done, base if compared else None))
        if "calibration" in axes:
            found += _calibration(done, base if compared else None)
        return found

    def finish(self) -> None:
        """Drop what was kept for a resumed score: this one came to its end."""
        if self.scratch is not None:
            self.scratch.clear()


def _failed(wanted: Any, reason: str, detail: Mapping[str, Any]) -> Score:
    """Return the score of a task that gave none."""
    name = f"accuracy/{wanted.name}/{wanted.metric}"
    score = missing(name, reason, unit="fraction", higher_is_better=True, status="unmeasurable")
    return score.model_copy(update={"detail": {**detail, **score.detail}})


def _calibration(ours: Sequence[Result], theirs: Sequence[Result] | None) -> list[Score]:
    """Return what the likelihoods of choices say of how sure a model is."""
    seen = calibration.of_choices(figures.questions(ours))
    if seen is None:
        found = calibration.skipped("no task that was run has choices, one of which is right")
    else:
        base = calibration.of_choices(figures.questions(theirs or ()))
        found = calibration.scores(seen, base)
    known = figures.known_chances(ours)
    if known is not None:
        truth = [torch.tensor(row["probabilities"]) for row in known.documents]
        base_known = figures.known_chances(theirs or ())
        found.append(calibration.chances(known, truth, base_known))
    return found


def _prompts(
    chosen: suite.Suite | None, harmful: str | None, benign: str | None, limit: int | None
) -> safety.Prompts | None:
    """Return the prompts for safety, None where there are none; both kinds or neither."""
    if (harmful is None) != (benign is None):
        raise UnicompError(
            "harmful and benign prompts are given together, or neither",
            hint="without the other kind, a model that refuses everything would look safe",
        )
    if harmful is None and chosen is not None and chosen.harmful and chosen.benign:
        harmful, benign = f"builtin:{chosen.harmful}", f"builtin:{chosen.benign}"
    if harmful is None or benign is None:
        return None
    files = {"harmful": Path(harmful).name, "benign": Path(benign).name}
    return safety.Prompts(
        prompts.read(harmful, limit=limit), prompts.read(benign, limit=limit), files
    )


def _safety(
    models: _Models, asked: safety.Prompts | None, progress: Progress | None
) -> list[Score]:
    if asked is None:
        return safety.skipped("no prompts were given (`--harmful`, `--benign`)")

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("answers", done, total)

    return safety.scores(
        models.model,
        text.tokenizer(models.folder),
        asked,
        baseline=models.base,
        progress=tell,
    )


def _running(models: _Models, power: float | None, progress: Progress | None) -> list[Score]:
    """Return what running takes, each model in a process of its own, as it is run: packed."""
    folders = [models.folder] if models.baseline is None else [models.folder, models.baseline]
    found: list[running.Run | str] = []
    for number, folder in enumerate(folders):
        if progress is not None:
            progress("speed", number, len(folders))
        try:
            found.append(running.measure(str(folder), compute=models.compute or "int8"))
        except UnicompError as error:
            found.append(error.message)
    if progress is not None:
        progress("speed", len(folders), len(folders))
    return running.scores(found[0], found[1] if len(found) > 1 else None, power=power)


def _batch(folder: Path) -> int:
    """Return how many requests' logits fit `LOGITS`, were each as long as the context."""
    config = Checkpoint.open(folder).config
    length = min(LONGEST, _context(config) or LONGEST)
    return max(1, min(BATCH, LOGITS // (length * _vocab(config, folder) * 4)))


def _without_text(axes: Sequence[str], compare: bool) -> list[Score]:
    """Return the scores of predicted text, without values."""
    reason, found = "no text was given (`--text`)", []
    if "accuracy" in axes:
        for name, unit in (("perplexity", "perplexity"), ("bits_per_byte", "bits/byte")):
            found.append(missing(f"accuracy/{name}", reason, unit=unit, higher_is_better=False))
    if compare:
        found += fidelity.skipped(reason)
    if "calibration" in axes:
        found += calibration.skipped(reason, place="tokens")
    return found


@dataclass(frozen=True, slots=True)
class _Windows:
    """The windows of a text, what the predicted part of each weighs, and what to say of them.

    ids         int64 [windows, seq_len]
    utf8_bytes  [windows], of the predicted tokens
    exact       whether the tokenizer could say the bytes of each token
    """

    ids: Tensor
    utf8_bytes: Tensor
    exact: bool
    vocab: int
    detail: Mapping[str, Any]


def _predictions(
    models: _Models, axes: Sequence[str], ask: _Ask, progress: Progress | None
) -> list[Score]:
    windows = _cut(models.folder, models.baseline, ask)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("windows", done, total)

    ours, theirs = calibration.TokenWatch(), calibration.TokenWatch()

    def watch(logits: Tensor, targets: Tensor, base: Tensor | None) -> None:
        ours.add(logits, targets)
        if base is not None:
            theirs.add(base, targets)

    sums = stream.sums(
        models.model,
        models.base,
        windows.ids,
        vocab=windows.vocab,
        watch=watch if "calibration" in axes else None,
        progress=tell,
    )
    detail = {**windows.detail, **models.how}
    found: list[Score] = []
    if "accuracy" in axes:
        found += accuracy.scores(sums, windows.utf8_bytes, detail, exact_bytes=windows.exact)
    if "fidelity" in axes and models.baseline is not None:
        found += fidelity.scores(sums, detail)
    if "calibration" in axes:
        base = theirs.seen(detail) if theirs.parts else None
        found += calibration.scores(ours.seen(detail), base, place="tokens")
    return found


def _cut(folder: Path, baseline: Path | None, ask: _Ask) -> _Windows:
    """Read, tokenize and cut the text, and check that the baseline would do the same."""
    config = Checkpoint.open(folder).config
    vocab = _vocab(config, folder)
    tokenizer = text.tokenizer(folder)
    found = text.read(ask.text, field=ask.field, tokenizer=tokenizer, purpose="score")
    ids = text.encode(tokenizer, found, vocab=vocab)
    bos = _bos(tokenizer, ask.bos)
    contexts = [_context(config)]
    if baseline is not None:
        theirs = Checkpoint.open(baseline).config
        contexts.append(_context(theirs))
        other = text.tokenizer(baseline)
        same = torch.equal(ids, text.encode(other, found, vocab=_vocab(theirs, baseline)))
        if not same or _bos(other, ask.bos) != bos:
            raise UnsupportedError(
                f"model and baseline cut `{found.source}` into different tokens",
                hint="give the model that this one was made from as `--baseline`",
            )
    seq_len = _seq_len(ask.seq_len, contexts)
    fresh = seq_len if bos is None else seq_len - 1
    whole = ids.numel() // max(1, fresh)
    samples = None if ask.limit is None or ask.limit >= whole else ask.limit
    name = f"text `{found.source}`"

    def cut(values: Tensor, first: int | None) -> Tensor:
        return text.windows(
            values, seq_len=seq_len, samples=samples, seed=ask.seed, bos=first, source=name
        )

    windows = cut(ids, bos)
    weights = text.token_bytes(tokenizer, found)
    if weights is None:
        total = sum(len(document.encode()) for document in found.documents)
        utf8_bytes = torch.full((len(windows),), (seq_len - 1) * total / ids.numel())
    else:
        utf8_bytes = cut(weights, None if bos is None else 0)[:, 1:].sum(1)
    detail = {
        "text": found.source,
        "sha256": found.sha256,
        "seq_len": seq_len,
        "windows": len(windows),
        "tokens": windows[:, 1:].numel(),
        "bos": bos is not None,
    }
    return _Windows(windows, utf8_bytes, weights is not None, vocab, detail)


def _seq_len(asked: int | None, contexts: Sequence[int | None]) -> int:
    context = min((length for length in contexts if length is not None), default=None)
    if asked is None:
        return LONGEST if context is None else min(LONGEST, context)
    if context is not None and asked > context:
        raise UnicompError(
            f"seq_len {asked} is longer than the model's context of {context} tokens",
            hint=f"use a seq_len of at most {context}",
        )
    return asked


def _bos(tokenizer: Any, wanted: bool | None) -> int | None:
    if wanted is None:
        return text.bos_token(tokenizer)
    if not wanted:
        return None
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        raise UnicompError("the tokenizer has no BOS token", hint="use `--no-bos`")
    return bos


def _config(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these fields that is a number, looking into a text model's part too."""
    for part in (config, config.get("text_config") or {}):
        for name in names:
            if isinstance(part.get(name), int):
                return int(part[name])
    return None


def _context(config: Mapping[str, Any]) -> int | None:
    return _config(config, "max_position_embeddings", "n_positions")


def _vocab(config: Mapping[str, Any], folder: Path) -> int:
    vocab = _config(config, "vocab_size")
    if vocab is None:
        raise UnsupportedError(
            f"`{folder / 'config.json'}` has no `vocab_size`",
            hint="only causal language models can be scored on text",
        )
    return vocab

"""Model, baseline and axes in, one report out.

Everything that can be wrong with the words, the text, the tasks' names and the two tokenizers is
found before any weight is read. Model and baseline are then held in float32, with dequantized
weights, and read the same windows side by side (`windows/stream.py` says what that takes) and the
same tasks one after the other (`tasks/runs.py`). Asked for, the model's weights are left packed:
beside its own dequantized weights as the baseline, that is what kernels lose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicomp import hub, machine, text
from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnicompError
from unicomp.evaluate import accuracy, bias, calibration, efficiency, fidelity, safety
from unicomp.evaluate.asked import AXES, How, What
from unicomp.evaluate.cost import running
from unicomp.evaluate.dialogue import prompts
from unicomp.evaluate.dialogue.judge import Judge
from unicomp.evaluate.models import Models
from unicomp.evaluate.scores import SCHEMA, Report, Score, Subject, missing
from unicomp.evaluate.suites import suite
from unicomp.evaluate.tasks import figures, scratch
from unicomp.evaluate.tasks.result import Result
from unicomp.evaluate.windows import drift, stream
from unicomp.evaluate.windows.cut import LONGEST, Ask, context, cut, vocab_of
from unicomp.kernels.linear import check_compute

SAFE = ("safety", "truthfulness", "fairness")  # areas of a suite that the safety axis needs
LOGITS = 1 << 28  # bytes of the logits of a batch of requests, unless one request has more
BATCH = 64
SEED = 1234  # of lm-eval's few-shot examples; its own default

Progress = Callable[[str, int, int], None]


def score(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    progress: Progress | None = None,
    **words: Any,
) -> Report:
    """Score a model, and say how far it is from a baseline.

    model, baseline  a folder, a Hub id or `builtin:NAME`
    progress         called with what is done, and how much of how much
    words            fields of `What` and of `How`, as the command has them

    Raises UnicompError for anything the user can mend, before any weight is read where it can, and
    TypeError for a word that neither of the two has.
    """
    how = {own.name: words.pop(own.name) for own in fields(How) if own.name in words}
    return measure(model, baseline, What(**words), How(**how), progress)


def measure(
    model: str | Path,
    baseline: str | Path | None,
    what: What,
    how: How,
    progress: Progress | None = None,
) -> Report:
    """Do what `score` does, with its words in two groups."""
    wanted = None if what.suite is None else suite.load(what.suite)
    axes, limit = what.all_axes(), what.limit
    if how.compute is not None:
        check_compute(how.compute)
    runs = None if wanted is None and not what.tasks else _Tasks(wanted, what.tasks)
    asked = None if "safety" not in axes else _prompts(wanted, what)
    told = None if what.judge is None or asked is None else Judge(what.judge)
    source = hub.resolve(str(model))
    base = None if baseline is None else hub.resolve(str(baseline))
    models = Models(source.folder, None if base is None else base.folder, how.compute)
    if asked is not None and base is not None:
        tokenizers = text.tokenizer(source.folder), text.tokenizer(base.folder)
        safety.check_same_words(*tokenizers, asked)
    kept = scratch.Scratch(scratch.folder(), resume=how.resume)
    read = what.text
    if read is None and wanted is not None:
        read = wanted.text
    if read is None and source.id.startswith(hub.BUILTIN):
        read = "builtin:tinyworld"
    found: list[Score] = []
    compare = base is not None and "fidelity" in axes
    if {"accuracy", "calibration"} & set(axes) or compare:
        if read is not None:
            ask = Ask(read, what.field, what.seq_len, limit, what.seed, what.bos)
            found += _predictions(models, axes, ask, what.by, progress)
        elif runs is not None:
            found += _without_text(axes, compare)
        else:
            raise UnicompError(
                f"no text to score `{source.id}` on",
                hint="give one with `--text`, or `--axes efficiency`",
            )
    if "fidelity" in axes and not compare:
        found += fidelity.skipped("no baseline was given")
    if runs is not None and set(axes) != {"efficiency"}:
        found += runs.scores(models, axes, limit, how, kept, progress)
    elif "calibration" in axes:
        found += calibration.skipped("no tasks were asked for (`--suite`, `--tasks`)")
    if "safety" in axes:
        found += _safety(models, asked, told, kept, progress)
        found += [] if runs is not None else bias.scores([], None)
    if "efficiency" in axes:
        found += efficiency.scores(source.folder, None if base is None else base.folder)
        if wanted is not None or how.power is not None:
            found += _running(models, how.power, progress)
    kept.clear()  # this score came to its end
    return Report(
        schema=SCHEMA,
        model=Subject(id=source.id, revision=source.revision),
        baseline=None if base is None else Subject(id=base.id, revision=base.revision),
        machine=machine.describe(),
        versions=machine.versions() | ({} if runs is None else runs.versions()),
        seeds={"windows": what.seed} | ({} if runs is None else {"tasks": SEED}),
        scores=sorted(found, key=lambda one: AXES.index(one.axis)),
    )


class _Tasks:
    """The tasks of a suite and those asked for by name, checked when they are made.

    lm-eval is only imported here: it takes seconds.
    """

    def __init__(self, chosen: suite.Suite | None, words: Sequence[str]) -> None:
        from unicomp.evaluate.tasks import harness, runs

        self.runs = runs
        self.options = harness.Options
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
        models: Models,
        axes: Sequence[str],
        limit: int | None,
        how: How,
        kept: scratch.Scratch,
        progress: Progress | None,
    ) -> list[Score]:
        """Run them and return what the axes ask for."""
        runs = self.runs
        size = how.batch_size or _batch(models.folder)
        ours = runs.Side(
            models.folder, models.model, text.tokenizer(models.folder), models.how, size
        )
        theirs = None
        if models.baseline is not None and models.base is not None:
            theirs = runs.Side(
                models.baseline, models.base, text.tokenizer(models.baseline), {}, size
            )
        wanted = self.wanted
        if not {"accuracy", "fidelity", "calibration"} & set(axes):
            # A suite's other tasks say nothing of safety; one asked for by name may.
            wanted = [own for own in wanted if own.about.get("area", "safety") in SAFE]
        options = self.options(limit=limit, shots=how.shots, chat=how.chat, seed=SEED)
        outcomes = runs.run(wanted, self.catalogue, ours, theirs, options, kept, progress)
        found: list[Score] = []
        detail = {"batch_size": size, "dtype": "float32", **models.how}
        if limit is not None:
            detail["limit"] = limit
        for outcome in outcomes:
            about = {**detail, **outcome.wanted.about}
            if "accuracy" in axes:
                if outcome.ours is None:
                    found.append(_failed(outcome, about))
                else:
                    found += figures.scores(outcome.ours, outcome.theirs, about)
        done = [own for outcome in outcomes for own in outcome.ours or ()]
        base = [own for outcome in outcomes for own in outcome.theirs or ()]
        compared = models.baseline is not None
        if "fidelity" in axes:
            found.append(figures.flips(done, base if compared else None))
        if "calibration" in axes:
            found += _calibration(done, base if compared else None)
        if "safety" in axes:
            found += bias.scores(done, base if compared else None)
        return found


def _failed(outcome: Any, detail: Mapping[str, Any]) -> Score:
    """Return the score of a task that gave none."""
    score = missing(
        f"accuracy/{outcome.wanted.name}/{outcome.wanted.metric}",
        outcome.error,
        unit="fraction",
        higher_is_better=True,
        status="unmeasurable",
        hint=outcome.hint,
    )
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


def _prompts(chosen: suite.Suite | None, what: What) -> safety.Prompts | None:
    """Return the prompts for safety, None where there are none; both kinds or neither."""
    harmful, benign = what.harmful, what.benign
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
        prompts.read(harmful, limit=what.limit), prompts.read(benign, limit=what.limit), files
    )


def _safety(
    models: Models,
    asked: safety.Prompts | None,
    judge: Judge | None,
    kept: scratch.Scratch,
    progress: Progress | None,
) -> list[Score]:
    if asked is None:
        return safety.skipped("no prompts were given (`--harmful`, `--benign`)")

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("answers", done, total)

    def remember(who: str, ask: Callable[[], safety.Heard]) -> safety.Heard:
        folder = models.baseline if who == "baseline" else models.folder
        key = [
            "answers",
            sorted(Checkpoint.open(folder or models.folder).sha256().items()),
            {} if who == "baseline" else models.how,
            [asked.harmful, asked.benign],
            [torch.get_num_threads(), sorted(machine.versions().items())],
        ]
        found = kept.read_json(key)
        if isinstance(found, Mapping) and set(found) == {"harmful", "benign", "prefilled"}:
            return safety.Heard(**found)
        heard = ask()
        kept.write_json(key, asdict(heard))
        return heard

    try:
        return safety.scores(
            models.model,
            text.tokenizer(models.folder),
            asked,
            baseline=models.base,
            judge=judge,
            remember=remember,
            progress=tell,
        )
    except UnicompError as error:  # what is done of the other axes stays
        return safety.unmeasurable(error.message, error.hint)


def _running(models: Models, power: float | None, progress: Progress | None) -> list[Score]:
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
    length = min(LONGEST, context(config) or LONGEST)
    return max(1, min(BATCH, LOGITS // (length * vocab_of(config, folder) * 4)))


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


def _predictions(
    models: Models,
    axes: Sequence[str],
    ask: Ask,
    by: Sequence[str],
    progress: Progress | None,
) -> list[Score]:
    windows = cut(models.folder, models.baseline, ask)

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress("windows", done, total)

    ours, theirs = calibration.TokenWatch(), calibration.TokenWatch()
    compare = "fidelity" in axes and models.baseline is not None
    positions = drift.Positions() if compare and "position" in by else None
    layers = drift.Layers() if compare and "layer" in by else None
    sure = "calibration" in axes

    def watch(logits: Tensor, targets: Tensor, base: Tensor | None) -> None:
        if sure:
            ours.add(logits, targets)
        if base is not None:
            if sure:
                theirs.add(base, targets)
            if positions is not None:
                positions.add(logits, base)

    sums = stream.sums(
        models.model,
        models.base,
        windows.ids,
        vocab=windows.vocab,
        watch=watch if sure or positions is not None else None,
        states=None if layers is None else layers.add,
        progress=tell,
    )
    detail = {**windows.detail, **models.how}
    found: list[Score] = []
    if "accuracy" in axes:
        found += accuracy.scores(sums, windows.utf8_bytes, detail, exact_bytes=windows.exact)
    if compare:
        moved = fidelity.scores(sums, detail)
        found += moved if positions is None else fidelity.by_position(moved, positions)
        if layers is not None:
            found.append(fidelity.by_layer(layers, detail))
    if "calibration" in axes:
        base = theirs.seen(detail) if theirs.parts else None
        found += calibration.scores(ours.seen(detail), base, place="tokens")
    return found

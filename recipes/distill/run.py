"""Plan of distillation -> output folder: the teacher is asked or stored, the student trained.

The working folder holds checkpoints and the log, so that the same command goes on where it was
stopped and ends in the same bytes. Held-out figures are measured before and after, a temperature is
fitted at the end, and all of it goes into the manifest; the log and a plot of the loss lie beside
the weights.
"""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicomp import builtin, machine, manifest, text
from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill.losses.safety import safety_tokens
from unicomp.compress.distill.training import checkpoints
from unicomp.compress.distill.training.adapters import attach
from unicomp.compress.distill.training.by_layer import (
    LayerOutcome,
    begun,
    finished,
    take_up,
    train_layers,
)
from unicomp.compress.distill.training.figures import WARN_GAP, Figures, Temperature
from unicomp.compress.distill.training.gradient_filter import gradient_norms, usual
from unicomp.compress.distill.training.measure import measure, temperature
from unicomp.compress.distill.training.student import open_student
from unicomp.compress.distill.training.teacher import (
    NAME,
    LiveTeacher,
    StoredTeacher,
    Teacher,
    identity,
    store,
)
from unicomp.compress.distill.training.together import check_launch, tell
from unicomp.compress.distill.training.trainer import LOG, Job, Outcome, Step, steps_of, train
from unicomp.compress.distill.training.windows import (
    Windows,
    answers,
    packed,
    refuse_held_out,
    split,
    unpacked,
)
from unicomp.errors import CheckpointError, UnicompError, UnsupportedError
from unicomp.kernels.dense import open_dense
from unicomp.kernels.load import load
from unicomp.manifest import Manifest
from unicomp.recipes.distill.loss_plot import loss_plot
from unicomp.recipes.distill.plan import DistillPlan
from unicomp.recipes.stage.journal import FOLDER as JOURNAL
from unicomp.recipes.stage.journal import Journal
from unicomp.recipes.stage.prepare import (
    begin,
    check_values,
    check_whole,
    fingerprint,
    workplace,
    write_beside,
)
from unicomp.recipes.stage.progress import Progress, Show
from unicomp.text import Text
from unicomp.writer import Writer, copy_file, write_file

HELD_SHARE, HELD_MOST = 10, 64  # one window of ten is held out, at most so many
PLOT = "loss.svg"


@dataclass(frozen=True, slots=True)
class Data:
    """What is trained on and what is measured on."""

    training: Windows
    held_out: Windows


@dataclass(frozen=True, slots=True)
class _Work:
    """What the parts of a run share.

    hashes, taught  file -> sha256, of the student and of its teacher
    began           `time.monotonic()` at the start
    """

    plan: DistillPlan
    folder: Path
    journal: Journal
    data: Data
    hashes: Mapping[str, str]
    taught: Mapping[str, str]
    show: Show
    began: float


def run_distill(
    plan: DistillPlan,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: Show = lambda _: None,
) -> Manifest:
    """Carry out a plan as `run` does; the folder has no scores and no card yet.

    Raises UnicompError for whatever the user can mend; before the first checkpoint of the training
    nothing is then left behind.
    """
    check_launch()
    folder = begin(out, plan.notes, overwrite=overwrite, progress=progress)
    progress(Progress("prepare", 0, 0, "hashing the student and the teacher"))
    hashes = plan.checkpoint.sha256()
    taught = Checkpoint.open(plan.teacher.folder).sha256()
    data = read_data(plan)
    steps_of(plan.method, len(data.training), plan.seq_len)
    mark = fingerprint(plan, hashes, None) | {
        "teacher": repr(sorted(taught.items())),
        "data": [data.training.digest, data.held_out.digest],
    }
    with workplace(plan, folder, out, mark, overwrite=overwrite, resume=resume) as place:
        if not place.journal.entries:
            check_values(plan)
            _check_teacher(plan)
            place.journal.append({"checked": True})
        place.begun = True  # who interrupts it from here on goes on with what is known
        try:
            return _carry_out(
                _Work(plan, folder, place.journal, data, hashes, taught, progress, time.monotonic())
            )
        except Exception:
            place.begun = checkpoints.kept(folder / JOURNAL) or begun(folder / JOURNAL)
            raise


def _check_teacher(plan: DistillPlan) -> None:
    """Refuse a teacher whose weights hold NaN or Inf: the student would learn nothing else."""
    problem = next(manifest.wrong_values(Checkpoint.open(plan.teacher.folder)), None)
    if problem is not None:
        raise CheckpointError(
            f"teacher `{plan.teacher.id}`: {problem}",
            hint="download it again, or learn from an earlier checkpoint",
        )


def train_beside(plan: DistillPlan, folder: Path, rows: list[int] | None) -> None:
    """Take part in a training that the first process leads; nothing is written.

    plan    as the first process has it, on the same source
    folder  where its checkpoints are
    rows    windows that are trained on; None: all
    """
    check_launch()
    data = read_data(plan)
    taught = Checkpoint.open(plan.teacher.folder).sha256() if plan.method.cache_teacher else {}
    teacher, width = _teacher(plan, data, taught, lambda _: None)
    job = _job(plan, data, teacher, width, folder)
    train(job if rows is None else _filtered(job, torch.tensor(rows)))


def read_data(plan: DistillPlan) -> Data:
    """Return the windows to train on and those to measure on.

    Raises UnicompError where a text is missing, too short, or stands in both.
    """
    method = plan.method
    spec = method.data
    name = method.field
    if spec is None and plan.recipe.calibration is not None:
        spec, name = plan.recipe.calibration.data, plan.recipe.calibration.field
    if spec is None:
        raise UnicompError("there is no text to train on", hint="give `--data TEXT`")
    tokenizer = text.tokenizer(plan.source.folder)
    _check_tokenizer(tokenizer, plan)
    vocab = int(plan.dense.config.get("vocab_size") or 1 << 62)
    found = text.read(spec, field=name, tokenizer=tokenizer)
    training = _windows(plan, tokenizer, found, spec, name, vocab)
    for other in builtin.HELDOUT:
        file = str(builtin.heldout(other))
        if file.endswith(".txt"):
            refuse_held_out(found, text.read(file))
        elif found.sha256 == hashlib.sha256(builtin.heldout(other).read_bytes()).hexdigest():
            raise UnicompError(
                f"the training text `{spec}` is the held-out file `{other}`",
                hint="train on another text: scores read this one",
            )
    held = method.held_out
    if held is None and spec == "builtin:tinyworld":
        held = "builtin:tinyworld"
    if held is not None:
        apart = text.read(held, field=name, tokenizer=tokenizer, purpose="score")
        refuse_held_out(found, apart)
        windows = packed(tokenizer, apart, vocab=vocab, seq_len=plan.seq_len)
        return Data(training, windows.part(_first(windows, HELD_MOST)))
    count = min(HELD_MOST, len(training) // HELD_SHARE)
    if count < 2:
        raise UnicompError(
            f"the training text `{found.source}` has {len(training)} windows of {plan.seq_len} "
            "tokens: too few to hold some out",
            hint="give a longer text, a shorter `seq_len`, or another text as `held_out`",
        )
    return Data(*split(training, count))


def _first(windows: Windows, most: int) -> Tensor:
    return torch.arange(min(most, len(windows)))


def _windows(
    plan: DistillPlan, tokenizer: Any, found: Text, spec: str, name: str, vocab: int
) -> Windows:
    method = plan.method
    if method.answers_only:
        return answers(
            tokenizer,
            text.conversations(spec, field=name),
            source=found.source,
            sha256=found.sha256,
            vocab=vocab,
            seq_len=plan.seq_len,
        )
    make = packed if method.packed else unpacked
    return make(tokenizer, found, vocab=vocab, seq_len=plan.seq_len)


def _check_tokenizer(tokenizer: Any, plan: DistillPlan) -> None:
    """Refuse a student whose tokens mean something else than its teacher's."""
    other = text.tokenizer(plan.teacher.folder)
    own, taught = tokenizer.get_vocab(), other.get_vocab()
    if own == taught:
        return
    apart = [word for word, number in own.items() if taught.get(word) != number]
    raise UnsupportedError(
        f"student `{plan.source.id}` and teacher `{plan.teacher.id}` have different tokenizers: "
        f"{max(len(apart), 1)} tokens have another number or none, as `{(apart or ['?'])[0]}`",
        hint="distil from a teacher with the student's own tokenizer",
    )


def _carry_out(work: _Work) -> Manifest:
    plan, journal, data, progress = work.plan, work.journal, work.data, work.show
    method = plan.method
    if method.layer_steps and not finished(plan.checkpoint, journal.folder):
        _train_layers(work)
    teacher, width = _teacher(plan, data, work.taught, progress)
    known = next((entry["before"] for entry in journal.entries if "before" in entry), None)
    if known is None:
        progress(Progress("measure", 0, 0, "held-out text, before training"))
        start = load(plan.source.folder)
        known = measure(start, data.held_out, teacher, method.micro_batch).to_json()
        del start
        journal.append({"before": known})
    before = Figures.from_json(known)
    job = _job(plan, data, teacher, width, journal.folder)
    student, rows = job.student, None
    if method.filter_gradients:
        progress(Progress("prepare", 0, 0, "measuring the gradient of each window"))
        stays = usual(gradient_norms(job))
        left = len(data.training) - len(stays)
        filtered = f"{left} of {len(data.training)} windows had a gradient far above the median"
        job, rows = _filtered(job, stays), stays.tolist()
    folders = {"source": plan.source.folder, "folder": journal.folder}
    placed = {name: str(path.resolve()) for name, path in folders.items()}
    tell({"plan": plan.sha256, "rows": rows, **placed})
    outcome = train(job, progress=lambda step: progress(_shown(step)))
    progress(Progress("measure", 0, 0, "held-out text, after training"))
    after = measure(student.model, data.held_out, teacher, method.micro_batch)
    heat = temperature(student.model, data.held_out, method.micro_batch)
    notes = [*plan.notes, *_layered(job, outcome), *warnings(before, after)]
    if method.filter_gradients:
        notes.append(f"{filtered}, and were left out")
    for note in notes:
        progress(Progress("measure", 0, 0, "", note=note))
    writer = Writer(work.folder, plan.layout())
    for name, tensor in student.tensors():
        writer.write(name, tensor)
    writer.finish()
    return _finish(work, outcome, (before, after), heat, notes)


def _train_layers(work: _Work) -> None:
    plan = work.plan

    def step(layer: LayerOutcome, total: int) -> None:
        words = f"layer {layer.layer}: error {layer.before:.4f} -> {layer.after:.4f}"
        work.show(Progress("layers", layer.layer + 1, total, words))

    train_layers(
        plan.method,
        plan.checkpoint,
        open_dense(Checkpoint.open(plan.teacher.folder)),
        work.data.training,
        work.journal.folder,
        progress=step,
    )


def _layered(job: Job, outcome: Outcome) -> list[str]:
    """Return what is to be said of the layers that were trained before."""
    if not job.layers:
        return []
    before, after = (
        sum(getattr(layer, word) for layer in job.layers) / len(job.layers)
        for word in ("before", "after")
    )
    kl = outcome.measured[0][1].kl
    return [
        f"layer by layer the mean error fell from {before:.4f} to {after:.4f}; held-out KL was "
        f"then {kl:.4f}"
    ]


def _job(plan: DistillPlan, data: Data, teacher: Teacher, width: int | None, folder: Path) -> Job:
    """Read the student and say what is to be done with it."""
    method = plan.method
    original = open_dense(Checkpoint.open(plan.teacher.folder))
    student = open_student(
        plan.checkpoint,
        scales=method.scales,
        teacher=original if method.shadow == "teacher" else None,
    )
    if method.lora_rank is not None:
        student = attach(student, rank=method.lora_rank, alpha=method.lora_alpha, seed=method.seed)
    tokens = safety_tokens(text.tokenizer(plan.source.folder)) if method.safety else None
    layers = tuple(take_up(student, folder)) if method.layer_steps else ()
    return Job(
        method, student, teacher, width, data.training, data.held_out, folder, tokens, layers
    )


def _filtered(job: Job, rows: Tensor) -> Job:
    return replace(job, training=job.training.part(rows))


def figures_of(plan: DistillPlan, folder: Path, progress: Show) -> dict[str, float]:
    """Return the held-out figures of a model, on the windows that a stage's training measures.

    plan    the stage, whose source is there: what is read of it is its tokenizer
    folder  the model, as any other stage of the recipe left it

    Raises UnicompError as `read_data` does.
    """
    data = read_data(plan)
    taught = Checkpoint.open(plan.teacher.folder).sha256() if plan.method.cache_teacher else {}
    teacher, _ = _teacher(plan, data, taught, progress)
    progress(Progress("measure", 0, 0, "held-out text, beside that of the training"))
    return _plain(measure(load(folder), data.held_out, teacher, plan.method.micro_batch))


def _teacher(
    plan: DistillPlan, data: Data, taught: Mapping[str, str], progress: Show
) -> tuple[Teacher, int | None]:
    """Return the teacher, and the width of its states where they can be compared.

    taught  file -> sha256 of the teacher, which tell whether stored answers are its own
    """
    method = plan.method
    if method.cache_teacher is None:
        progress(Progress("prepare", 0, 0, "loading the teacher"))
        live = load(plan.teacher.folder)
        live.requires_grad_(False)
        return LiveTeacher(live), int(live.config.get_text_config().hidden_size)
    cache = Path(method.cache_teacher).expanduser()
    made_of = identity(
        taught,
        data.training,
        data.held_out,
        temperature=method.temperature,
        top_k=method.top_k,
    )
    if not (cache / NAME).is_file():
        asked = load(plan.teacher.folder)
        both = {"training": data.training, "held_out": data.held_out}

        def step(done: int, total: int) -> None:
            progress(Progress("teacher", done, total, "storing what it says"))

        store(cache, asked, both, made_of, batch=method.micro_batch, progress=step)
    return StoredTeacher(cache, made_of), None


def _shown(step: Step) -> Progress:
    words = f"loss {step.loss:.4f}"
    if step.figures is not None:
        found = step.figures
        words += f"  held out: KL {found.kl:.4f}, NLL {found.nll:.4f}, gap {found.gap:+.3f}"
    return Progress(
        "train",
        step.step,
        step.steps or 0,
        words,
        tokens_per_s=step.tokens_per_s,
        seconds_left=step.seconds_left,
    )


def warnings(before: Figures, after: Figures) -> list[str]:
    """Return what the figures warn of: a student that is surer than it is right."""
    found = []
    if after.gap > WARN_GAP:
        found.append(
            f"the student is over-confident: on held-out text it is {after.confidence:.1%} sure "
            f"and {after.accuracy:.1%} right; before training the gap was {before.gap:+.1%}"
        )
    if after.nll > before.nll and after.kl >= before.kl:
        found.append("training did not help: held-out likelihood and KL are worse than before")
    return found


def _finish(
    work: _Work,
    outcome: Outcome,
    figures: tuple[Figures, Figures],
    heat: Temperature | None,
    notes: list[str],
) -> Manifest:
    """Write everything beside the weights; the caller adds scores and card."""
    plan, folder, data = work.plan, work.folder, work.data
    before, after = figures
    write_beside(plan, folder, plan.checkpoint.config)
    copy_file(work.journal.folder / LOG, folder / LOG)
    write_file(folder / PLOT, loss_plot(outcome.losses, outcome.measured).encode())
    first = manifest.read(plan.source.folder) if _has_manifest(plan.source.folder) else None
    modules = {} if first is None or not first.stages else first.stages[-1].modules
    made = Manifest(
        source=manifest.Source(
            id=plan.source.id, revision=plan.source.revision, sha256=dict(work.hashes)
        ),
        recipe_sha256=fingerprint(plan, dict(work.hashes), None)["recipe"],
        calibration=None,
        stages=[
            manifest.Stage(
                verb=plan.stage.verb,
                method=plan.stage.method,
                options=plan.method.model_dump(mode="json"),
                seconds=time.monotonic() - work.began,
                peak_rss_bytes=machine.peak_rss_bytes(),
                peak_gpu_bytes=None,
                modules={name: _trained(module) for name, module in modules.items()},
                training=manifest.Training(
                    teacher=manifest.Source(
                        id=plan.teacher.id, revision=plan.teacher.revision, sha256=dict(work.taught)
                    ),
                    data=data.training.source,
                    data_sha256=data.training.sha256,
                    held_out=data.held_out.source,
                    held_out_sha256=data.held_out.sha256,
                    seq_len=plan.seq_len,
                    steps=outcome.steps,
                    tokens=outcome.tokens,
                    stopped=outcome.stopped,
                    before=_plain(before),
                    after=_plain(after),
                    temperature=None if heat is None else _plain(heat),
                ),
            )
        ],
        totals=manifest.Totals(
            params=plan.params,
            bytes_in=plan.bytes_in,
            bytes_out=plan.bytes_out,
            bits_per_weight=8 * plan.bytes_out / plan.params,
        ),
        files=manifest.hashes(folder),
        versions=machine.versions(),
        machine=machine.describe(),
        seeds={"distill": plan.method.seed},
        notes=notes,
    )
    manifest.write(folder, made)
    check_whole(folder)
    return made


def _has_manifest(folder: Path) -> bool:
    return (folder / manifest.NAME).is_file()


def _trained(module: manifest.Module) -> manifest.Module:
    """Return a linear's report without the errors that training has made stale."""
    stale = ("error_before", "error_after", "error_predicted", "damp", "clip_fraction")
    return module.model_copy(update=dict.fromkeys(stale) | {"sparsity": module.sparsity})


def _plain(found: Figures | Temperature) -> dict[str, float]:
    return {name: float(v) for name, v in found.to_json().items() if math.isfinite(v)}

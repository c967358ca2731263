"""The training loop: AdamW, a warm-up and a cosine, checkpoints that resume bit for bit.

One process or several that `accelerate launch` starts; each batch is the same set of windows
whatever their number, and its gradient the same mean. The first process measures, writes and
decides. All that a step depends on is its number, the checkpointed state and the seed. A loss that
is no number stops the run, in all processes, before the weights take it.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor

from unicomp.compress.distill.training import checkpoints
from unicomp.compress.distill.training.by_layer import LayerOutcome
from unicomp.compress.distill.training.figures import Figures
from unicomp.compress.distill.training.measure import measure
from unicomp.compress.distill.training.objective import Trainee, objective
from unicomp.compress.distill.training.samples import chosen, prompts, write
from unicomp.compress.distill.training.schedule import BETAS, groups, rate_at
from unicomp.compress.distill.training.straight_through import set_share
from unicomp.compress.distill.training.student import Student
from unicomp.compress.distill.training.teacher import Teacher
from unicomp.compress.distill.training.together import agreed, company, of_all
from unicomp.compress.distill.training.windows import Windows, batches
from unicomp.compress.distill_method import DistillMethod
from unicomp.errors import UnicompError

LOG = "training.jsonl"
BEST = "best.pt"
PATIENCE = 3  # measurements without a better figure, before an early stop
ENDLESS = 1 << 40
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


@dataclass(frozen=True, slots=True)
class Job:
    """What is trained, by whom, on what.

    width   of the teacher's hidden states; None where it is not known, as of a stored teacher
    tokens  int64, those that refusals begin with, where `safety` weighs them
    folder  for checkpoints and the log
    layers  what came of a stage of layers before this one
    """

    method: DistillMethod
    student: Student
    teacher: Teacher
    width: int | None
    training: Windows
    held_out: Windows
    folder: Path
    tokens: Tensor | None = None
    layers: tuple[LayerOutcome, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """How far a training is, for whoever shows it; figures where they were just measured."""

    step: int
    steps: int | None
    loss: float
    tokens_per_s: float
    seconds_left: float | None
    figures: Figures | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a training.

    stopped  why it ended: `max_steps`, `max_tokens`, `max_time`, `passes`, or `early_stop`
    losses   (step, loss), the mean per position
    """

    steps: int
    tokens: int
    seconds: float
    stopped: str
    losses: list[tuple[int, float]]
    measured: list[tuple[int, Figures]]


@dataclass(frozen=True, slots=True)
class _Part:
    """Windows of a step that are computed together.

    rows     their numbers, int64 [windows]
    ids      int64 [windows, tokens]; `counted` bool [windows, tokens - 1]
    beta     of the divergence, where the student wrote them; None: they are of the text
    """

    rows: Tensor
    ids: Tensor
    counted: Tensor
    beta: float | None = None


@dataclass(slots=True)
class _State:
    """What changes while a training goes on, beside weights and optimizer."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf
    best_step: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)


def steps_of(method: DistillMethod, windows: int, seq_len: int) -> tuple[int, str]:
    """Return how many steps a training has at most, and which option says so.

    Raises UnicompError where the text does not fill one batch.
    """
    if windows < method.batch:
        raise UnicompError(
            f"the training text has {windows} windows of {seq_len} tokens, but `batch` is "
            f"{method.batch}",
            hint=f"give a longer text, `batch: {max(windows, 1)}` or less, or a shorter `seq_len`",
        )
    found = []
    if method.max_steps is not None:
        found.append((method.max_steps, "max_steps"))
    if method.max_tokens is not None:
        found.append((max(1, method.max_tokens // (method.batch * seq_len)), "max_tokens"))
    if not found and method.max_time is None:
        found.append((method.passes * (windows // method.batch), "passes"))
    return min(found, default=(ENDLESS, "max_time"))


def train(job: Job, *, progress: Callable[[Step], None] = lambda _: None) -> Outcome:
    """Train a student in place, going on from the last checkpoint in the folder.

    Raises UnicompError for a loss that is no number, for too few windows, and out of memory.
    """
    with company(), _enough_memory(job.method):
        return _Trainer(job, progress).run()


class _Trainer:
    def __init__(self, job: Job, progress: Callable[[Step], None]) -> None:
        self.job, self.method, self.progress = job, job.method, progress
        seq_len = job.training.ids.shape[1]
        self.steps, self.reason = steps_of(self.method, len(job.training), seq_len)
        self.accelerator = Accelerator(
            cpu=True,
            mixed_precision="no",  # by `precision`, whatever the launcher was told
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
        ranks = self.accelerator.num_processes
        if self.method.batch < ranks:
            raise UnicompError(
                f"`batch` {self.method.batch} is less than a window for each of {ranks} processes",
                hint=f"use `batch: {ranks}` or more",
            )
        if self.method.gradient_checkpointing:
            model = job.student.model  # the name that transformers had before 5.23 is going away
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        trainee = Trainee(job.student.model, self.method, job.width)
        self.maps = trainee.maps
        self.parameters = [own for own in trainee.parameters() if own.requires_grad]
        optimizer = torch.optim.AdamW(
            groups(self.parameters, self.method.weight_decay),
            lr=self.method.highest_rate,
            betas=BETAS,
        )
        self.trainee, self.optimizer = self.accelerator.prepare(trainee, optimizer)
        self.state = _State()
        self._restore()

    def run(self) -> Outcome:
        """Go on to the end."""
        state, method = self.state, self.method
        if self.job.layers and not state.step and self.accelerator.is_main_process:
            self._held_out()
        began = time.monotonic() - state.seconds
        first, since, reason = state.step, time.monotonic(), self.reason
        size, seed = method.batch, method.seed
        for step, rows in batches(len(self.job.training), size, seed, state.step):
            share = self._share(step, state.seconds)
            if share >= 1:
                reason = "max_time" if step < self.steps else reason
                break
            loss = self._step(step, rows, share)
            state.step = step + 1
            state.seconds = time.monotonic() - began
            state.tokens += rows.numel() * self.job.training.ids.shape[1]
            measured = state.step % method.measure_every == 0
            figures = self._measure() if measured and self.accelerator.is_main_process else None
            spent = time.monotonic() - since
            self.progress(
                Step(
                    state.step,
                    None if self.steps == ENDLESS else self.steps,
                    loss,
                    (state.step - first) * size * self.job.training.ids.shape[1] / spent,
                    self._left(spent, state.step - first),
                    figures,
                )
            )
            if state.step % method.checkpoint_every == 0:
                self._save()
            if measured and self._stale():
                reason = "early_stop"
                break
        self._best()
        set_share(self.job.student.model, 1.0)
        self.job.student.settle()
        lines = state.lines
        return Outcome(
            state.step,
            state.tokens,
            state.seconds,
            reason,
            [(line["step"], line["loss"]) for line in lines if "loss" in line],
            [
                (line["step"], Figures.from_json(line["held_out"]))
                for line in lines
                if "held_out" in line
            ],
        )

    def _share(self, step: int, seconds: float) -> float:
        """Return how much of the training is over before a step, from 0 on."""
        share = step / self.steps if self.steps else 1.0
        if self.method.max_time is not None:
            spent = torch.tensor(seconds, dtype=torch.float64)
            if self.accelerator.num_processes > 1:
                spent = self.accelerator.reduce(spent, "mean")
            share = max(share, float(spent) / self.method.max_time)
        return share

    def _left(self, spent: float, done: int) -> float | None:
        each = spent / done
        left = [each * (self.steps - self.state.step)] if self.steps < ENDLESS else []
        if self.method.max_time is not None:
            left.append(max(0.0, self.method.max_time - self.state.seconds))
        return min(left, default=None)

    def _step(self, step: int, rows: Tensor, share: float) -> float:
        """Take one step; return the loss per position."""
        method, accelerator = self.method, self.accelerator
        rate = rate_at(method, share, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if method.gradual:
            set_share(self.job.student.model, min(1.0, share / method.gradual))
        parts, windows = self._parts(step, rows)
        counts = torch.zeros(2, dtype=torch.float64)  # positions of the text, and of its own
        for part in parts:
            counts[int(part.beta is not None)] += int(part.counted.sum())
        counts = self._over_all(counts)
        positions = max(1, int(counts.sum()))
        sums = torch.zeros(3, dtype=torch.float64)  # the loss, and both divergences
        wrong: list[int] = []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self.trainee):
                signal = self.job.teacher.training(part.rows, part.ids, states=self._states())
                with self._precision():
                    loss = objective(
                        method,
                        self.trainee,
                        signal,
                        part.ids,
                        part.counted,
                        positions=positions,
                        windows=windows,
                        maps=self.maps,
                        tokens=self.job.tokens,
                        beta=part.beta,
                    )
                value = float(loss.total.detach())
                if not math.isfinite(value):
                    wrong += part.rows.tolist()
                accelerator.backward(loss.total * accelerator.num_processes)
                sums[0] += value
                sums[1 + (part.beta is not None)] += loss.divergence
        sums = self._over_all(sums)
        if not math.isfinite(sums[0]):
            raise self._no_number(step, of_all(wrong), float(sums[0]))
        norm = float(accelerator.clip_grad_norm_(self.parameters, method.clip))
        if not math.isfinite(norm):
            raise self._no_number(step, rows.tolist(), norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._log(
            {
                "step": step + 1,
                "loss": float(sums[0]),
                "divergence": float(sums[1:].sum()) / positions,
                "rate": rate,
                "norm": norm,
            }
            | self._written(counts, sums)
        )
        return float(sums[0])

    def _parts(self, step: int, rows: Tensor) -> tuple[list[_Part], int]:
        """Return this process's windows of a step, and how many of all are of the text."""
        sampling, size = self.method.sampling(), self.method.micro_batch
        batch = self.job.training.part(rows)
        own = torch.zeros(len(rows), dtype=torch.bool)
        if sampling is not None:
            own = chosen(step, len(rows), share=sampling.share, seed=self.method.seed)
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        order = torch.cat([(~own).nonzero()[:, 0], own.nonzero()[:, 0]])[index::count]
        parts = [
            _Part(rows[some], batch.ids[some], batch.counted[some])
            for some in order[~own[order]].split(size)
            if len(some)
        ]
        for some in order[own[order]].split(size):
            if sampling is None or not len(some):
                continue
            given = prompts(
                batch.counted[some], share=sampling.prompt, answers=self.method.answers_only
            )
            with self._precision():
                ids, written = write(
                    self.job.student.model,
                    batch.ids[some],
                    given,
                    rows=rows[some].tolist(),
                    step=step,
                    seed=self.method.seed,
                )
            parts.append(_Part(rows[some], ids, written, sampling.beta))
        return parts, int((~own).sum())

    def _written(self, counts: Tensor, sums: Tensor) -> dict[str, Any]:
        """Return what the log says of the text that the student wrote."""
        if self.method.sampling() is None:
            return {}
        each = float(sums[2] / counts[1]) if counts[1] else None
        return {"written_tokens": int(counts[1]), "written_divergence": each}

    def _over_all(self, sums: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.accelerator.num_processes == 1:
            return sums
        found: Tensor = self.accelerator.reduce(sums, "sum")
        return found

    def _states(self) -> tuple[str, ...]:
        return tuple(w for w in ("hidden", "attention") if getattr(self.method, w))

    def _precision(self) -> Any:
        half = self.method.precision == "bf16"
        return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()

    def _no_number(self, step: int, rows: list[int], value: float) -> UnicompError:
        found = checkpoints.latest(self.job.folder / checkpoints.FOLDER)
        kept = f"the checkpoint of step {found['step']} is kept" if found else "none was kept"
        return UnicompError(
            f"step {step + 1}: the loss is {value} on windows {rows} of "
            f"`{self.job.training.source}`; {kept}",
            hint="lower `rate` or `clip`, or look at these windows, and start over with `--fresh`",
        )

    def _measure(self) -> Figures:
        figures = self._held_out()
        if self.method.early_stop != "none":
            value = getattr(figures, self.method.early_stop)
            if value < self.state.best:
                self.state.best, self.state.best_step = value, self.state.step
                torch.save(self._weights(), self.job.folder / BEST)
        return figures

    def _held_out(self) -> Figures:
        model = self.job.student.model
        set_share(model, 1.0)
        figures = measure(model, self.job.held_out, self.job.teacher, self.method.micro_batch)
        self._log({"step": self.state.step, "held_out": figures.to_json()})
        return figures

    def _stale(self) -> bool:
        """Tell whether the figure that decides was best some measurements ago."""
        if self.method.early_stop == "none":
            return False
        late = self.state.step - self.state.best_step >= PATIENCE * self.method.measure_every
        return bool(agreed(late))

    def _best(self) -> None:
        """Take the weights back under which the figure that decides was best; the first writes."""
        if (
            self.accelerator.is_main_process
            and self.method.early_stop != "none"
            and self.state.best_step
        ):
            self._put(torch.load(self.job.folder / BEST, weights_only=True))

    def _log(self, line: dict[str, Any]) -> None:
        self.state.lines.append(line)
        if self.accelerator.is_main_process:
            with (self.job.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _weights(self) -> list[Tensor]:
        return [own.detach().clone() for own in self.parameters]

    @torch.no_grad()
    def _put(self, weights: list[Tensor]) -> None:
        for own, value in zip(self.parameters, weights, strict=True):
            own.copy_(value)

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        state = self.state
        checkpoints.save(
            self.job.folder / checkpoints.FOLDER,
            state.step,
            {
                "step": state.step,
                "tokens": state.tokens,
                "seconds": state.seconds,
                "best": state.best,
                "best_step": state.best_step,
                "lines": len(state.lines),
                "weights": self._weights(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
            },
        )

    def _restore(self) -> None:
        """Take up the last checkpoint, and cut off what the log says of later steps."""
        self.job.folder.mkdir(parents=True, exist_ok=True)
        found = checkpoints.latest(self.job.folder / checkpoints.FOLDER)
        log = self.job.folder / LOG
        if found is None:
            if self.accelerator.is_main_process:
                log.write_text("", "utf-8")
            for layer in self.job.layers:
                self._log(layer.to_json())
            return
        self._put(found["weights"])
        self.optimizer.load_state_dict(found["optimizer"])
        torch.set_rng_state(found["random"])
        lines = log.read_text("utf-8").splitlines()[: found["lines"]]
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            log.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        names = ("step", "tokens", "seconds", "best", "best_step")
        self.state = _State(
            **{name: found[name] for name in names}, lines=[json.loads(line) for line in lines]
        )


@contextmanager
def _enough_memory(method: DistillMethod) -> Iterator[None]:
    """Say what to lower where memory does not suffice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).lower()
        if not isinstance(error, MemoryError) and not any(word in said for word in NO_MEMORY):
            raise
        raise UnicompError(
            f"out of memory with `micro_batch` {method.micro_batch}",
            hint="lower `micro_batch` or `seq_len`, set `gradient_checkpointing`, or give "
            "`cache_teacher` a folder so that the teacher is not in memory",
        ) from error

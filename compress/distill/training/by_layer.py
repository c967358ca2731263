"""Each layer of a quantized student learns to give what the teacher's gives, before all learn.

Layer after layer, from the first: the student's own layers before it make its input, the teacher's
make what is wanted of its output, and the mean squared difference falls. So what rounding broke is
mended where it broke, and each layer also learns to take back what those before it left. One layer
of each model is in memory at a time; the states of all windows lie in two files that the operating
system caches. A layer that is finished is a file of its parameters: an interrupted run goes on with
the layer that it was at, from that layer's beginning, and makes the same bits.

Papers: block-wise training of all parameters before an end-to-end stage, EfficientQAT,
arXiv:2407.11062, section 3.2; through a straight-through estimator as in `straight_through.py`.
Differs: what is wanted is the teacher's stream, not the layer's own output before rounding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from unicomp.checkpoint import Checkpoint
from unicomp.compress.calibrate import Decoder
from unicomp.compress.distill.training.schedule import BETAS, groups, rate_at
from unicomp.compress.distill.training.straight_through import attach, quantizers
from unicomp.compress.distill.training.student import (
    Student,
    keep_zeros,
    layout_of,
    shadowed,
)
from unicomp.compress.distill.training.windows import Windows, batches
from unicomp.compress.distill_method import DistillMethod
from unicomp.errors import UnicompError
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.models import Layer, describe

FOLDER = "layers"  # inside the folder of a training
JUDGED = 32  # windows by which a layer is judged before and after


@dataclass(frozen=True, slots=True)
class LayerOutcome:
    """What came of one layer.

    before, after  squared difference from the teacher's output, as a share of its mean square, over
                   the first windows of those that were trained on
    """

    layer: int
    steps: int
    before: float
    after: float

    def to_json(self) -> dict[str, float | int]:
        """Return it as a line of the log."""
        return {
            "layer": self.layer,
            "steps": self.steps,
            "error_before": self.before,
            "error_after": self.after,
        }


def train_layers(
    method: DistillMethod,
    checkpoint: Checkpoint,
    teacher: DenseSource,
    windows: Windows,
    folder: Path,
    *,
    progress: Callable[[LayerOutcome, int], None] = lambda _, __: None,
) -> list[LayerOutcome]:
    """Train the layers of a student, one after the other, going on after those that are finished.

    method    its `layer_steps` for each layer, with the options of any training
    folder    of the training: a file for each layer, and the states while this runs
    progress  called with each finished layer and how many there are

    Raises UnicompError for an error that is no number.
    """
    return _Layers(method, checkpoint, teacher, windows, folder).run(progress)


def finished(student: Checkpoint, folder: Path) -> bool:
    """Tell whether every layer of a student has been trained."""
    source = open_dense(student)
    layers = describe(source.config, source.tensors).layers
    return all(_file(folder, layer.index).is_file() for layer in layers)


def begun(folder: Path) -> bool:
    """Tell whether any layer has."""
    return any((folder / FOLDER).glob("*.pt"))


def take_up(student: Student, folder: Path) -> list[LayerOutcome]:
    """Put what the layers learnt into a whole student; nothing where no layer was trained."""
    model = describe(student.source.config, student.source.tensors)
    found = []
    for layer in model.layers:
        path = _file(folder, layer.index)
        if path.is_file():
            held = torch.load(path, weights_only=True)
            place = f"{model.architecture.layers}.{layer.index}"
            student.model.get_submodule(place).load_state_dict(held["parameters"])
            found.append(LayerOutcome(**held["outcome"]))
    return found


class _Layers:
    def __init__(
        self,
        method: DistillMethod,
        checkpoint: Checkpoint,
        teacher: DenseSource,
        windows: Windows,
        folder: Path,
    ) -> None:
        self.method, self.folder = method, folder / FOLDER
        self.source = open_dense(checkpoint, dtype="F32")
        self.layout = layout_of(self.source)
        self.teacher = teacher
        self.shadows = teacher if method.shadow == "teacher" else None
        order = islice(batches(len(windows), method.batch, method.seed, 0), method.layer_steps)
        taken = [rows for _, rows in order]
        # Places of the windows among those that are used at all.
        used, places = torch.cat(taken).unique(return_inverse=True)
        self.steps = list(places.split(method.batch))
        self.ids = windows.ids[used]
        self.ends = _ends(windows.counted[used])
        self.models = {"student": self._decoder(self.source), "teacher": self._decoder(teacher)}
        self.states: dict[str, Tensor] = {}

    def _decoder(self, source: DenseSource) -> Decoder:
        model = describe(source.config, source.tensors)
        return Decoder(model, source.config, source, batch=self.method.micro_batch, scratch=None)

    def run(self, progress: Callable[[LayerOutcome, int], None]) -> list[LayerOutcome]:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, decoder in self.models.items():
            self._embed(name, decoder)
        found = []
        layers = self.models["student"].model.layers
        for layer, other in zip(layers, self.models["teacher"].model.layers, strict=True):
            found.append(self._layer(layer, other))
            progress(found[-1], len(layers))
        for name in self.models:
            del self.states[name]
            (self.folder / f"{name}.bin").unlink()
        return found

    def _embed(self, name: str, decoder: Decoder) -> None:
        """Write the first layer's inputs; a batch of every size that steps have is met."""
        rest = len(self.steps[0]) % decoder.batch
        if rest:
            for _ in decoder.embed(self.ids[:rest]):
                pass
        path, start = self.folder / f"{name}.bin", 0
        for part in decoder.embed(self.ids):
            if not start:
                shape = (len(self.ids), *part.shape[1:])
                path.unlink(missing_ok=True)
                flat = torch.from_file(str(path), shared=True, size=math.prod(shape))
                self.states[name] = flat.view(shape)
            self.states[name][start : start + len(part)] = part
            start += len(part)

    def _layer(self, layer: Layer, other: Layer) -> LayerOutcome:
        """Train one layer, and let all windows through it and the teacher's."""
        decoder, teacher = self.models["student"], self.models["teacher"]
        wanted = teacher.load(other)
        self._through("teacher", lambda part: teacher.forward(wanted, other, part))
        teacher.release(other)
        module = decoder.load(layer)
        self._prepare(module, layer)
        path = _file(self.folder.parent, layer.index)
        if path.is_file():
            held = torch.load(path, weights_only=True)
            module.load_state_dict(held["parameters"])
            outcome = LayerOutcome(**held["outcome"])
        else:
            before = self._error(module, layer)
            self._train(module, layer)
            _rest(module)
            outcome = LayerOutcome(layer.index, len(self.steps), before, self._error(module, layer))
            state = {"parameters": module.state_dict(), "outcome": _fields(outcome)}
            fresh = path.with_suffix(".new")
            torch.save(state, fresh)
            fresh.replace(path)
        self._through("student", lambda part: decoder.forward(module, layer, part))
        for inner in quantizers(module):
            parametrize.remove_parametrizations(
                module.get_submodule(inner), "weight", leave_parametrized=False
            )
        decoder.release(layer)
        return outcome

    def _prepare(self, module: nn.Module, layer: Layer) -> None:
        """Let what is packed be rounded in each step, zeros of what is pruned stay, all learn."""
        module.requires_grad_(True)
        for linear in layer.linears():
            place = module.get_submodule(linear.inner)
            if f"{linear.module}.weight" in self.source.readers:
                attach(
                    place,
                    *shadowed(
                        self.source, self.layout, linear.module, self.method.scales, self.shadows
                    ),
                )
            elif isinstance(place, nn.Linear | Conv1D) and isinstance(place.weight, nn.Parameter):
                keep_zeros(place.weight)

    def _train(self, module: nn.Module, layer: Layer) -> None:
        method = self.method
        parameters = [own for own in module.parameters() if own.requires_grad]
        optimizer = torch.optim.AdamW(
            groups(parameters, method.weight_decay), lr=method.highest_rate, betas=BETAS
        )
        for step, places in enumerate(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = rate_at(method, step / len(self.steps), len(self.steps))
            total = 0.0
            for some in places.split(method.micro_batch):
                loss = self._apart(module, layer, some).sum() / len(places)
                loss.backward()
                total += float(loss.detach())
            norm = float(nn.utils.clip_grad_norm_(parameters, method.clip))
            if not math.isfinite(total) or not math.isfinite(norm):
                raise UnicompError(
                    f"layer {layer.index}, step {step + 1}: the error is {total}",
                    hint="lower `rate` or `clip`, and start over with `--fresh`",
                )
            optimizer.step()
            optimizer.zero_grad()

    def _apart(self, module: nn.Module, layer: Layer, places: Tensor) -> Tensor:
        """Return the error of some windows, float [windows]: a mean over their positions."""
        wanted, given = self.states["teacher"][places], self.states["student"][places]
        half = self.method.precision == "bf16"
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            found = self.models["student"].call(module, layer, given)
        inside = (torch.arange(wanted.shape[1]) < self.ends[places][:, None]).float()
        each = (found.float() - wanted).square().mean(-1)
        size = (wanted.square().mean(-1) * inside).sum(-1)
        return (each * inside).sum(-1) / size.clamp_min(torch.finfo(torch.float32).tiny)

    @torch.no_grad()
    def _error(self, module: nn.Module, layer: Layer) -> float:
        count = min(JUDGED, len(self.ids))
        parts = torch.arange(count).split(self.method.micro_batch)
        total = sum(float(self._apart(module, layer, part).double().sum()) for part in parts)
        return total / count

    def _through(self, name: str, layer: Callable[[Tensor], Tensor]) -> None:
        """Replace the states of all windows by what a layer makes of them."""
        for part in self.states[name].split(self.method.micro_batch):
            part.copy_(layer(part))


@torch.no_grad()
def _rest(module: nn.Module) -> None:
    """Put every shadow at the value of its code.

    A weight that stays half way between two codes flips with each step of the next stage: 40 steps
    of it on the embedded model's ternary weights then ended at a KL of 0.146, from rest at 0.095.
    Scales that follow from the weights themselves would change with them, so these stay.
    """
    for quantized, shadow in quantizers(module).values():
        if quantized.scales == "learned":
            shadow.copy_(quantized.packed(shadow).dequantize())


def _fields(outcome: LayerOutcome) -> dict[str, Any]:
    return {name: getattr(outcome, name) for name in outcome.__slots__}


def _file(folder: Path, layer: int) -> Path:
    return folder / FOLDER / f"{layer}.pt"


def _ends(counted: Tensor) -> Tensor:
    """Return how many positions of each window are no padding, int64 [windows], at least one."""
    return (counted.shape[1] + 1 - counted.flip(1).int().argmax(1)).clamp_min(1)

"""A stage of distillation + checkpoint headers -> plan: what is trained, on what, at what cost.

No weight is read. The output has the tensors of the source, byte for byte the same layout: what was
packed stays packed. Memory is that of the student in float32 with its gradient and AdamW's two
moments, of the teacher unless its answers are stored, and of the activations of a micro batch.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill_method import DistillMethod, check_adapters
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.hub import Source, resolve
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.kernels.inventory import take
from unicomp.models import context_length, describe
from unicomp.recipes.layers.forecast import IMPORTS, LIVE_ACTIVATIONS, hidden_size
from unicomp.recipes.lint.output import Output, of_checkpoint
from unicomp.recipes.schema import SEQ_LEN, Recipe
from unicomp.recipes.stage import throughput
from unicomp.recipes.stage.planned import Planned
from unicomp.writer import Meta

HELD, TRAINED = 4, 16  # bytes of a parameter in float32; with its gradient and two moments
LOGITS = 6  # float32 copies of a micro batch's logits, student's and teacher's together
FORWARD, BACKWARD = 2, 4  # operations a parameter and token
BEFORE_STEPS = 3  # checkpoints, of 12 bytes a parameter: two, and one that is being written


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillPlan(Planned):
    """What a stage of distillation will do; the source is the student.

    method   what nobody chose settled by the student
    teacher  where the teacher comes from
    seq_len  tokens of a window
    steps    None: as many as the text or the time gives
    """

    method: DistillMethod
    teacher: Source
    seq_len: int
    steps: int | None

    @property
    def params(self) -> int:
        """Parameters of the model."""
        return sum(math.prod(meta.shape) for meta in self.dense.tensors.values())

    @property
    def bytes_in(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(info.nbytes for info in self.checkpoint.tensors.values())

    @property
    def bytes_out(self) -> int:
        """Bytes of all tensors of the output: those of the source."""
        return self.bytes_in

    @property
    def most_host_bytes(self) -> int:
        """The forecast: its parts have their allowance."""
        return self.peak_host_bytes

    @property
    def sha256(self) -> str:
        """Hash of what will be done."""
        content = {
            "recipe": self.recipe.to_dict(),
            "teacher": self.teacher.id,
            "tensors": [[meta.name, meta.dtype, list(meta.shape)] for meta in self.layout()],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def layout(self) -> list[Meta]:
        """Return every tensor of the output."""
        return [
            Meta(info.name, info.dtype, info.shape) for info in self.checkpoint.tensors.values()
        ]

    def output(self) -> Output:
        """Return what a loader will find: training leaves names, shapes and the layout of scales.

        Of a student that an earlier pass makes, that pass knows it.
        """
        return of_checkpoint(self.checkpoint)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            **self.figures(),
            "teacher": {"id": self.teacher.id, "revision": self.teacher.revision},
            "steps": self.steps,
            "batch": self.method.batch,
            "seq_len": self.seq_len,
            "tensors": [
                {"name": info.name, "shape": list(info.shape), "bytes_out": info.nbytes}
                for info in self.checkpoint.tensors.values()
            ],
        }


def plan_distill(
    recipe: Recipe,
    text: str | None,
    source: Source,
    checkpoint: Checkpoint,
    dense: DenseSource,
    max_memory: int | None,
    *,
    original: Source,
) -> DistillPlan:
    """Work out what a recipe of one stage of distillation does to a source.

    original  the recipe's model before any stage: the teacher, where the stage names none

    Raises UnicompError for a teacher of another vocabulary, a text that is not there, and where
    `max_memory` does not suffice.
    """
    [stage] = recipe.stages
    method = stage.options
    if not isinstance(method, DistillMethod):
        raise TypeError(f"`{stage.verb}: {stage.method}` does not train")
    if method.data is None and recipe.calibration is None:
        raise UnicompError(
            f"`{stage.verb}: {stage.method}` needs a text", hint="give `data` (`--data TEXT`)"
        )
    teacher = original if method.teacher is None else resolve(method.teacher)
    other = open_dense(Checkpoint.open(teacher.folder))
    check_vocabulary(dense.config, other.config, source.id, teacher.id)
    if method.lora_rank is not None:
        check_adapters([name.removesuffix(".weight") for name in dense.readers])
    context = context_length(dense.config)
    seq_len = method.seq_len or (SEQ_LEN if context is None else min(SEQ_LEN, context))
    if context is not None and seq_len > context:
        raise UnicompError(
            f"seq_len {seq_len} is longer than the model's context of {context} tokens",
            hint=f"use `seq_len: {context}` or less",
        )
    if method.layer_steps:
        check_layers(dense, other)
    bits = [w.scheme.bits for w in take(checkpoint).weights if w.scheme is not None]
    method = method.settled(width=hidden_size(dense.config), bits=min(bits, default=None))
    params = sum(math.prod(meta.shape) for meta in dense.tensors.values())
    taught = sum(math.prod(meta.shape) for meta in other.tensors.values())
    memory = _memory(method, dense, params, taught, seq_len)
    needed = sum(memory.values())
    if max_memory is not None and needed > max_memory:
        raise UnicompError(
            f"--max-memory {max_memory} bytes is too small: training needs {needed} bytes",
            hint="lower `micro_batch` or `seq_len`, or store the teacher with `cache_teacher`",
        )
    steps, seconds, basis = _time(method, params, taught, seq_len)
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    return DistillPlan(
        recipe=recipe,
        text=recipe.dump() if text is None else text,
        stage=stage,
        method=method,
        source=source,
        dense=dense,
        checkpoint=checkpoint,
        model=describe(dense.config, dense.tensors),
        teacher=teacher,
        seq_len=seq_len,
        batch=method.micro_batch,
        memory=memory,
        disk_bytes=stored + BEFORE_STEPS * 12 * trained(method, dense),
        steps=steps,
        times={"training": seconds},
        basis=basis,
        notes=(),
    )


def check_vocabulary(
    student: Mapping[str, Any], teacher: Mapping[str, Any], name: str, other: str
) -> None:
    """Refuse two models whose logits do not mean the same tokens, as far as configs tell.

    Raises UnsupportedError, which says why.
    """
    sizes = [int(config.get("vocab_size") or 0) for config in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UnsupportedError(
            f"student `{name}` has a vocabulary of {sizes[0]} tokens, teacher `{other}` of "
            f"{sizes[1]}: their logits do not mean the same tokens",
            hint="distil from a teacher of the student's own family, with the same tokenizer",
        )


def check_layers(student: DenseSource, teacher: DenseSource) -> None:
    """Refuse a student whose layers cannot be laid beside the teacher's, one by one.

    Raises UnsupportedError.
    """
    counts = [len(describe(one.config, one.tensors).layers) for one in (student, teacher)]
    if counts[0] != counts[1]:
        raise UnsupportedError(
            f"`layer_steps` lays layer beside layer: the student has {counts[0]}, the teacher "
            f"{counts[1]}",
            hint="leave `layer_steps` out",
        )
    widths = [hidden_size(one.config) for one in (student, teacher)]
    if widths[0] != widths[1]:
        raise UnsupportedError(
            f"`layer_steps` compares states of one width: the student's is {widths[0]}, the "
            f"teacher's {widths[1]}",
            hint="leave `layer_steps` out; `hidden` compares states through a trained map",
        )


def trained(method: DistillMethod, dense: DenseSource) -> int:
    """Return how many parameters have a gradient."""
    shapes = [meta.shape for meta in dense.tensors.values()]
    if method.max_steps == 0:  # one layer after the other, and they are measured as a whole
        count = int(dense.config.get("num_hidden_layers") or dense.config.get("n_layer") or 1)
        return -(-sum(math.prod(shape) for shape in shapes) // count)
    if method.lora_rank is None:
        return sum(math.prod(shape) for shape in shapes)
    return sum(method.lora_rank * sum(shape) for shape in shapes if len(shape) == 2)


def _memory(
    method: DistillMethod, dense: DenseSource, params: int, taught: int, seq_len: int
) -> dict[str, int]:
    windows = min(method.micro_batch, method.batch)
    tokens = windows * seq_len
    vocab = int(dense.config.get("vocab_size") or 0)
    layers = int(dense.config.get("num_hidden_layers") or dense.config.get("n_layer") or 1)
    widest = max(
        (max(meta.shape) for meta in dense.tensors.values() if vocab not in meta.shape), default=1
    )
    kept = 1 if method.gradient_checkpointing else layers
    live = LIVE_ACTIVATIONS * tokens * 4 * (kept * hidden_size(dense.config) + widest * kept)
    if method.sampling() is not None:  # keys and values of what is written, before the step's own
        live = max(live, 2 * 4 * tokens * layers * hidden_size(dense.config))
    return {
        "imports": IMPORTS,
        "student": HELD * params + (TRAINED - HELD) * trained(method, dense),
        "teacher": 0 if method.cache_teacher else 4 * taught,
        "activations": live,
        "logits": LOGITS * 4 * tokens * vocab,
    }


def _time(
    method: DistillMethod, params: int, taught: int, seq_len: int
) -> tuple[int | None, float, str]:
    each = method.batch * seq_len
    bounds = []
    if method.max_steps is not None:
        bounds.append(method.max_steps)
    if method.max_tokens is not None:
        bounds.append(max(1, method.max_tokens // each))
    steps = min(bounds, default=None)
    if steps is None:
        if method.max_time is not None:
            return None, method.max_time, "`max_time`"
        return None, 0.0, "not known before the text is read: `passes` over it"
    rate = throughput.rates().product
    sampling = method.sampling()
    passes = FORWARD * (1 + (sampling.share if sampling is not None else 0.0)) + BACKWARD
    work = steps * each * (passes * params + FORWARD * taught)
    work += method.layer_steps * each * ((2 * FORWARD + BACKWARD) * params + FORWARD * taught)
    seconds = work / rate
    if method.max_time is not None:
        seconds = min(seconds, method.max_time)
    return steps, seconds, f"{work / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s"

"""A fine-tune and its base -> what each tensor's delta will be; `run.py` carries it out.

The plan reads headers only, says what each tensor's fate is, and declines, with the least that the
method could reach, where the ratio is out of reach.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from unicomp.checkpoint import Checkpoint
from unicomp.compress.allocate import GRACE
from unicomp.compress.method import DeltaMethod
from unicomp.compress.patterns import matches
from unicomp.errors import CheckpointError, UnicompError, UnsupportedError
from unicomp.folder import quote
from unicomp.hub import Source, resolve
from unicomp.kernels.delta import module_of
from unicomp.kernels.delta_folder import Stored, unserved
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.recipes.delta import forecast as delta_forecast
from unicomp.recipes.schema import Calibration, Recipe
from unicomp.writer import Meta

FLOATS = ("F32", "F16", "BF16", "F64")
LEAST_SIDE = 2  # a tensor with a shorter side than this is no matrix
TOKENS = re.compile(r"embed|wte|lm_head|word_embeddings")


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """What will be made of a fine-tune, from headers only.

    tensors   name -> its fate, in the order of the fine-tune; kinds `delta` and `exact`
    matrix    bytes of all matrices at 16 bits
    budget    most bytes that is stored of them
    least     fewest bytes that the method could store
    calibration  text to train the scales on, its windows' length settled; None: they are not
    text      of the recipe that asks for it, if one does
    memory    most bytes that the work takes, by what for
    """

    method_name: str
    method: DeltaMethod
    source: Source
    base_source: Source
    tuned: Checkpoint
    base: DenseSource
    tensors: Mapping[str, Stored]
    matrix: int
    budget: int
    least: int
    notes: tuple[str, ...]
    calibration: Calibration | None = None
    text: str | None = None
    memory: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        kinds = {"delta": 0, "exact": 0}
        for own in self.tensors.values():
            kinds[own.kind] += 1
        return {
            "schema": "unicomp.delta-plan/1",
            "source": {"id": self.source.id, "revision": self.source.revision},
            "base": {"id": self.base_source.id, "revision": self.base_source.revision},
            "method": self.method_name,
            "options": self.method.model_dump(mode="json"),
            "tensors": kinds,
            "matrix_bytes_16": self.matrix,
            "budget": self.budget,
            "least": self.least,
            "other": sum(own.bytes for own in self.tensors.values() if own.kind == "exact"),
            "memory_bytes": dict(self.memory),
            "notes": list(self.notes),
        }


def plan_delta(
    tuned: str,
    method_name: str,
    method: DeltaMethod,
    calibration: Calibration | None = None,
    *,
    max_memory: int | None = None,
) -> DeltaPlan:
    """Work out what each tensor of a fine-tune becomes.

    tuned        the fine-tune: a folder, a Hub id or `builtin:NAME`; the base is an option of the
                 method
    calibration  text to train the scales on
    max_memory   bytes of resident memory that the work may take

    Raises CheckpointError naming the tensor where the two are not a pair, and UnicompError where
    the method cannot reach the ratio, with the least that it could, or not in that memory.
    """
    source, base_source = resolve(tuned), resolve(method.base)
    checkpoint = Checkpoint.open(source.folder)
    if checkpoint.config.get("quantization_config") is not None:
        raise UnsupportedError(
            f"`{source.id}` is quantized: its delta would be mostly rounding",
            hint="give the fine-tune as it was trained",
        )
    base = open_dense(Checkpoint.open(base_source.folder))
    kinds = [own.config.get("model_type") for own in (checkpoint, base)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"`{source.id}` is a `{kinds[0]}`, `{base_source.id}` a `{kinds[1]}`: no pair",
            hint="give the very model that was fine-tuned as `--base`",
        )
    _check_names(source, checkpoint, base_source, base)
    notes = list(base.notes)
    fates = {}
    for name, info in checkpoint.tensors.items():
        meta = base.tensors[name]
        fates[name] = _fate(name, Meta(name, info.dtype, info.shape), meta, method, notes)
    matrix = sum(2 * prod(own.shape) for own in fates.values() if is_matrix(own))
    budget = int(method.ratio * matrix * (1 + GRACE))
    least = 0
    for own in fates.values():
        if is_matrix(own):
            smallest = own.bytes if own.kind == "exact" else _least(own, method)
            least += smallest
    if least > budget:
        raise UnicompError(
            f"`delta: {method_name}` cannot reach a ratio of {method.ratio:.4g}: the least that it "
            f"could is {least / max(matrix, 1):.4g} ({least} of {matrix} bytes at 16 bits)",
            hint=f"use `--ratio {_up(least / max(matrix, 1) / (1 + GRACE))}` or another method",
        )
    if calibration is not None:
        calibration = _settled(calibration, checkpoint, fates, method)
    memory = delta_forecast.memory(method, fates.values(), budget, checkpoint.config, calibration)
    delta_forecast.check(memory, max_memory)
    return DeltaPlan(
        method_name,
        method,
        source,
        base_source,
        checkpoint,
        base,
        fates,
        matrix,
        budget,
        least,
        tuple(notes),
        calibration,
        memory=memory,
    )


def plan_recipe(
    recipe: Recipe,
    *,
    model: str | None = None,
    text: str | None = None,
    max_memory: int | None = None,
) -> DeltaPlan:
    """Work out what a recipe of one `delta` stage does; see `plan_delta`.

    model       the fine-tune, instead of the recipe's
    text        the recipe as the user wrote it; default: as `recipe.dump()` writes it
    max_memory  bytes of resident memory that the work may take
    """
    tuned, (stage, *more) = model or recipe.model, recipe.stages
    if tuned is None:
        raise UnicompError(
            "the recipe names no model", hint="add `model:`, or give MODEL on the command line"
        )
    if more or not isinstance(stage.options, DeltaMethod):
        raise UnsupportedError(
            f"`{more[0].verb if more else stage.verb}` cannot stand beside `delta`",
            hint="a delta is the whole of a recipe: put the other stages in one of their own",
        )
    found = plan_delta(
        tuned, stage.method, stage.options, recipe.calibration, max_memory=max_memory
    )
    return replace(found, text=recipe.dump() if text is None else text)


def is_matrix(own: Stored) -> bool:
    """Say whether a tensor is a matrix, or experts, whose bytes the ratio is about."""
    sides = own.shape[-2:]
    return len(own.shape) in (2, 3) and own.dtype in FLOATS and min(sides) >= LEAST_SIDE


def _check_names(source: Source, tuned: Checkpoint, base_source: Source, base: DenseSource) -> None:
    for name in tuned.tensors:
        if name not in base.tensors:
            raise CheckpointError(
                f"`{quote(name)}` of `{source.id}` is not in `{base_source.id}`",
                hint="give the very model that was fine-tuned; merge adapters, and keep a tied "
                "head tied",
            )
    for name in base.tensors:
        if name not in tuned.tensors:
            raise CheckpointError(
                f"`{quote(name)}` of `{base_source.id}` is not in `{source.id}`",
                hint="give the very model that was fine-tuned, and the whole of the fine-tune",
            )


def _settled(
    calibration: Calibration,
    tuned: Checkpoint,
    fates: Mapping[str, Stored],
    method: DeltaMethod,
) -> Calibration:
    """Return the text with the length of its windows; UnsupportedError if nothing can train."""
    if not any(layout.planes or layout.int8 for layout in method.layouts()):
        raise UnsupportedError(
            "this delta has no scales to train: its factors are float16, and it has no planes",
            hint="leave out `--calibration`",
        )
    for name, own in fates.items():
        if (reason := unserved(name, own)) is not None:
            raise UnsupportedError(
                f"{reason}: the model cannot run with its delta, and so no scales can be trained",
                hint="leave out `--calibration`",
            )
    context = tuned.config.get("max_position_embeddings")
    return calibration.settled(None if context is None else int(context))


def _fate(name: str, meta: Meta, base: Meta, method: DeltaMethod, notes: list[str]) -> Stored:
    whole = Stored(kind="exact", dtype=meta.dtype, shape=list(meta.shape), bytes=meta.nbytes)
    rows: int | None = None
    if meta.shape != base.shape:
        resized = len(meta.shape) == len(base.shape) == 2 and meta.shape[1] == base.shape[1]
        if not resized or not TOKENS.search(name):
            raise CheckpointError(
                f"`{quote(name)}` has shape {list(meta.shape)}, in the base {list(base.shape)}",
                hint="give the very model that was fine-tuned as `--base`",
            )
        rows = min(meta.shape[0], base.shape[0])
        notes.append(
            f"`{name}` has {meta.shape[0]} rows, the base {base.shape[0]}: "
            + (
                f"{meta.shape[0] - rows} rows are stored exactly"
                if meta.shape[0] > rows
                else "the others of the base are left out"
            )
        )
    module = module_of(name)
    ignored = any(matches(pattern, module) for pattern in method.ignore)
    if not is_matrix(whole) or base.dtype not in FLOATS or ignored:
        return whole
    return whole.model_copy(update={"kind": "delta", "rows": rows, "bytes": 0})


def matrices_of(own: Stored) -> tuple[int, tuple[int, int]]:
    """Return how many matrices of which shape have a delta."""
    *front, out, columns = own.common
    return prod(front), (out, columns)


def _least(own: Stored, method: DeltaMethod) -> int:
    """Return the fewest bytes in which a weight's delta can be kept."""
    count, shape = matrices_of(own)
    if method.spreads():
        return count * min(layout.nbytes(shape) for layout in method.layouts())
    return count * min(
        replace(layout, rank=method.rank(shape, layout)).nbytes(shape)
        for layout in method.layouts()
    )


def _up(ratio: float) -> str:
    return f"{(int(ratio * 10000) + 1) / 10000:.4f}".rstrip("0")

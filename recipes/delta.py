"""A fine-tune and its base -> a delta folder; a delta folder and its base -> the fine-tune again.

The plan reads headers only and says what each tensor's fate is, or declines with the least that
the method could reach. The work then goes tensor by tensor: one weight of each model and a few
copies of it are in memory at a time, of experts one matrix.
"""

import re
import shutil
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unicomp import machine
from unicomp.checkpoint import Checkpoint, check_finite
from unicomp.compress.allocate import Choice, Weight, allocate, gains, total
from unicomp.compress.decompose import inner
from unicomp.compress.lowrank import leading
from unicomp.compress.method import DeltaMethod
from unicomp.compress.patterns import matches
from unicomp.errors import CheckpointError, UnicompError, UnsupportedError
from unicomp.folder import quote
from unicomp.hub import Source, resolve
from unicomp.kernels.delta import Layout, PackedDelta, module_of
from unicomp.kernels.delta_folder import (
    WEIGHTS,
    Base,
    DeltaManifest,
    Stored,
    Totals,
    check_base,
    metas,
    open_delta,
    rows_name,
    sha256_of,
    tensor_sha256,
)
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.manifest import NAME
from unicomp.manifest import Source as Record
from unicomp.manifest import hashes as hashes_of
from unicomp.recipes.plan import working_folder
from unicomp.recipes.run import Progress, Show
from unicomp.recipes.schema import Recipe
from unicomp.writer import Meta, Writer, check_target, copy_file, publish, write_file

GRACE = 0.01  # of the ratio: what scales and the padding of signs may take beside it
FLOATS = ("F32", "F16", "BF16", "F64")
LEAST_SIDE = 2  # a tensor with a shorter side than this is no matrix
TOKENS = re.compile(r"embed|wte|lm_head|word_embeddings")
LAYER = re.compile(r"\.(\d+)\.")
ONE_FILE = 1 << 62


@dataclass(frozen=True, slots=True)
class DeltaPlan:
    """What will be made of a fine-tune, from headers only.

    tensors   name -> its fate, in the order of the fine-tune; kinds `delta` and `exact`
    matrix    bytes of all matrices at 16 bits
    budget    most bytes that is stored of them
    least     fewest bytes that the method could store
    text      of the recipe that asks for it, if one does
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
    text: str | None = None

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
            "notes": list(self.notes),
        }


@dataclass(slots=True)
class _Work:
    """What a compression gathers on its way."""

    tensors: dict[str, Stored]
    hashes: dict[str, str] = field(default_factory=dict)
    squares: float = 0.0
    missed: float = 0.0


def plan_delta(tuned: str, method_name: str, method: DeltaMethod) -> DeltaPlan:
    """Work out what each tensor of a fine-tune becomes.

    tuned  the fine-tune: a folder, a Hub id or `builtin:NAME`; the base is an option of the method

    Raises CheckpointError naming the tensor where the two are not a pair, and UnicompError where
    the method cannot reach the ratio, with the least that it could.
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
    )


def plan_recipe(recipe: Recipe, *, model: str | None = None, text: str | None = None) -> DeltaPlan:
    """Work out what a recipe of one `delta` stage does; see `plan_delta`.

    model  the fine-tune, instead of the recipe's
    text   the recipe as the user wrote it; default: as `recipe.dump()` writes it
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
    found = plan_delta(tuned, stage.method, stage.options)
    return replace(found, text=recipe.dump() if text is None else text)


def compress(
    plan: DeltaPlan, out: Path, *, overwrite: bool = False, progress: Show = lambda _: None
) -> DeltaManifest:
    """Carry out a plan; the folder stands under its name only when whole.

    Raises UnicompError for whatever the user can mend.
    """
    began = time.monotonic()
    check_target(out, overwrite=overwrite)
    for note in plan.notes:
        progress(Progress("prepare", 0, 0, "plan", note=note))
    folder = working_folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        made = _compress(plan, folder, progress, began)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    publish(folder, out, overwrite=overwrite)
    return made


def restore(
    delta: Path, base: str, out: Path, *, overwrite: bool = False, progress: Show = lambda _: None
) -> None:
    """Make the fine-tune again, as a plain checkpoint: the base plus the decoded delta.

    Raises CheckpointError, naming the tensor, for another base than the delta's and for a delta
    that is not whole.
    """
    check_target(out, overwrite=overwrite)
    opened = open_delta(delta)
    checkpoint = Checkpoint.open(resolve(base).folder)
    check_base(
        opened, checkpoint, lambda name: progress(Progress("prepare", 0, 0, f"hashing {name}"))
    )
    dense = open_dense(checkpoint)
    layout = [
        Meta(name, own.dtype, tuple(own.shape)) for name, own in opened.manifest.tensors.items()
    ]
    folder = working_folder(out)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        writer = Writer(folder, layout)
        for index, (name, own) in enumerate(opened.manifest.tensors.items(), 1):
            progress(Progress("restore", index, len(layout), name))
            known = None if own.kind == "exact" else dense.read(name)
            writer.write(name, opened.restored(name, known))
        writer.finish()
        for name in opened.manifest.files:
            if name not in (WEIGHTS, "recipe.yaml"):
                copy_file(delta / name, folder / name)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    publish(folder, out, overwrite=overwrite)


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


def _matrices(own: Stored) -> tuple[int, tuple[int, int]]:
    """Return how many matrices of which shape have a delta."""
    *front, out, columns = own.common
    return prod(front), (out, columns)


def _least(own: Stored, method: DeltaMethod) -> int:
    """Return the fewest bytes in which a weight's delta can be kept."""
    count, shape = _matrices(own)
    if method.spreads():
        return count * min(layout.nbytes(shape) for layout in method.layouts())
    return count * min(
        replace(layout, rank=method.rank(shape, layout)).nbytes(shape)
        for layout in method.layouts()
    )


def _up(ratio: float) -> str:
    return f"{(int(ratio * 10000) + 1) / 10000:.4f}".rstrip("0")


def _compress(plan: DeltaPlan, folder: Path, progress: Show, began: float) -> DeltaManifest:
    method = plan.method
    work = _Work(dict(plan.tensors))
    base_hashes = _hash_base(plan, work, progress)
    layouts = _choose(plan, work, progress)
    for name, layout in layouts.items():
        own = work.tensors[name]
        count, shape = _matrices(own)
        nbytes = count * layout.nbytes(shape)
        facts = {key: getattr(layout, key) for key in ("planes", "by_row", "rank", "int8")}
        work.tensors[name] = own.model_copy(update=facts | {"bytes": nbytes})
    zero: Literal["minus", "plus"] = "plus" if method.how(0).zero_plus else "minus"
    stored = [meta for name, own in work.tensors.items() for meta in metas(name, own)]
    if not stored:
        raise UnicompError(
            f"`{plan.source.id}` equals `{plan.base_source.id}`: there is no delta",
            hint="give a model and its fine-tune",
        )
    words = {"zero": zero, "unicomp": "delta"}
    writer = Writer(folder, stored, max_shard_bytes=ONE_FILE, single=WEIGHTS, metadata=words)
    for index, name in enumerate(work.tensors, 1):
        error = _write(plan, work, writer, name)
        progress(Progress("tensors", index, len(work.tensors), name, error=error))
    writer.finish()
    for name in plan.tuned.companions():
        if name != plan.tuned.index:
            copy_file(plan.source.folder / name, folder / name)
    if plan.text is not None:
        write_file(folder / "recipe.yaml", plan.text.encode())
    made = _manifest(plan, work, folder, base_hashes, zero, began)
    write_file(folder / NAME, (made.model_dump_json(by_alias=True, indent=1) + "\n").encode())
    open_delta(folder)
    return made


def _hash_base(plan: DeltaPlan, work: _Work, progress: Show) -> dict[str, str]:
    """Hash the base's tensors, and find those that the fine-tune left as they were."""
    checkpoint = plan.base.checkpoint
    hashes = {}
    for name in checkpoint.tensors:
        progress(Progress("prepare", 0, 0, f"hashing the base: {name}"))
        hashes[name] = tensor_sha256(checkpoint, name)
        info, own = checkpoint.tensors[name], work.tensors.get(name)
        if own is None or (info.dtype, list(info.shape)) != (own.dtype, own.shape):
            continue
        if tensor_sha256(plan.tuned, name) == hashes[name]:
            work.tensors[name] = own.model_copy(update={"kind": "same", "bytes": 0})
    return hashes


def _choose(plan: DeltaPlan, work: _Work, progress: Show) -> dict[str, Layout]:
    """Return the layout of every weight that has a delta."""
    method, options = plan.method, plan.method.layouts()
    names = [name for name, own in work.tensors.items() if own.kind == "delta"]
    if len(options) == 1 and not method.spreads():
        return {
            name: replace(
                options[0], rank=method.rank(_matrices(work.tensors[name])[1], options[0])
            )
            for name in names
        }
    weights = {}
    for index, name in enumerate(names, 1):
        progress(Progress("weigh", index, len(names), name))
        weights[name] = _weigh(plan, work, name)
    taken = sum(own.bytes for own in work.tensors.values() if is_matrix(own))
    if method.spreads():
        found = allocate(list(weights.values()), plan.budget - taken)
        return dict(zip(names, found, strict=True))
    chosen = {}
    for name, weight in weights.items():
        room = int(method.ratio * 2 * weight.count * prod(weight.shape) * (1 + GRACE))
        chosen[name] = allocate([weight], max(room, weight.least()))[0]
    return chosen


def _weigh(plan: DeltaPlan, work: _Work, name: str) -> Weight:
    """Find what planes leave of a weight's delta, and what each rank would take off that."""
    method, own = plan.method, work.tensors[name]
    count, shape = _matrices(own)
    room = 2 * method.ratio * prod(shape)
    keys = {(layout.planes, layout.by_row): layout for layout in reversed(method.layouts())}
    tried = {
        key: layout
        for key, layout in sorted(keys.items())
        if not layout.planes or layout.nbytes(shape) <= 1.5 * room
    }
    errors = dict.fromkeys(tried, 0.0)
    squares: dict[int, list[Tensor]] = {}
    for index in range(count):
        delta = _delta(plan, own, name, index)
        for key, layout in tried.items():
            rest = delta
            if layout.planes:
                rest = method.solve(delta, layout, 0).decode().neg_().add_(delta)
            errors[key] += inner(rest, rest)
            if len(squares.setdefault(layout.planes, [])) > index:
                continue  # a scale per row or per tensor leaves much the same singular values
            most = int(1.5 * max(room - layout.nbytes(shape), 0) / layout.rank_bytes(shape))
            most = min(most + 1, *shape)
            values = leading(rest, most, seed=_seed(method, name), passes=1)[1]
            squares[layout.planes].append(values.double().square())
    sums = {planes: total(parts).sqrt() for planes, parts in squares.items()}
    choices = [
        Choice(layout, errors[key], gains(sums[layout.planes], int8=layout.int8))
        for layout in method.layouts()
        if (key := (layout.planes, layout.by_row)) in tried
    ]
    return Weight(shape, choices, count, method.importance(_depth(plan, name)))


def _depth(plan: DeltaPlan, name: str) -> float:
    """Return 0 for the first layer and embeddings, 1 for the last and the head."""
    numbers = [int(found[1]) for key in plan.tensors if (found := LAYER.search(key))]
    own = LAYER.search(name)
    if own is None:
        return 1.0 if "head" in name else 0.0
    return int(own[1]) / max(max(numbers), 1)


def _seed(method: DeltaMethod, name: str) -> int:
    return zlib.crc32(f"{method.seed}/{name}".encode())


def _delta(plan: DeltaPlan, own: Stored, name: str, index: int) -> Tensor:
    """Return float32 [out, in]: what the fine-tune added to a matrix, of experts to one."""
    common = own.common
    part = slice(0, common[0]) if len(common) == 2 else slice(index, index + 1)
    delta = plan.tuned.read(name, part).float()
    check_finite(name, delta)
    delta -= plan.base.read(name, part)
    check_finite(name, delta)
    return delta.reshape(common[-2:])


def _write(plan: DeltaPlan, work: _Work, writer: Writer, name: str) -> float | None:
    """Write what is stored of one tensor; return the relative squared error of a delta."""
    own, method = work.tensors[name], plan.method
    if own.kind == "same":
        return None
    if own.kind == "exact":
        whole = plan.tuned.read(name)
        check_finite(name, whole)
        _store(work, writer, {name: [whole]})
        return None
    count, _ = _matrices(own)
    stored: dict[str, list[Tensor]] = {}
    squares = missed = product = kept = 0.0
    for index in range(count):
        delta = _delta(plan, own, name, index)
        packed: PackedDelta = method.solve(delta, own.layout, _seed(method, name))
        for key, tensor in packed.tensors(module_of(name)).items():
            stored.setdefault(key, []).append(tensor)
        decoded = packed.decode()
        squares += inner(delta, delta)
        kept += inner(decoded, decoded)
        product += inner(delta, decoded)
        decoded -= delta
        missed += inner(decoded, decoded)
    experts = len(own.common) == 3
    _store(work, writer, stored, stack=experts)
    if own.rows is not None and own.rows < own.shape[0]:
        rest = plan.tuned.read(name, slice(own.rows, own.shape[0]))
        _store(work, writer, {rows_name(name): [rest]})
    work.squares += squares
    work.missed += missed
    scale = (squares * kept) ** 0.5
    error = missed / squares if squares > 0 else 0.0
    cosine = product / scale if scale > 0 else None
    work.tensors[name] = own.model_copy(update={"error": error, "cosine": cosine})
    return error


def _store(
    work: _Work, writer: Writer, stored: Mapping[str, list[Tensor]], *, stack: bool = False
) -> None:
    for key, parts in stored.items():
        whole = torch.stack(parts) if stack else parts[0]
        writer.write(key, whole)
        work.hashes[key] = sha256_of([whole])


def _manifest(
    plan: DeltaPlan,
    work: _Work,
    folder: Path,
    hashes: dict[str, str],
    zero: Literal["minus", "plus"],
    began: float,
) -> DeltaManifest:
    matrices = [own for own in work.tensors.values() if is_matrix(own)]
    payload = sum(own.bytes for own in matrices)
    every = sum(meta.nbytes for name, own in work.tensors.items() for meta in metas(name, own))
    return DeltaManifest(
        base=Base(
            id=plan.base_source.id,
            revision=plan.base_source.revision,
            sha256=hashes,
            files=plan.base.checkpoint.sha256(),
        ),
        source=Record(id=plan.source.id, revision=plan.source.revision, sha256=plan.tuned.sha256()),
        method=plan.method_name,
        options=plan.method.model_dump(mode="json"),
        zero=zero,
        tensors=work.tensors,
        totals=Totals(
            matrix_bytes_16=plan.matrix,
            payload=payload,
            other=every - payload,
            file=(folder / WEIGHTS).stat().st_size,
            base=sum(info.nbytes for info in plan.base.checkpoint.tensors.values()),
            error=work.missed / work.squares if work.squares > 0 else None,
        ),
        stored=work.hashes,
        files=hashes_of(folder),
        seconds=time.monotonic() - began,
        peak_rss_bytes=machine.peak_rss_bytes(),
        versions=machine.versions(),
        machine=machine.describe(),
        notes=list(plan.notes),
    )

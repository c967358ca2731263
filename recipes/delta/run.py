"""A delta plan -> a delta folder; a delta folder and its base -> the fine-tune again.

The work goes tensor by tensor: one weight of each model and a few copies of it are in memory at a
time, of experts one matrix. Each piece is journalled once its bytes are on disk, so that the same
command goes on where an interrupted one stopped and ends in the same bytes. Where there is a
calibration text, the scales are trained last, with both models in memory.
"""

import re
import shutil
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from torch import Tensor

from unicomp import __version__, machine, mixture, text
from unicomp.checkpoint import Checkpoint, check_finite
from unicomp.compress.allocate import (
    FEW,
    GRACE,
    WEIGHED,
    Choice,
    Weight,
    allocate,
    gains,
    settled,
    total,
)
from unicomp.compress.decompose import inner
from unicomp.compress.lowrank import spectrum
from unicomp.compress.method import DeltaMethod
from unicomp.errors import CheckpointError, UnicompError
from unicomp.hub import resolve
from unicomp.kernels.delta import Layout, PackedDelta, module_of
from unicomp.kernels.delta_folder import (
    WEIGHTS,
    Base,
    DeltaManifest,
    Stored,
    Totals,
    Trained,
    check_base,
    metas,
    open_delta,
    rows_name,
    sha256_of,
    tensor_sha256,
)
from unicomp.kernels.dense import open_dense
from unicomp.manifest import NAME, Calibration, Source
from unicomp.manifest import hashes as hashes_of
from unicomp.recipes.delta.plan import DeltaPlan, is_matrix, matrices_of
from unicomp.recipes.stage.journal import FOLDER as JOURNAL
from unicomp.recipes.stage.journal import Journal
from unicomp.recipes.stage.prepare import make_folder, working_folder
from unicomp.recipes.stage.progress import Progress, Show
from unicomp.writer import Meta, Writer, check_target, copy_file, publish, write_file

LAYER = re.compile(r"\.(\d+)\.")
ONE_FILE = 1 << 62
ROWS = 256  # that the base is taken off at once
SCALES = "scales.safetensors"  # trained ones, in the journal's folder


@dataclass(slots=True)
class _Work:
    """What a compression gathers on its way.

    tensors  name -> its fate, with bytes and error as they become known
    hashes   stored name -> sha256
    sums     name -> squares of its delta, and of what is missed
    """

    plan: DeltaPlan
    folder: Path
    journal: Journal
    show: Show
    source: dict[str, str]
    windows: Tensor | None
    calibration: Calibration | None
    tensors: dict[str, Stored]
    base: dict[str, str] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    trained: Trained | None = None

    def done(self, kind: str) -> dict[str, dict[str, Any]]:
        """Return the journal's entries of a kind by what they are about."""
        return {entry[kind]: entry for entry in self.journal.entries if kind in entry}


def compress(
    plan: DeltaPlan,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: Show = lambda _: None,
) -> DeltaManifest:
    """Carry out a plan; the folder stands under its name only when whole.

    out        the folder to make; `<out>.partial` is used on the way
    overwrite  replace a folder of that name
    resume     go on where an interrupted run of the same plan stopped; False: start over

    Raises UnicompError for whatever the user can mend. What was done so far then stays in
    `<out>.partial`, unless nothing was or a checkpoint is at fault.
    """
    began = time.monotonic()
    check_target(out, overwrite=overwrite)
    for note in plan.notes:
        progress(Progress("prepare", 0, 0, "plan", note=note))
    progress(Progress("prepare", 0, 0, "hashing the fine-tune"))
    source, base = plan.tuned.sha256(), plan.base.checkpoint.sha256()
    windows, calibration = _windows(plan)
    folder = working_folder(out)
    empty = make_folder(folder, resume=resume)
    with Journal(folder, _fingerprint(plan, source, base, windows)) as journal:
        work = _Work(
            plan, folder, journal, progress, source, windows, calibration, dict(plan.tensors)
        )
        try:
            made = _compress(work, base, began)
        except BaseException as error:
            if isinstance(error, CheckpointError) or (empty and not journal.entries):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    publish(folder, out, overwrite=overwrite)
    shutil.rmtree(out / JOURNAL)
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


def _fingerprint(
    plan: DeltaPlan, source: dict[str, str], base: dict[str, str], windows: Tensor | None
) -> dict[str, Any]:
    """Return what decides the output's bytes; two runs with one fingerprint may share work."""
    ids = b"" if windows is None else windows.numpy().tobytes()
    return {
        "unicomp": __version__,
        "method": plan.method_name,
        "options": plan.method.model_dump(mode="json"),
        "recipe": sha256((plan.text or "").encode()).hexdigest(),
        "source": sha256(repr(sorted(source.items())).encode()).hexdigest(),
        "base": sha256(repr(sorted(base.items())).encode()).hexdigest(),
        "calibration": sha256(ids).hexdigest(),
        "torch": torch.__version__,
    }


def _windows(plan: DeltaPlan) -> tuple[Tensor | None, Calibration | None]:
    """Return the text to train scales on, int64 [windows, tokens], and what is said of it."""
    wanted = plan.calibration
    if wanted is None:
        return None, None
    tokenizer = text.tokenizer(plan.source.folder)
    vocab = plan.tuned.config.get("vocab_size")
    return mixture.windows(
        wanted.data,
        tokenizer,
        vocab=int(vocab) if vocab else None,
        field=wanted.field,
        samples=wanted.samples,
        seq_len=wanted.length,
        seed=wanted.seed,
    )


def _compress(work: _Work, base_files: dict[str, str], began: float) -> DeltaManifest:
    plan, method = work.plan, work.plan.method
    _hash_base(work)
    for name, layout in _choose(work).items():
        own = work.tensors[name]
        count, shape = matrices_of(own)
        facts = {key: getattr(layout, key) for key in ("planes", "by_row", "rank", "int8")}
        nbytes = count * layout.nbytes(shape)
        work.tensors[name] = own.model_copy(update=facts | {"bytes": nbytes})
    stored = [meta for name, own in work.tensors.items() for meta in metas(name, own)]
    if not stored:
        raise UnicompError(
            f"`{plan.source.id}` equals `{plan.base_source.id}`: there is no delta",
            hint="give a model and its fine-tune",
        )
    zero: Literal["minus", "plus"] = "plus" if method.how(0).zero_plus else "minus"
    words = {"zero": zero, "unicomp": "delta"}
    writer = Writer(work.folder, stored, max_shard_bytes=ONE_FILE, single=WEIGHTS, metadata=words)
    done = work.done("tensor")
    for index, name in enumerate(work.tensors, 1):
        if (entry := done.get(name)) is None:
            entry = _write(work, writer, name)
            writer.sync()
            work.journal.append(entry)
        else:
            writer.mark(entry["stored"])
        work.hashes |= entry["stored"]
        _record(work, name, entry["sums"])
        error = work.tensors[name].error
        work.show(Progress("tensors", index, len(work.tensors), name, error=error))
    writer.finish()
    for name in plan.tuned.companions():
        if name != plan.tuned.index:
            copy_file(plan.source.folder / name, work.folder / name)
    if plan.text is not None:
        write_file(work.folder / "recipe.yaml", plan.text.encode())
    made = _finish(work, base_files, zero, began)
    if work.windows is not None:
        _train(work, writer, work.windows)
        _finish(work, base_files, zero, began)
        trained = open_delta(work.folder)
        for name, own in work.tensors.items():
            if own.kind == "delta":
                sums = _sums(_delta(plan, own, name, 0), trained.deltas(name)[0])
                _record(work, name, list(sums))
        made = _finish(work, base_files, zero, began)
    return made


def _finish(
    work: _Work, base_files: dict[str, str], zero: Literal["minus", "plus"], began: float
) -> DeltaManifest:
    """Write the manifest, and open the folder as any reader would."""
    made = _manifest(work, base_files, zero, began)
    write_file(work.folder / NAME, (made.model_dump_json(by_alias=True, indent=1) + "\n").encode())
    open_delta(work.folder)
    return made


def _hash_base(work: _Work) -> None:
    """Hash the base's tensors, and find those that the fine-tune left as they were."""
    checkpoint = work.plan.base.checkpoint
    entry = next((entry for entry in work.journal.entries if "base" in entry), None)
    if entry is None:
        hashes, same = {}, []
        for name in checkpoint.tensors:
            work.show(Progress("prepare", 0, 0, f"hashing the base: {name}"))
            hashes[name] = tensor_sha256(checkpoint, name)
            info, own = checkpoint.tensors[name], work.tensors.get(name)
            if own is None or (info.dtype, list(info.shape)) != (own.dtype, own.shape):
                continue
            if tensor_sha256(work.plan.tuned, name) == hashes[name]:
                same.append(name)
        entry = {"base": hashes, "same": same}
        work.journal.append(entry)
    work.base = entry["base"]
    for name in entry["same"]:
        work.tensors[name] = work.tensors[name].model_copy(update={"kind": "same", "bytes": 0})


def _choose(work: _Work) -> dict[str, Layout]:
    """Return the layout of every weight that has a delta."""
    plan, method, options = work.plan, work.plan.method, work.plan.method.layouts()
    names = [name for name, own in work.tensors.items() if own.kind == "delta"]
    if len(options) == 1 and not method.spreads():
        return _alike(work, names, options[0])
    weights, known = {}, work.done("weigh")
    for index, name in enumerate(names, 1):
        work.show(Progress("weigh", index, len(names), name))
        if (entry := known.get(name)) is None:
            entry = _weigh(work, name)
            work.journal.append(entry)
        weights[name] = _weight(work, name, entry)
    taken = sum(own.bytes for own in work.tensors.values() if is_matrix(own))
    if method.spreads():
        found = allocate(list(weights.values()), plan.budget - taken)
        return dict(zip(names, found, strict=True))
    chosen = {}
    for name, weight in weights.items():
        room = int(method.ratio * 2 * weight.count * prod(weight.shape) * (1 + GRACE))
        chosen[name] = allocate([weight], max(room, weight.least()))[0]
    return chosen


def _alike(work: _Work, names: list[str], layout: Layout) -> dict[str, Layout]:
    """Give each weight the rank that its own ratio buys, rounded up as far as all bytes allow.

    Rounded down everywhere, small weights would leave a twentieth of the bytes unused. The largest
    fractions are rounded up first.
    """
    method, weights = work.plan.method, {name: matrices_of(work.tensors[name]) for name in names}
    found = {
        name: replace(layout, rank=method.rank(shape, layout))
        for name, (_, shape) in weights.items()
    }
    left = work.plan.budget
    left -= sum(own.bytes for own in work.tensors.values() if is_matrix(own))
    left -= sum(count * found[name].nbytes(shape) for name, (count, shape) in weights.items())
    more = {
        name: method.bought(shape, layout) - found[name].rank
        for name, (_, shape) in weights.items()
    }
    for name in sorted(names, key=lambda name: -more[name]):
        count, shape = weights[name]
        cost = count * layout.rank_bytes(shape)
        if more[name] > 1e-9 and cost <= left:
            found[name] = replace(layout, rank=found[name].rank + 1)
            left -= cost
    return found


def _weigh(work: _Work, name: str) -> dict[str, Any]:
    """Find what planes leave of a weight's delta, and what each rank would take off that.

    returns  plain JSON: `errors`, one for each of `_tried`, and number of planes -> `squares`, of
             singular values of what they leave, over all matrices of the weight
    """
    method, own = work.plan.method, work.tensors[name]
    count, shape = matrices_of(own)
    room, tried = 2 * method.ratio * prod(shape), _tried(method, shape)
    errors = dict.fromkeys(tried, 0.0)
    squares: dict[int, list[Tensor]] = {}
    for index in range(count):
        delta = _delta(work.plan, own, name, index)
        others: list[Choice] = []
        for key, layout in reversed(tried.items()):  # most planes first
            rest = delta
            if layout.planes:
                rest = method.solve(delta, layout, 0).decode().neg_().add_(delta)
            error = inner(rest, rest)
            errors[key] += error
            found = squares.setdefault(layout.planes, [])
            if len(found) > index:
                continue  # a scale per row or per tensor leaves much the same singular values
            most = int(WEIGHED * max(room - layout.nbytes(shape), 0) / layout.rank_bytes(shape))
            most = min(most + 1, *shape)
            few = len(found[0]) if found else min(FEW, most)
            ranks = spectrum(rest, few, seed=_seed(method, name))
            if not found and not settled(shape, Choice(layout, error, ranks), most, others):
                ranks = spectrum(rest, most, seed=_seed(method, name))
            found.append(ranks)
            others.append(Choice(layout, error, ranks))
    sums = {str(planes): total(parts).tolist() for planes, parts in squares.items()}
    return {"weigh": name, "errors": list(errors.values()), "squares": sums}


def _tried(method: DeltaMethod, shape: tuple[int, int]) -> dict[tuple[int, bool], Layout]:
    """Return (planes, scale by row) -> a layout, of those that may pay at this ratio."""
    room = 2 * method.ratio * prod(shape)
    keys = {(layout.planes, layout.by_row): layout for layout in reversed(method.layouts())}
    return {
        key: layout
        for key, layout in sorted(keys.items())
        if not layout.planes or layout.nbytes(shape) <= WEIGHED * room
    }


def _weight(work: _Work, name: str, entry: Mapping[str, Any]) -> Weight:
    """Return a weight with its choices, of what `_weigh` found."""
    method = work.plan.method
    count, shape = matrices_of(work.tensors[name])
    errors = dict(zip(_tried(method, shape), entry["errors"], strict=True))
    sums = {
        int(planes): torch.tensor(values, dtype=torch.float64).sqrt()
        for planes, values in entry["squares"].items()
    }
    choices = [
        Choice(layout, errors[key], gains(sums[layout.planes], int8=layout.int8))
        for layout in method.layouts()
        if (key := (layout.planes, layout.by_row)) in errors
    ]
    return Weight(shape, choices, count, method.importance(_depth(work.plan, name)))


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
    base = plan.base.read(name, part)
    # By rows: torch would first make float32 of the whole base (2.13).
    for mine, theirs in zip(delta.split(ROWS, -2), base.split(ROWS, -2), strict=True):
        mine -= theirs
    del base, theirs
    check_finite(name, delta)
    machine.return_freed_memory()  # of what was read, and of the matrix before
    return delta.reshape(common[-2:])


def _write(work: _Work, writer: Writer, name: str) -> dict[str, Any]:
    """Write what is stored of one tensor; return its journal entry, with hashes and sums."""
    own, plan = work.tensors[name], work.plan
    if own.kind == "same":
        return {"tensor": name, "stored": {}, "sums": None}
    if own.kind == "exact":
        whole = plan.tuned.read(name)
        check_finite(name, whole)
        return {"tensor": name, "stored": _store(writer, {name: [whole]}), "sums": None}
    count, _ = matrices_of(own)
    parts: dict[str, list[Tensor]] = {}
    sums = [0.0] * 4
    for index in range(count):
        delta = _delta(plan, own, name, index)
        packed: PackedDelta = plan.method.solve(delta, own.layout, _seed(plan.method, name))
        machine.return_freed_memory()
        for key, tensor in packed.tensors(module_of(name)).items():
            parts.setdefault(key, []).append(tensor)
        sums = [a + b for a, b in zip(sums, _sums(delta, packed), strict=True)]
    stored = _store(writer, parts, stack=len(own.common) == 3)
    if own.rows is not None and own.rows < own.shape[0]:
        rest = plan.tuned.read(name, slice(own.rows, own.shape[0]))
        check_finite(name, rest)
        stored |= _store(writer, {rows_name(name): [rest]})
    return {"tensor": name, "stored": stored, "sums": sums}


def _sums(delta: Tensor, packed: PackedDelta) -> tuple[float, float, float, float]:
    """Return the squares of a delta, of what is missed and of what is kept, and their product."""
    decoded = packed.decode()
    kept, product = inner(decoded, decoded), inner(delta, decoded)
    decoded -= delta
    return inner(delta, delta), inner(decoded, decoded), kept, product


def _record(work: _Work, name: str, sums: list[float] | None) -> None:
    """Note the error and the cosine of a delta, from `_sums`."""
    if sums is None:
        return
    squares, missed, kept, product = sums
    scale = (squares * kept) ** 0.5
    error = missed / squares if squares > 0 else 0.0
    cosine = product / scale if scale > 0 else None
    work.sums[name] = (squares, missed)
    work.tensors[name] = work.tensors[name].model_copy(update={"error": error, "cosine": cosine})


def _store(
    writer: Writer, stored: Mapping[str, list[Tensor]], *, stack: bool = False
) -> dict[str, str]:
    """Write tensors, and return their hashes."""
    hashes = {}
    for key, parts in stored.items():
        whole = torch.stack(parts) if stack else parts[0]
        writer.write(key, whole)
        hashes[key] = sha256_of([whole])
    return hashes


def _train(work: _Work, writer: Writer, windows: Tensor) -> None:
    """Train the scales on text and put them in place of those that were fitted to the weights.

    Trained scales lie in the journal's folder before any is put in place, so that an interrupted
    run finds either none of them or all.
    """
    file = work.journal.folder / SCALES
    entry = next((entry for entry in work.journal.entries if "trained" in entry), None)
    if entry is None:
        scales, before, after = _distill(work, windows)
        write_file(file, save(scales))
        steps = work.plan.method.steps
        entry = {"trained": {"steps": steps, "loss_before": before, "loss_after": after}}
        work.journal.append(entry)
    scales = load(file.read_bytes())
    work.trained = Trained.model_validate(entry["trained"])
    for key, scale in scales.items():
        work.hashes |= _store(writer, {key: [scale]})
    writer.sync()


def _distill(work: _Work, windows: Tensor) -> tuple[dict[str, Tensor], float, float]:
    """Return stored name -> trained scale, and the losses before and after."""
    from unicomp.compress.scales import distill
    from unicomp.kernels.delta import scale_name
    from unicomp.kernels.deltas import load_deltas, products
    from unicomp.kernels.load import load as load_dense

    plan, steps = work.plan, work.plan.method.steps
    student = load_deltas(
        plan.base_source.folder,
        [work.folder],
        backend="torch",
        compute="exact",
        dtype=torch.float32,
    )
    teacher = load_dense(plan.source.folder, dtype=torch.float32)
    found = distill(
        student,
        teacher,
        products(student, 0),
        windows,
        steps=steps,
        seed=plan.method.seed,
        progress=lambda step, loss: work.show(Progress("train", step, steps, f"loss {loss:.4g}")),
    )
    named = {}
    for name, places in found.scales.items():
        for place, scale in places.items():
            module = module_of(name)
            plane = place.removeprefix("scale")
            key = scale_name(module, int(plane)) if plane.isdigit() else f"{module}.delta_{place}"
            named[key] = scale.contiguous()
    return named, found.before, found.after


def _manifest(
    work: _Work, base_files: dict[str, str], zero: Literal["minus", "plus"], began: float
) -> DeltaManifest:
    plan, folder = work.plan, work.folder
    payload = sum(own.bytes for own in work.tensors.values() if is_matrix(own))
    every = sum(meta.nbytes for name, own in work.tensors.items() for meta in metas(name, own))
    squares = sum(own for own, _ in work.sums.values())
    missed = sum(own for _, own in work.sums.values())
    return DeltaManifest(
        base=Base(
            id=plan.base_source.id,
            revision=plan.base_source.revision,
            sha256=work.base,
            files=base_files,
        ),
        source=Source(id=plan.source.id, revision=plan.source.revision, sha256=work.source),
        method=plan.method_name,
        options=plan.method.model_dump(mode="json"),
        calibration=work.calibration,
        trained=work.trained,
        zero=zero,
        tensors=work.tensors,
        totals=Totals(
            matrix_bytes_16=plan.matrix,
            payload=payload,
            other=every - payload,
            file=(folder / WEIGHTS).stat().st_size,
            base=sum(info.nbytes for info in plan.base.checkpoint.tensors.values()),
            error=missed / squares if squares > 0 else None,
        ),
        stored=work.hashes,
        files=hashes_of(folder),
        seconds=time.monotonic() - began,
        peak_rss_bytes=machine.peak_rss_bytes(),
        versions=machine.versions(),
        machine=machine.describe(),
        notes=list(plan.notes),
    )

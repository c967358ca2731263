"""A delta plan -> a delta folder.

The work goes tensor by tensor: one weight of each model and a few copies of it are in memory at a
time, of experts one matrix. Each piece is journalled once its bytes are on disk, so that the same
command goes on where an interrupted one stopped and ends in the same bytes. Where there is a
calibration text, the scales are trained last, with both models in memory.
"""

import shutil
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from torch import Tensor

from unicomp import __version__, machine, mixture, text
from unicomp.checkpoint import check_finite
from unicomp.compress.decompose import inner
from unicomp.errors import CheckpointError, UnicompError
from unicomp.kernels.delta import PackedDelta, module_of
from unicomp.kernels.delta_folder import (
    WEIGHTS,
    Base,
    DeltaManifest,
    Totals,
    Trained,
    metas,
    open_delta,
    rows_name,
    sha256_of,
    tensor_sha256,
)
from unicomp.manifest import NAME, Calibration, Source
from unicomp.manifest import hashes as hashes_of
from unicomp.recipes.delta.choose import choose
from unicomp.recipes.delta.plan import DeltaPlan, is_matrix, matrices_of
from unicomp.recipes.delta.work import Work, delta_of, seed_of
from unicomp.recipes.stage.journal import FOLDER as JOURNAL
from unicomp.recipes.stage.journal import Journal
from unicomp.recipes.stage.prepare import begin, make_folder
from unicomp.recipes.stage.progress import Progress, Show
from unicomp.writer import Writer, copy_file, publish, write_file

ONE_FILE = 1 << 62
SCALES = "scales.safetensors"  # trained ones, in the journal's folder


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
    folder = begin(out, plan.notes, overwrite=overwrite, progress=progress)
    progress(Progress("prepare", 0, 0, "hashing the fine-tune"))
    source, base = plan.tuned.sha256(), plan.base.checkpoint.sha256()
    windows, calibration = _windows(plan)
    empty = make_folder(folder, resume=resume)
    with Journal(folder, _fingerprint(plan, source, base, windows)) as journal:
        work = Work(
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


def _compress(work: Work, base_files: dict[str, str], began: float) -> DeltaManifest:
    plan, method = work.plan, work.plan.method
    _hash_base(work)
    for name, layout in choose(work).items():
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
                sums = _sums(delta_of(plan, own, name, 0), trained.deltas(name)[0])
                _record(work, name, list(sums))
        made = _finish(work, base_files, zero, began)
    return made


def _finish(
    work: Work, base_files: dict[str, str], zero: Literal["minus", "plus"], began: float
) -> DeltaManifest:
    """Write the manifest, and open the folder as any reader would."""
    made = _manifest(work, base_files, zero, began)
    write_file(work.folder / NAME, (made.model_dump_json(by_alias=True, indent=1) + "\n").encode())
    open_delta(work.folder)
    return made


def _hash_base(work: Work) -> None:
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


def _write(work: Work, writer: Writer, name: str) -> dict[str, Any]:
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
        delta = delta_of(plan, own, name, index)
        packed: PackedDelta = plan.method.solve(delta, own.layout, seed_of(plan.method, name))
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


def _record(work: Work, name: str, sums: list[float] | None) -> None:
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


def _train(work: Work, writer: Writer, windows: Tensor) -> None:
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


def _distill(work: Work, windows: Tensor) -> tuple[dict[str, Tensor], float, float]:
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
    work: Work, base_files: dict[str, str], zero: Literal["minus", "plus"], began: float
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

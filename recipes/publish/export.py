"""A checkpoint -> the same codes in another layout: a folder, or one GGUF file.

Nothing is quantized again but plain weights where `--type` asks for it. Every linear gets its
verdict from the format (`kernels/export.py`) before anything is written; if one is refused, all is.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from unicomp import __version__, gguf_model, gguf_tokenizer, machine, manifest, text
from unicomp.checkpoint import DTYPES, Checkpoint
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.hub import Source, resolve
from unicomp.kernels import export as exports
from unicomp.kernels import gguf_writer
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.kernels.export import Codes, Export, Verdict
from unicomp.kernels.export_folder import FolderExport
from unicomp.kernels.exports.gguf import WIDEST
from unicomp.kernels.gguf_writer import Piece
from unicomp.kernels.packed import PackedTensor
from unicomp.kernels.stored import Stored
from unicomp.models import Linear, Model, describe
from unicomp.recipes.lint.output import Output, of_checkpoint
from unicomp.recipes.lint.rules import refusals
from unicomp.recipes.publish import card
from unicomp.recipes.schema import LOADERS
from unicomp.writer import Meta, Writer, check_target, copy_file, publish, write_file

Show = Callable[[str, int, int], None]
"""Called with what is done, bytes done, and bytes in all."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote.

    verdicts  module -> what became of it
    loaders   stock loader -> why it does not take it; None: it does
    """

    source: Source
    format: str
    path: Path
    bytes: int
    verdicts: Mapping[str, Verdict]
    loaders: Mapping[str, str | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "schema": "unicomp.export/1",
            "source": {"id": self.source.id, "revision": self.source.revision},
            "format": self.format,
            "out": self.path.name,
            "bytes": self.bytes,
            "loaders": dict(self.loaders),
            "notes": list(self.notes),
            "tensors": [
                {"name": name, "verdict": own.kind, "stored": own.stored, "why": own.why}
                for name, own in self.verdicts.items()
            ],
        }


@dataclass(frozen=True, slots=True)
class _Work:
    """What is exported.

    codes  every linear of every layer, by module
    """

    source: Source
    checkpoint: Checkpoint
    dense: DenseSource
    stored: Stored
    model: Model
    dtype: torch.dtype
    codes: Mapping[str, Codes]
    verdicts: Mapping[str, Verdict]

    @property
    def kept(self) -> list[Linear]:
        """The linears whose codes go over."""
        return [
            linear
            for linear in self.model.linears()
            if self.codes[linear.module].scheme is not None
            and self.verdicts[linear.module].stored not in ("dense", "F16")
        ]

    def read(self, linear: Linear) -> PackedTensor:
        """Read the codes of one linear."""
        return self.stored.read(linear.part.tensor)

    def plain(self, linear: Linear) -> torch.Tensor:
        """Read the weight of one linear multiplied out, [out, in]."""
        part = linear.part
        if part.expert is None:
            weight = self.dense.read(part.tensor)
            return weight.T.contiguous() if linear.transposed else weight
        stack = self.dense.read(part.tensor, slice(part.expert, part.expert + 1))[0]
        return stack if part.rows is None else stack[slice(*part.rows)]


def export(
    model: str,
    format: str,
    out: Path,
    *,
    kind: str | None = None,
    overwrite: bool = False,
    show: Show | None = None,
) -> Exported:
    """Write a model in another layout.

    model   a folder, a `.gguf` file, a Hub id, or `builtin:NAME`
    format  of `kernels/exports/`
    out     the folder, or the `.gguf` file, to make
    kind    of the format's types; default: what is exact and smallest

    Raises UnsupportedError, naming the tensor and the reason, if a linear is refused.
    """
    target = exports.find(format)
    exports.check_type(target, kind)
    alone = not isinstance(target, FolderExport)
    _check_out(out, alone=alone, overwrite=overwrite)
    if alone:
        gguf_writer.need()
    source = resolve(model)
    checkpoint = Checkpoint.open(source.folder)
    dense = open_dense(checkpoint)
    description = describe(dense.config, dense.tensors)
    stored = Stored(dense)
    dtype = _dtype(dense, description)
    codes = {linear.module: _facts(stored, linear) for linear in description.linears()}
    verdicts = target.decide(list(codes.values()), kind, dtype)
    _refuse(target, verdicts)
    work = _Work(source, checkpoint, dense, stored, description, dtype, codes, verdicts)
    step = show or (lambda *_: None)
    if isinstance(target, FolderExport):
        return _folder(work, target, kind, out, overwrite, step)
    return _file(work, target, out, step)


def _check_out(out: Path, *, alone: bool, overwrite: bool) -> None:
    if not alone:
        check_target(out, overwrite=overwrite)
        return
    if out.suffix != ".gguf":
        raise UnicompError(
            f"`{out}` is no name for a GGUF file", hint=f"write `--out {out.name}.gguf`"
        )
    if out.is_dir() or (out.exists() and not overwrite):
        raise UnicompError(
            f"output `{out}` exists", hint="choose another file, or give `--overwrite`"
        )


def _dtype(dense: DenseSource, model: Model) -> torch.dtype:
    named = str(dense.config.get("dtype") or dense.config.get("torch_dtype"))
    for dtype in exports.FLOATS:
        if str(dtype).removeprefix("torch.") == named.removeprefix("torch."):
            return dtype
    return DTYPES[dense.tensors[next(model.linears()).part.tensor].dtype]


def _facts(stored: Stored, linear: Linear) -> Codes:
    expert = linear.expert is not None
    if linear.part.expert is None and linear.part.tensor in stored.coded:
        packed = stored.read(linear.part.tensor)
        found = exports.facts(linear.module, packed, expert=expert, transposed=linear.transposed)
        return found
    return Codes(linear.module, linear.shape, None, expert=expert, transposed=linear.transposed)


def _refuse(target: Export, verdicts: Mapping[str, Verdict]) -> None:
    refused = {name: own for name, own in verdicts.items() if own.kind == "refused"}
    if refused:
        name, first = next(iter(refused.items()))
        more = f", and {len(refused) - 1} more linears are refused" if len(refused) > 1 else ""
        raise UnsupportedError(
            f"`{name}` cannot be stored as {target.name}: {first.why}{more}",
            hint="choose another `--format` or `--type`; docs/formats.md has the table",
        )
    if isinstance(target, FolderExport) and all(o.stored == "dense" for o in verdicts.values()):
        whys = "; ".join(sorted({own.why or "" for own in verdicts.values()}))
        raise UnsupportedError(
            f"nothing could be stored as {target.name}: {whys}",
            hint="quantize the model first: `unicomp quantize MODEL --out DIR`",
        )


def _notes(work: _Work) -> list[str]:
    counts = Counter(
        f"{own.why}: {own.stored}" for own in work.verdicts.values() if own.why is not None
    )
    return [f"{count} of {len(work.verdicts)} linears: {why}" for why, count in counts.items()]


def _folder(
    work: _Work, target: FolderExport, kind: str | None, out: Path, overwrite: bool, show: Show
) -> Exported:
    began = time.monotonic()
    partial_ = Path(os.path.abspath(out)).with_name(out.name + ".partial")
    with contextlib.suppress(FileNotFoundError):
        for path in partial_.iterdir():
            path.unlink()
    kept = {linear.part.tensor: linear for linear in work.kept}
    metas: dict[str, list[Meta]] = {}
    for name, meta in work.dense.tensors.items():
        linear = kept.get(name)
        if linear is not None:
            metas[name] = target.layout(work.codes[linear.module])
        elif name in work.model.names or any(True for _ in _linears_of(work.model, name)):
            metas[name] = [Meta(_canonical(work, name), meta.dtype, tuple(meta.shape))]
    everything = [meta for own in metas.values() for meta in own]
    writer = Writer(partial_, everything)
    total, done = sum(meta.nbytes for meta in everything), 0
    for name, own in metas.items():
        linear = kept.get(name)
        if linear is None:
            writer.write(own[0].name, work.dense.read(name))
        else:
            packed = target.pack(work.codes[linear.module], work.read(linear))
            for stored, tensor in packed.items():
                writer.write(stored, tensor)
        done += sum(meta.nbytes for meta in own)
        show(name, done, total)
    writer.finish()
    for name in work.checkpoint.companions():
        if name not in ("config.json", "quantize_config.json", work.checkpoint.index):
            copy_file(work.source.folder / name, partial_ / name)
    modules = {linear.module for linear in kept.values()}
    dense = [linear.module for linear in work.model.linears() if linear.module not in modules]
    codes = [work.codes[linear.module] for linear in kept.values()]
    config = dict(work.dense.config)
    config["quantization_config"] = target.config(codes, [*dense, "lm_head"])
    for name, content in target.extra_files(config["quantization_config"]).items():
        write_file(partial_ / name, content.encode())
    write_file(partial_ / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    made = _manifest(work, target, kind, partial_, metas, time.monotonic() - began)
    manifest.write(partial_, made)
    output = of_checkpoint(Checkpoint.open(partial_))
    write_file(partial_ / "README.md", card.write(output, made).encode())
    problems = manifest.verify(partial_)
    if problems:
        raise RuntimeError("the finished folder is not what was made: " + "; ".join(problems))
    publish(partial_, out, overwrite=overwrite)
    return Exported(
        work.source,
        target.name,
        out,
        total,
        work.verdicts,
        refusals(output),
        (*work.dense.notes, *_notes(work)) if dense else tuple(_notes(work)),
    )


def _linears_of(model: Model, tensor: str) -> Iterator[Linear]:
    return (linear for linear in model.linears() if linear.part.tensor == tensor)


def _canonical(work: _Work, name: str) -> str:
    if name in work.model.names:
        return work.model.names[name]
    linear = next(_linears_of(work.model, name))
    return name if linear.part.expert is not None else f"{linear.module}.weight"


def _manifest(
    work: _Work,
    target: FolderExport,
    kind: str | None,
    folder: Path,
    metas: Mapping[str, Sequence[Meta]],
    seconds: float,
) -> manifest.Manifest:
    """Return the manifest: what made the model that is exported, if it says so, and this stage."""
    earlier = None
    if (work.source.folder / manifest.NAME).is_file():
        earlier = manifest.read(work.source.folder)
    modules = {}
    for linear in work.model.linears():
        if linear.part.expert is not None:
            continue
        codes, verdict = work.codes[linear.module], work.verdicts[linear.module]
        packed = codes.scheme if verdict.stored != "dense" else None
        modules[linear.module] = manifest.Module(
            bits=None if packed is None else packed.bits,
            group_size=None if packed is None else packed.group_size,
            symmetric=None if packed is None else packed.symmetric,
            bytes=sum(meta.nbytes for meta in metas[linear.part.tensor]),
            error_before=None,
            error_after=None,
            damp=None,
            clip_fraction=None,
            tokens=0,
            fallback=verdict.why,
        )
    stage = manifest.Stage(
        verb="export",
        method=target.name,
        options={"type": kind or target.types[0]},
        seconds=seconds,
        peak_rss_bytes=machine.peak_rss_bytes(),
        peak_gpu_bytes=None,
        modules=modules,
    )
    params = sum(torch.Size(meta.shape).numel() for meta in work.dense.tensors.values())
    out = sum(meta.nbytes for own in metas.values() for meta in own)
    hashes = work.checkpoint.sha256()
    return manifest.Manifest(
        source=manifest.Source(id=work.source.id, revision=work.source.revision, sha256=hashes)
        if earlier is None
        else earlier.source,
        recipe_sha256=hashlib.sha256(b"").hexdigest() if earlier is None else earlier.recipe_sha256,
        calibration=None if earlier is None else earlier.calibration,
        stages=[*([] if earlier is None else earlier.stages), stage],
        totals=manifest.Totals(
            params=params,
            bytes_in=sum(info.nbytes for info in work.checkpoint.tensors.values()),
            bytes_out=out,
            bits_per_weight=8 * out / params,
        ),
        files=manifest.hashes(folder),
        versions=machine.versions(),
        machine=machine.describe(),
        seeds={} if earlier is None else earlier.seeds,
        notes=_notes(work),
    )


def _file(work: _Work, target: Export, out: Path, show: Show) -> Exported:
    config = work.dense.config
    fields, notes = gguf_model.metadata(config)
    arch = gguf_model.row(config).name
    folder = work.source.folder
    words = gguf_tokenizer.describe(text.tokenizer(folder), folder, int(config["vocab_size"]))
    pieces, verdicts = _pieces(work)
    kinds = Counter[str]()
    for piece in pieces:
        if ".ffn_" in piece.name or ".attn_" in piece.name:
            kinds[piece.kind] += piece.nbytes
    common = (kinds - Counter({"F32": kinds["F32"]})).most_common(1)[0][0]
    tokens = words.fields["tokenizer.ggml.tokens"]
    name, changed_name = gguf_tokenizer.file_name(work.source.id.split("/")[-1], set(tokens))
    if changed_name is not None:
        notes.append(changed_name)
    fields |= words.fields | {
        "general.type": "model",
        "general.name": name,
        "general.quantized_by": f"unicomp {__version__}",
        "general.file_type": gguf_writer.FILE_TYPES[common],
        "general.quantization_version": 2,
    }
    if work.source.revision is not None:
        fields["general.source.url"] = f"{work.source.id}@{work.source.revision}"
    partial_ = Path(os.path.abspath(out)).with_name(out.name + ".partial")
    partial_.parent.mkdir(parents=True, exist_ok=True)
    try:
        changed = gguf_writer.write(partial_, arch, fields, pieces, show)
        with partial_.open("rb") as file:
            os.fsync(file.fileno())
        partial_.replace(out)
    finally:
        partial_.unlink(missing_ok=True)
    done = _Work(
        work.source, work.checkpoint, work.dense, work.stored, work.model, work.dtype,
        work.codes, verdicts,
    )  # fmt: skip
    said = [*notes, *words.notes, *_notes(done)]
    if changed:
        said.append(f"{changed} values of plain tensors were rounded to float16")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    loaders = refusals(Output(plain, {}, gguf=True), LOADERS)
    size = out.stat().st_size
    return Exported(work.source, target.name, out, size, verdicts, loaders, tuple(said))


def _pieces(work: _Work) -> tuple[list[Piece], dict[str, Verdict]]:
    """Return the tensors of a GGUF file; experts of one stack take the widest type of any."""
    config = work.dense.config
    verdicts = dict(work.verdicts)
    found: dict[str, Piece] = {}
    for name, canonical in work.model.names.items():
        place = gguf_model.place(canonical, config)
        shape = tuple(work.dense.tensors[name].shape)
        exact = place.name.endswith(("ffn_gate_inp.weight", "position_embd.weight"))
        kind = "F32" if len(shape) == 1 or exact else "F16"
        read = partial(work.dense.read, name)
        order = place.order(shape[0])
        found[place.name] = Piece(place.name, kind, shape, [read], order, place.shift)
    stacks: dict[str, list[Linear]] = {}
    orders: dict[str, list[int] | None] = {}
    for linear in work.model.linears():
        place = gguf_model.place(f"{linear.module}.weight", config)
        stacks.setdefault(place.name, []).append(linear)
        orders[place.name] = place.order(linear.shape[0])
    for name, members in stacks.items():
        kinds = {verdicts[linear.module].stored for linear in members}
        kind = max(kinds, key=WIDEST.index)
        for linear in members:
            own = verdicts[linear.module]
            if own.stored != kind:
                verdicts[linear.module] = Verdict(
                    "fallback" if kind == "F16" else own.kind, kind, own.why or "as its experts"
                )
        coded = kind != "F16"
        parts = [
            partial(work.read, linear)
            if coded and work.codes[linear.module].scheme is not None
            else partial(work.plain, linear)
            for linear in members
        ]
        rows, columns = members[0].shape
        shape = (len(members), rows, columns) if members[0].expert is not None else (rows, columns)
        found[name] = Piece(name, kind, shape, parts, orders[name])
    factors = gguf_model.rope_factors(config)
    if factors is not None:
        values = torch.tensor(factors)
        found["rope_freqs.weight"] = Piece(
            "rope_freqs.weight", "F32", (len(factors),), [lambda: values]
        )
    return list(found.values()), verdicts

"""A delta on disk: `delta.safetensors` and what its `unicomp.json` says, opened and checked.

Beside them lie the fine-tune's `config.json`, tokenizer and chat template. The manifest names the
base by the hash of every tensor, so that a delta is never added to anything else, and every stored
tensor by its own, so that a flipped bit is found when the tensor is read. The kinds of tensors:

    delta   the base's plus what is stored, `kernels/delta.py`
    exact   stored whole under its own name, in the fine-tune's dtype
    same    equal to the base's: nothing is stored

A weight whose rows are tokens may have other rows than the base's: `delta` is then about those that
both have, and `<m>.delta_rows` holds the others whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unicomp import manifest as manifests
from unicomp.checkpoint import DTYPES, Checkpoint, TensorInfo, check_finite, read_header
from unicomp.errors import CheckpointError
from unicomp.folder import not_a_folder, parse_json, quote, read_config, read_small
from unicomp.kernels.delta import Layout, PackedDelta, collect, module_of
from unicomp.later import torch
from unicomp.manifest import LIMIT, NAME, Calibration, Count, File, Sha256, Source
from unicomp.writer import Meta

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = "unicomp.delta/1"
WEIGHTS = "delta.safetensors"
SUFFIX = ".safetensors"
PIECE = 1 << 26  # bytes hashed at once

Kind = Literal["delta", "exact", "same"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Base(_Part):
    """The model that was fine-tuned.

    sha256  of the bytes of each of its tensors
    files   sha256 of each of its files: a checkpoint quantized from it names them as its source
    """

    id: str
    revision: str | None
    sha256: dict[str, Sha256]
    files: dict[str, Sha256]


class Stored(_Part):
    """What became of one tensor of the fine-tune.

    dtype, shape  of the fine-tune's tensor
    rows          of dimension 0 that the base has too; fewer than shape[0]: the others are whole
    planes, by_row, rank, int8    the layout, where the kind is delta
    bytes         that are stored
    error         relative squared error of the delta, ||D - D'||^2 / ||D||^2
    cosine        of the delta and what is stored of it
    """

    kind: Kind
    dtype: str
    shape: list[Count]
    rows: Count | None = None
    planes: Count = 0
    by_row: bool = False
    rank: Count = 0
    int8: bool = False
    bytes: Count
    error: float | None = None
    cosine: float | None = None

    @property
    def layout(self) -> Layout:
        """What is kept, where the kind is delta."""
        return Layout(self.planes, self.by_row, self.rank, self.int8)

    @property
    def common(self) -> tuple[int, ...]:
        """Shape of the part that has a delta."""
        return (*((self.rows,) if self.rows is not None else self.shape[:1]), *self.shape[1:])


class Totals(_Part):
    """Bytes of the whole.

    matrix_bytes_16  of all 2-D weights, experts one by one, at 16 bits: what the ratio is of
    payload          stored for them
    other            stored for vectors and for rows that the base has not
    file             of delta.safetensors
    base             of the base's tensors
    error            relative squared error of all deltas together
    """

    matrix_bytes_16: Count
    payload: Count
    other: Count
    file: Count
    base: Count
    error: float | None


class Trained(_Part):
    """How scales were trained; losses are mean squared differences of logits on held windows."""

    steps: Count
    loss_before: float
    loss_after: float


class DeltaManifest(_Part):
    """`unicomp.json` of a delta folder; `calibration` and `trained` come together, or neither does.

    stored  sha256 of the bytes of each tensor of `delta.safetensors`
    files   of the folder, this one left out
    """

    schema_: Literal["unicomp.delta/1"] = Field("unicomp.delta/1", alias="schema")
    base: Base
    source: Source
    method: str
    options: dict[str, Any]
    calibration: Calibration | None = None
    trained: Trained | None = None
    zero: Literal["minus", "plus"]
    tensors: dict[str, Stored]
    totals: Totals
    stored: dict[str, Sha256]
    files: dict[str, File]
    seconds: float
    peak_rss_bytes: Count
    versions: dict[str, str]
    machine: dict[str, Any]
    notes: list[str] = Field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values."""
        return self.model_dump(mode="json", by_alias=True)


@dataclass(frozen=True, slots=True)
class DeltaFolder:
    """An opened delta; tensors are read, and their hashes compared, one by one."""

    folder: Path
    manifest: DeltaManifest
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """Read a stored tensor whole; CheckpointError if its bytes are not the manifest's."""
        found = Checkpoint(self.folder, {}, self.tensors, (WEIGHTS,), None).read(name)
        if sha256_of([found]) != self.manifest.stored[name]:
            raise CheckpointError(
                f"`{self.folder / WEIGHTS}`: `{quote(name)}` is not as `{NAME}` says: its bytes "
                "have changed",
                hint="fetch or make the delta again",
            )
        return found

    def deltas(self, name: str) -> list[PackedDelta]:
        """Return the delta of a weight: one, or one for each of its experts."""
        own = self.manifest.tensors[name]
        module = module_of(name)
        *front, out, columns = own.common
        if not front:
            return [collect(module, (out, columns), own.layout, self.read)]
        whole = {meta.name: self.read(meta.name) for meta in own.layout.metas(module, own.common)}
        return [
            collect(module, (out, columns), own.layout, partial(_expert, whole, index))
            for index in range(front[0])
        ]

    def extra_rows(self, name: str) -> Tensor | None:
        """Return the rows of a weight that the base has not, or None."""
        own = self.manifest.tensors[name]
        if own.rows is None or own.rows == own.shape[0]:
            return None
        return self.read(rows_name(name))

    def restored(self, name: str, base: Tensor | None) -> Tensor:
        """Return the fine-tune's tensor: the base's plus the decoded delta, rounded once.

        base  the base's tensor; not read where the fine-tune's is stored whole
        """
        own = self.manifest.tensors[name]
        if own.kind == "exact":
            return self.read(name)
        if base is None:
            raise ValueError(f"`{name}` needs the base's tensor")
        dtype = DTYPES[own.dtype]
        if own.kind == "same":
            return base.to(dtype)
        rows = own.common[0]
        parts = self.deltas(name)
        if len(own.common) == 2:
            found = parts[0].decode().add_(base[:rows]).to(dtype)
        else:
            found = torch.empty(own.common, dtype=dtype)
            for index, part in enumerate(parts):
                found[index] = part.decode().add_(base[index])
        extra = self.extra_rows(name)
        return found if extra is None else torch.cat([found, extra])


def _expert(whole: Mapping[str, Tensor], index: int, name: str) -> Tensor:
    return whole[name][index]


def unserved(name: str, own: Stored) -> str | None:
    """Say why what is stored of a tensor cannot be held beside its base; None: it can."""
    if own.rows is not None and own.rows != own.shape[0]:
        return f"`{quote(name)}` has other rows than the base's"
    if len(own.shape) > 2 or ".experts." in name:
        return f"`{quote(name)}` is of experts"
    if own.kind == "exact" and len(own.shape) > 1:
        return f"`{quote(name)}` is a matrix stored whole"
    if name.rpartition(".")[2] not in ("weight", "bias"):
        return f"`{quote(name)}` is neither a weight nor a bias"
    return None


def rows_name(name: str) -> str:
    """Return the name under which rows that the base has not are stored."""
    return f"{module_of(name)}.delta_rows"


def open_delta(folder: Path) -> DeltaFolder:
    """Open a delta folder and check all that headers and manifest show.

    Raises CheckpointError naming the file and the tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise not_a_folder(folder)
    if not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"`{folder}` is no delta: it has no `{WEIGHTS}`",
            hint="make one: `unicomp delta compress FINETUNED --base MODEL --out DIR`",
        )
    manifest = _read_manifest(folder / NAME)
    infos = {info.name: info for info in read_header(folder / WEIGHTS)}
    wanted = {
        meta.name: meta for name, own in manifest.tensors.items() for meta in metas(name, own)
    }
    for name, meta in wanted.items():
        info = infos.get(name)
        if info is None or name not in manifest.stored:
            raise _unlike(folder, f"`{quote(name)}` is absent")
        if (info.dtype, info.shape) != (meta.dtype, meta.shape):
            raise _unlike(
                folder,
                f"`{quote(name)}` is {info.dtype} of shape {list(info.shape)}, not {meta.dtype} "
                f"of shape {list(meta.shape)}",
            )
    if extra := infos.keys() - wanted.keys():
        raise _unlike(folder, f"`{quote(min(extra))}` is not in the manifest")
    words = _metadata(folder / WEIGHTS)
    if words.get("zero") != manifest.zero:
        raise _unlike(folder, f"zeros count as `{quote(str(words.get('zero')))}` in its header")
    for name, expected in manifest.files.items():
        if name == WEIGHTS:
            continue
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise _unlike(folder, f"it names a file outside the folder: `{quote(name)}`")
        if not (folder / name).is_file():
            raise _unlike(folder, f"`{quote(name)}` is absent")
        data = read_small(folder / name, LIMIT)
        if hashlib.sha256(data).hexdigest() != expected.sha256:
            raise _unlike(folder, f"`{quote(name)}` has changed")
    return DeltaFolder(folder, manifest, read_config(folder), infos)


def is_delta(folder: Path) -> bool:
    """Say whether a folder holds a delta, whole or not, instead of a checkpoint."""
    return (folder / WEIGHTS).is_file()


def verify(folder: Path) -> list[str]:
    """Read a whole delta: every tensor's hash and values, every file's hash.

    returns  every problem found, in words; empty if there is none. What `open_delta` refuses is one
             problem, since no tensor can then be told from another.
    """
    try:
        opened = open_delta(folder)
    except CheckpointError as error:
        return [error.message]
    problems = []
    for name in opened.tensors:
        try:
            check_finite(name, opened.read(name), str(folder / WEIGHTS))
        except CheckpointError as error:
            problems.append(error.message)
    for name in manifests.hashes(folder).keys() - opened.manifest.files.keys():
        problems.append(f"`{folder / name}` is not in the manifest")
    return problems


def metas(name: str, own: Stored) -> list[Meta]:
    """Return what is stored of a tensor of the fine-tune."""
    if own.kind == "same":
        return []
    if own.kind == "exact":
        return [Meta(name, own.dtype, tuple(own.shape))]
    found = own.layout.metas(module_of(name), own.common)
    if own.rows is not None and own.rows < own.shape[0]:
        more = (own.shape[0] - own.rows, *own.shape[1:])
        found.append(Meta(rows_name(name), own.dtype, more))
    return found


def sha256_of(parts: Iterable[Tensor]) -> str:
    """Return the SHA-256 of the bytes of tensors, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(data.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def tensor_sha256(checkpoint: Checkpoint, name: str) -> str:
    """Return the SHA-256 of a stored tensor's bytes, read in pieces."""
    info = checkpoint.tensors[name]
    rows = info.shape[0] if info.shape else 0
    if info.nbytes <= PIECE or rows < 2:
        return sha256_of([checkpoint.read(name)])
    step = max(1, rows * PIECE // info.nbytes)
    starts = range(0, rows, step)
    return sha256_of(
        checkpoint.read(name, slice(start, min(start + step, rows))) for start in starts
    )


def check_base(
    delta: DeltaFolder, checkpoint: Checkpoint, progress: Callable[[str], None] = lambda _: None
) -> None:
    """Refuse a checkpoint that is not the delta's base, by shape and then by every tensor's hash.

    progress  is told each tensor before it is read
    """
    base = delta.manifest.base
    hint = f"the base is `{base.id}`" + (f"@{base.revision}" if base.revision else "")
    if missing := base.sha256.keys() - checkpoint.tensors.keys():
        raise CheckpointError(
            f"`{checkpoint.folder}` is not the base of this delta: it has no "
            f"`{quote(min(missing))}`",
            hint=hint,
        )
    if extra := checkpoint.tensors.keys() - base.sha256.keys():
        raise CheckpointError(
            f"`{checkpoint.folder}` is not the base of this delta, which has no "
            f"`{quote(min(extra))}`",
            hint=hint,
        )
    for name, expected in base.sha256.items():
        progress(name)
        if tensor_sha256(checkpoint, name) != expected:
            raise CheckpointError(
                f"`{checkpoint.folder}` is not the base of this delta: `{quote(name)}` has other "
                "values",
                hint=hint,
            )


def quantized_from_base(delta: DeltaFolder, checkpoint: Checkpoint) -> bool:
    """Say whether unicomp made a checkpoint from the delta's base, and its files are as it made.

    Then base plus delta is near the fine-tune, as near as the checkpoint is to the base.
    """
    if not (checkpoint.folder / NAME).is_file():
        return False
    made = manifests.read(checkpoint.folder)
    weights = {
        name: own for name, own in delta.manifest.base.files.items() if name.endswith(SUFFIX)
    }
    if {name: own for name, own in made.source.sha256.items() if name.endswith(SUFFIX)} != weights:
        return False
    found = checkpoint.sha256()
    return all(
        name in made.files and made.files[name].sha256 == found[name] for name in checkpoint.shards
    )


def _read_manifest(path: Path) -> DeltaManifest:
    if not path.is_file():
        raise CheckpointError(f"`{path}` is absent", hint="fetch or make the delta again")
    value = parse_json(path, read_small(path, LIMIT).strip())
    if value.get("schema") != SCHEMA:
        raise CheckpointError(
            f"`{path}` has schema `{quote(str(value.get('schema')))}`, not `{SCHEMA}`",
            hint="read it with the release of unicomp that wrote it",
        )
    try:
        return DeltaManifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CheckpointError(
            f"`{path}` is no delta's manifest: `{quote(where)}`: {first['msg'].lower()}",
            hint="it was changed by hand or by another tool; fetch or make the delta again",
        ) from error


def _metadata(path: Path) -> dict[str, Any]:
    """Return the words of a header that `read_header` found sound."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    words = header.get("__metadata__")
    return words if isinstance(words, dict) else {}


def _unlike(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"`{folder}` is not as its `{NAME}` says: {what}", hint="fetch or make the delta again"
    )

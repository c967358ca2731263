"""`unicomp.json`: what made a checkpoint, and what it must hold.

The manifest names its inputs by hash, its stages with all their options, what happened to every
module, and every file with its hash. Two runs with the same inputs and seed differ only in
`TIMINGS`: `stages[].seconds`, the peaks, `cost`, `versions` and `machine`.

Numbers are finite: an error that could not be measured is null, never NaN. Keys that a newer
unicomp may have added to schema `unicomp.manifest/1` are read over.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from unicomp import hashing
from unicomp.checkpoint import Checkpoint, check_finite
from unicomp.errors import CheckpointError
from unicomp.folder import CONFIG_LIMIT, quote, read_small, unreadable

NAME = "unicomp.json"
SCHEMA = "unicomp.manifest/1"

# Files that describe the folder and that a later score may rewrite: they carry no hash.
UNHASHED = ("report.json", "README.md")

# A manifest of a large mixture of experts is the longest: 100,000 modules of some 400 bytes.
LIMIT = 100 * CONFIG_LIMIT

EXPERT = re.compile(r"(?<=\.experts)\.\d+\.\w+$")  # one of those stored in one tensor
PIECE = 1 << 26  # bytes of a tensor in memory at once when values are checked

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Source(_Part):
    """The checkpoint that went in.

    id        the Hub id, `builtin:...`, or the name of the folder; never a path of this machine
    revision  the Hub commit, else None
    sha256    of each of its files
    """

    id: str
    revision: str | None
    sha256: dict[str, Sha256]


class CalibrationPart(_Part):
    """One text of those that statistics were gathered on.

    share    of all windows that was asked for
    samples  windows of it
    """

    source: str
    sha256: Sha256
    share: float
    samples: Count


class Calibration(_Part):
    """The text that statistics were gathered on; lengths in tokens.

    sha256  of the text's files; of a mix, of its parts' hashes one after another
    parts   each text; empty where an older version did not say
    """

    source: str
    sha256: Sha256
    samples: Count
    seq_len: Count
    seed: int
    parts: list[CalibrationPart] = Field(default_factory=list)


class Module(_Part):
    """What happened to one linear layer.

    bits, group_size  as stored; both None where the weight was kept dense
    symmetric         no zero point; None where dense
    sparsity          share of weights that are zero; None where none were made so
    bytes             of the stored tensors of its weight
    error_before      relative output error of round-to-nearest with the same bits and groups, or
                      of pruning by magnitude with the same pattern
    error_after       relative output error of what is stored
    error_predicted   what the pivots let expect of `error_after`, before any rounding
    damp              fraction of the Hessian's mean diagonal that was added
    clip_fraction     codes at the end of their range because the value lay beyond, of all codes
    tokens            calibration tokens that reached the layer
    fallback          why this is not what the stage asked for, else None
    """

    bits: Annotated[int, Field(ge=1, le=8)] | None
    group_size: int | None
    symmetric: bool | None = None
    sparsity: float | None = None
    bytes: Count
    error_before: float | None
    error_after: float | None
    error_predicted: float | None = None
    damp: float | None
    clip_fraction: float | None
    tokens: Count
    fallback: str | None


class Shape(_Part):
    """The sizes of a model before and after, and the source's layers that were kept."""

    before: dict[str, Count]
    after: dict[str, Count]
    kept: dict[str, list[Count]]


class Training(_Part):
    """How a student was trained, and what held-out text says of it.

    stopped        what ended it: `passes`, `max_steps`, `max_tokens`, `max_time`, `early_stop`
    before, after  held-out figures of the student as stored: nll, brier, accuracy, confidence,
                   gap, ece, entropy, teacher_entropy, entropy_ratio, kl; nats and shares
    temperature    one fitted on a part of the held-out text, and what it does on the other part
    """

    teacher: Source
    data: str
    data_sha256: Sha256
    held_out: str
    held_out_sha256: Sha256
    seq_len: Count
    steps: Count
    tokens: Count
    stopped: str
    before: dict[str, float]
    after: dict[str, float]
    temperature: dict[str, float] | None


class Stage(_Part):
    """One stage of the recipe as it ran; peaks in bytes; `shape` where it changed any.

    held_out  where another stage trains: figures after this one, on the windows of that training
    """

    verb: str
    method: str
    options: dict[str, Any]
    seconds: float
    peak_rss_bytes: Count
    peak_gpu_bytes: Count | None
    modules: dict[str, Module]
    shape: Shape | None = None
    training: Training | None = None
    held_out: dict[str, float] | None = None


class Totals(_Part):
    """The whole checkpoint: parameters, bytes of tensors before and after.

    params_in  parameters of the source, where they are others
    """

    params: Count
    params_in: Count | None = None
    bytes_in: Count
    bytes_out: Count
    bits_per_weight: float


class File(_Part):
    """One file of the output."""

    sha256: Sha256
    bytes: Count


class Spent(_Part):
    """Seconds of a whole command, and the greatest resident size of its process.

    seconds  None: it was interrupted, and what came before was not counted
    """

    seconds: float | None
    peak_rss_bytes: Count


class Cost(_Part):
    """What the plan said that a run would cost, and what it cost."""

    forecast: Spent
    actual: Spent


class Manifest(_Part):
    """`unicomp.json`.

    cost  None where it was not counted: of what an older version made, and of deltas
    """

    schema_: Literal["unicomp.manifest/1"] = Field("unicomp.manifest/1", alias="schema")
    source: Source
    recipe_sha256: Sha256
    calibration: Calibration | None
    stages: list[Stage]
    totals: Totals
    files: dict[str, File]
    versions: dict[str, str]
    machine: dict[str, Any]
    seeds: dict[str, int]
    notes: list[str] = Field(default_factory=list)
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values, keys in the order of the schema."""
        return self.model_dump(mode="json", by_alias=True)


def read(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder.

    Raises CheckpointError if there is none, or one that is not of this schema.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(
            f"`{folder}` has no `{NAME}`", hint="only checkpoints that unicomp made have one"
        )
    try:
        value = json.loads(read_small(path, LIMIT).decode("utf-8"))
        if isinstance(value, dict) and value.get("schema") != SCHEMA:
            raise CheckpointError(
                f"`{path}` has schema `{quote(str(value.get('schema')))}`, not `{SCHEMA}`",
                hint="read it with the release of unicomp that wrote it",
            )
        return Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        more = f", and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise CheckpointError(
            f"`{path}` is not a manifest: `{quote(where)}`: {first['msg'].lower()}{more}",
            hint="it was changed by hand or by another tool; compare it with the published one",
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}` is not JSON: {quote(str(error))}", hint="fetch or make the folder again"
        ) from error


def write(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a folder: whole or not at all, and on the disk when this returns."""
    path = folder / NAME
    text = json.dumps(manifest.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    fresh = path.with_name(f"{NAME}.new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"`{path}` cannot be written: {error.strerror or error}",
            hint="check the disk and the folder's permissions",
        ) from error


def hashes(folder: Path) -> dict[str, File]:
    """Return name -> hash and size of every file that the manifest of this folder lists."""
    return {name: _hash(folder / name) for name in _present(folder)}


def verify(folder: Path) -> list[str]:
    """Read a whole checkpoint: files and modules against its manifest if it has one, all values.

    returns  every problem found, in words; empty if there is none

    Raises CheckpointError if there is a manifest that cannot be read.
    """
    problems: list[str] = []
    manifest = read(folder) if (folder / NAME).is_file() else None
    if manifest is not None:
        problems += _wrong_files(folder, manifest)
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        return [*problems, error.message]
    if manifest is not None:
        problems += _wrong_modules(checkpoint, manifest)
    return [*problems, *wrong_values(checkpoint)]


def wrong_values(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield a problem for each tensor that cannot be read, or holds NaN or infinite values.

    At most `PIECE` bytes of a tensor are in memory at once, or one row.
    """
    for name, info in checkpoint.tensors.items():
        rows = info.shape[0] if info.shape else 0
        step = max(1, rows * PIECE // info.nbytes) if info.nbytes > PIECE else rows
        shard = str(checkpoint.folder / info.shard)
        try:
            if step >= rows:
                check_finite(name, checkpoint.read(name), shard)
                continue
            for start in range(0, rows, step):
                part = checkpoint.read(name, slice(start, min(start + step, rows)))
                check_finite(f"{name}[{start}:]", part, shard)
        except CheckpointError as error:
            yield error.message


def _wrong_files(folder: Path, manifest: Manifest) -> Iterator[str]:
    present = _present(folder)
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield f"`{NAME}` names a file outside the folder: `{quote(name)}`"
        elif name not in present:
            yield f"`{path}` is absent"
        elif (size := path.stat().st_size) != expected.bytes:
            yield f"`{path}` has {size} bytes, not {expected.bytes}"
        elif (found := _hash(path).sha256) != expected.sha256:
            yield f"`{path}` has sha256 {found}, not {expected.sha256}"
    for name in present:
        if name not in manifest.files:
            yield f"`{folder / name}` is not in the manifest"


def _wrong_modules(checkpoint: Checkpoint, manifest: Manifest) -> Iterator[str]:
    stored: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "bias":
            stored[module] = stored.get(module, 0) + info.nbytes
    promised: dict[str, int] = {}
    for stage in manifest.stages[-1:]:
        for module, expected in stage.modules.items():
            stack = EXPERT.sub("", module)
            name = module if module in stored else stack
            promised[name] = promised.get(name, 0) + expected.bytes
    for name, expected_bytes in promised.items():
        if name not in stored:
            yield f"`{quote(name)}` is in the manifest, but no tensor is stored for it"
        elif stored[name] != expected_bytes:
            yield (
                f"`{quote(name)}` takes {stored[name]} bytes, "
                f"but the manifest says {expected_bytes}"
            )
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    if total != manifest.totals.bytes_out:
        yield f"all tensors take {total} bytes, but the manifest says {manifest.totals.bytes_out}"


def _present(folder: Path) -> list[str]:
    """Return every file under the folder that a manifest lists; hidden ones are other tools'."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if path.is_file() and not hidden and name not in (NAME, *UNHASHED):
            found.append(name)
    return found


def _hash(path: Path) -> File:
    try:
        digest, size = hashing.of_file(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return File(sha256=digest, bytes=size)

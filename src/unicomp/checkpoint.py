"""A checkpoint on disk, opened by its headers: a folder in Hugging Face layout.

Opening reads `config.json`, the index and the header of every shard, and nothing else. All that
headers can show to be wrong is found there, before any work: sizes, types, overlaps, holes,
truncated or absent shards. `read` then brings one tensor, or rows of one, into fresh memory with
plain reads: a mapped file would count against the peak memory for as long as its pages stay.

A safetensors file is 8 bytes (the header's length, little-endian), a JSON header that gives each
tensor's dtype, shape and span, and the tensors' bytes back to back, row-major, little-endian.
Files that hold pickles (`.bin`, `.pt`) can run code when loaded: they are refused.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from unicomp import hashing
from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.folder import (
    DAMAGED,
    HEADER_LIMIT,
    INDEX,
    SINGLE,
    check_regular,
    companions,
    find_weights,
    not_a_folder,
    parse_json,
    quote,
    read_config,
    unreadable,
)
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

RANK_LIMIT = 64
"""Most dimensions of a tensor."""

DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Every safetensors dtype -> bits of one element."""

TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64", "I64": "int64", "U64": "uint64", "C64": "complex64",
    "F32": "float32", "I32": "int32", "U32": "uint32",
    "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16",
    "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}  # fmt: skip
"""safetensors dtype -> its name in torch."""


class _Dtypes(Mapping[str, "torch.dtype"]):
    """What torch has of these; nobody asks it before somebody looks."""

    def __getitem__(self, name: str) -> torch.dtype:
        """Return torch's own; KeyError where it has none."""
        found: torch.dtype | None = getattr(torch, TORCH_NAMES.get(name, ""), None)
        if found is None:
            raise KeyError(name)
        return found

    def __iter__(self) -> Iterator[str]:
        """Yield the names of those that torch has."""
        return (name for name, own in TORCH_NAMES.items() if hasattr(torch, own))

    def __len__(self) -> int:
        """Return how many torch has."""
        return sum(1 for _ in self)


DTYPES: Mapping[str, torch.dtype] = _Dtypes()
"""safetensors dtype -> torch dtype, as far as this torch has it."""


_Kind = tuple[str, tuple[int, ...], int]  # dtype, shape, bytes


class TensorInfo(NamedTuple):
    """Where one tensor lies.

    shape   in elements; an `F4` tensor reads as torch's pairs, its last dimension halved
    offset  bytes from the start of the shard file
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk: its configuration and where each tensor lies.

    tensors  by name, in the order of the shards and of their headers
    shards   weight files, in order; the index is `index` or None
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    shards: tuple[str, ...]
    index: str | None

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the configuration and all headers, and check whatever they show.

        Raises CheckpointError for anything broken, incomplete or inconsistent.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise not_a_folder(folder)
        indexed = find_weights(folder)
        config = read_config(folder)
        shards = sorted(set(indexed.values())) if indexed else [SINGLE]
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for info in read_header(folder / shard):
                if info.name in tensors:
                    raise CheckpointError(
                        f"`{folder}`: tensor `{quote(info.name)}` is in two shards: "
                        f"`{tensors[info.name].shard}` and `{shard}`",
                        hint="two checkpoints may be mixed in one folder: download it again",
                    )
                tensors[info.name] = info
        if not tensors:
            raise CheckpointError(
                f"`{folder}`: its weight files hold no tensor", hint="fetch or save it again"
            )
        if indexed is not None:
            _match_index(folder, indexed, tensors)
        return cls(folder, config, tensors, tuple(shards), INDEX if indexed else None)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read one tensor in the dtype it is stored in.

        rows  part of dimension 0, step 1
        returns  a tensor of its own memory, on the CPU

        Raises CheckpointError if the shard has changed since it was opened.
        """
        info = self.tensors[name]
        path = self.folder / info.shard
        if info.dtype not in DTYPES:
            raise UnsupportedError(
                f"`{path}`: `{quote(name)}` has dtype `{info.dtype}`, which torch "
                f"{torch.__version__} does not have",
                hint="use a newer torch, or the unquantized checkpoint",
            )
        little_endian()
        shape, offset, nbytes = info.shape, info.offset, info.nbytes
        if rows is not None:
            if not shape or rows.step not in (None, 1):
                raise ValueError(f"rows {rows} of `{name}` with shape {shape}")
            start, stop, _ = rows.indices(shape[0])
            row_bits = math.prod(shape[1:]) * DTYPE_BITS[info.dtype]
            if row_bits * start % 8 or row_bits * stop % 8:
                raise ValueError(f"rows {rows} of `{name}` do not start and end on a byte")
            shape = (max(stop - start, 0), *shape[1:])
            offset += start * row_bits // 8
            nbytes = shape[0] * row_bits // 8
        data = _read_bytes(path, offset, nbytes)
        if info.dtype == "BOOL":
            return (data != 0).reshape(shape)  # any other byte is no bool, and undefined as one
        return data.view(DTYPES[info.dtype]).reshape(stored_shape(info.dtype, shape))

    def files(self) -> list[str]:
        """Return the weight shards in order, then the other files that belong to the checkpoint.

        These are the index, the configuration, the tokenizer's files and the licence, sorted.
        """
        return [*self.shards, *self.companions()]

    def companions(self) -> list[str]:
        """Return the files that belong to the checkpoint beside its shards, sorted."""
        index = [] if self.index is None else [self.index]
        return sorted([*index, *companions(self.folder)])

    def sha256(self, progress: Callable[[int], None] | None = None) -> dict[str, str]:
        """Return the SHA-256 of each of `files()`, read in pieces.

        progress  called with the bytes read so far after each file
        """
        hashes = {}
        done = 0
        for name in self.files():
            path = self.folder / name
            try:
                hashes[name], size = hashing.of_file(path)
            except OSError as error:
                raise unreadable(path, error) from error
            done += size
            if progress is not None:
                progress(done)
        return hashes


def is_float(dtype: str) -> bool:
    """Tell whether a safetensors dtype holds real numbers with a point."""
    return dtype.startswith(("F", "BF"))


def stored_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape a torch tensor has for `shape` elements: torch's `F4` holds pairs."""
    return (*shape[:-1], shape[-1] // 2) if dtype == "F4" else shape


def check_finite(name: str, tensor: Tensor, shard: str | None = None) -> None:
    """Raise CheckpointError if a value is NaN or infinite, naming the first one and their count.

    tensor  any dtype; integers pass unread
    shard   the file it is from, where known
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return
    if tensor.dtype == DTYPES.get("F4"):
        return  # the format has neither NaN nor infinity
    flat = tensor.detach().reshape(-1)
    if tensor.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    first: int | None = None
    value, count, offset = 0.0, 0, 0
    for piece in torch.split(flat, 1 << 22):
        # torch.isfinite takes no 8-bit float, or is wrong (2.13: true for the NaN of F8_E8M0).
        values = piece.float() if piece.element_size() == 1 else piece
        wide = torch.float64 if values.dtype == torch.float64 else torch.float32
        # One pass without temporaries; a sum that overflows by itself is settled by the slow path.
        if not math.isfinite(values.sum(dtype=wide).item()):
            bad = (~torch.isfinite(values)).nonzero().reshape(-1)
            if first is None and len(bad):
                first = offset + int(bad[0])
                value = float(values[int(bad[0])])
            count += len(bad)
        offset += len(piece)
    if first is None:
        return
    if tensor.is_complex():
        first //= 2
    position = []
    for size in reversed(tensor.shape):
        first, place = divmod(first, size)
        position.append(place)
    kind = "NaN" if math.isnan(value) else "infinite"
    raise CheckpointError(
        ("" if shard is None else f"`{shard}`: ")
        + f"`{quote(name)}` holds NaN or infinite values: {count} of {flat.numel()}, "
        f"the first ({kind}) at {position[::-1]}",
        hint="download the checkpoint again and compare its hashes; if it was saved so, "
        "its training diverged: use an earlier step",
    )


def read_header(path: Path) -> list[TensorInfo]:
    """Read and check the header of one safetensors file.

    returns  its tensors in the order of the header

    Raises CheckpointError naming the file, the tensor and the limit.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if prefix == b"version " and size < 1024:
                raise CheckpointError(
                    f"`{path}` is a Git LFS pointer, not the weights: {size} bytes",
                    hint="fetch the file itself: `git lfs pull`",
                )
            if len(prefix) < 8:
                raise _truncated(path, "its header", 8 - len(prefix))
            if length > HEADER_LIMIT:
                raise CheckpointError(
                    f"`{path}`: header of {length} bytes is over the limit of {HEADER_LIMIT} bytes",
                    hint="this is no safetensors file, or a damaged one: download it again",
                )
            if 8 + length > size:
                raise _truncated(path, "its header", 8 + length - size)
            header = parse_json(path, file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"`{path.parent}`: shard `{path.name}` is absent",
            hint="the download may be incomplete: fetch the missing file",
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    known: dict[Any, _Kind] = {}
    infos = [
        _info(path, name, entry, 8 + length, known)
        for name, entry in header.items()
        if name != "__metadata__"
    ]
    _check_spans(path, infos, 8 + length, size)
    return infos


def _info(path: Path, name: str, entry: Any, start: int, known: dict[Any, _Kind]) -> TensorInfo:
    """Check one header entry by itself.

    start  where the data begins in the file
    known  what was found right so far: a model of many experts has ten thousands of tensors of
           three kinds
    """
    if not isinstance(entry, dict):
        raise _wrong(path, name, "has no dtype, shape and offsets")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    kind = known.get((dtype, *shape)) if _naturals(shape) and isinstance(dtype, str) else None
    if kind is None:
        kind = _kind(path, name, dtype, shape)
        known[dtype, *shape] = kind
    dtype, shape, nbytes = kind
    if not _naturals(span) or len(span) != 2 or span[0] > span[1]:
        raise _wrong(path, name, f"has no valid offsets: {quote(str(span))}")
    if span[1] - span[0] != nbytes:
        raise _wrong(
            path,
            name,
            f"of {dtype} and shape {list(shape)} takes {nbytes} bytes, but its offsets {span} "
            f"hold {span[1] - span[0]}",
        )
    return TensorInfo(name, dtype, shape, path.name, start + span[0], nbytes)


def _kind(path: Path, name: str, dtype: Any, shape: Any) -> _Kind:
    """Check dtype and shape of a tensor; return both, and the bytes that they take."""
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _wrong(
            path,
            name,
            f"has unknown dtype `{quote(str(dtype))}`",
            hint=f"known are {', '.join(DTYPE_BITS)}",
        )
    if not _naturals(shape) or len(shape) > RANK_LIMIT:
        raise _wrong(
            path,
            name,
            f"has no valid shape: {quote(str(shape))}",
            hint=f"a shape is a list of at most {RANK_LIMIT} non-negative integers",
        )
    if math.prod(size for size in shape if size) >= 1 << 63:
        raise _wrong(path, name, f"is too large: shape {quote(str(shape))}")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or (dtype == "F4" and (not shape or shape[-1] % 2)):
        raise _wrong(path, name, f"of {dtype} and shape {shape} does not end on a whole byte")
    return dtype, tuple(shape), bits // 8


def _wrong(path: Path, name: str, what: str, *, hint: str = DAMAGED) -> CheckpointError:
    """Return what is wrong with one entry of a header."""
    return CheckpointError(f"`{path}`: `{quote(name)}` {what}", hint=hint)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    for item in value:  # noqa: SIM110  # a generator takes twice the time, and there are many
        if type(item) is not int or item < 0:
            return False
    return True


def _check_spans(path: Path, infos: list[TensorInfo], start: int, size: int) -> None:
    """Check that the tensors fill the file from `start` to `size` without overlap or hole."""
    end, last = start, "the header"
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset < end:
            raise CheckpointError(
                f"`{path}`: `{quote(info.name)}` overlaps {last} by {end - info.offset} bytes",
                hint=DAMAGED,
            )
        if info.offset > end:
            raise CheckpointError(
                f"`{path}`: a hole of {info.offset - end} bytes between {last} and "
                f"`{quote(info.name)}`",
                hint=DAMAGED,
            )
        end, last = info.offset + info.nbytes, f"`{quote(info.name)}`"
    if end > size:
        cut = next(info for info in infos if info.offset + info.nbytes > size)
        raise _truncated(path, f"`{quote(cut.name)}`", end - size)
    if end < size:
        raise CheckpointError(
            f"`{path}`: {size - end} bytes after the last tensor that the header does not name",
            hint=DAMAGED,
        )


def _match_index(folder: Path, indexed: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, shard in indexed.items():
        if name not in tensors:
            raise CheckpointError(
                f"`{folder / INDEX}`: tensor `{quote(name)}` is absent from its shard `{shard}`",
                hint="index and shards are not of one checkpoint: download both again",
            )
        if tensors[name].shard != shard:
            raise CheckpointError(
                f"`{folder / INDEX}`: tensor `{quote(name)}` is in `{tensors[name].shard}`, "
                f"not in `{shard}`",
                hint="index and shards are not of one checkpoint: download both again",
            )
    for name, info in tensors.items():
        if name not in indexed:
            raise CheckpointError(
                f"`{folder / info.shard}`: tensor `{quote(name)}` is not listed by `{INDEX}`",
                hint="index and shards are not of one checkpoint: download both again",
            )


def _read_bytes(path: Path, offset: int, nbytes: int) -> Tensor:
    """Read a span of a file into fresh memory: uint8 [nbytes]."""
    data = torch.empty(nbytes, dtype=torch.uint8)
    view = memoryview(data.numpy())  # type: ignore[arg-type]  # an array is a buffer
    done = 0
    try:
        # Opened anew for each read: no descriptor is kept, and threads share no position.
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while done < nbytes:
                count = file.readinto(view[done : done + (1 << 30)])
                if not count:
                    raise _truncated(path, f"what was read at byte {offset}", nbytes - done)
                done += count
    except OSError as error:
        raise unreadable(path, error) from error
    return data


def little_endian() -> None:
    """Refuse a machine of the other byte order: tensors are moved as they lie."""
    if sys.byteorder != "little":
        raise UnsupportedError("safetensors files are little-endian and this machine is not")


def _truncated(path: Path, what: str, missing: int) -> CheckpointError:
    return CheckpointError(
        f"`{path}` is truncated in {what}: {missing} bytes are missing",
        hint="the download may be incomplete: fetch the file again",
    )

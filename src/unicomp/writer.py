"""Weight files written in place: the layout is known before any weight is.

All headers are written and all space is reserved before the first tensor, so that a full disk is
found before the work and not after it. Tensors are then written where they belong, in any order,
which is what lets an interrupted run go on: the files are already whole in size, and the journal
of the run says which tensors they hold. `publish` gives a finished folder its final name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from unicomp.checkpoint import DTYPE_BITS, DTYPES, little_endian, stored_shape
from unicomp.errors import CheckpointError, UnicompError
from unicomp.folder import INDEX, SINGLE, quote, unreadable
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

_FRESH = ".new"  # suffix of a file that is not whole yet


class Meta(NamedTuple):
    """A tensor to write: its safetensors dtype and its shape in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that its data takes."""
        return prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def shard(tensors: Sequence[Meta], max_shard_bytes: int) -> list[list[Meta]]:
    """Split tensors, in the order given, into shards of at most `max_shard_bytes` of data.

    A tensor larger than that has a shard of its own.
    """
    shards: list[list[Meta]] = []
    room = 0
    for meta in tensors:
        if not shards or meta.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(meta)
        room -= meta.nbytes
    return shards


class Writer:
    """The weight files of a checkpoint being made: `model.safetensors`, or shards and an index.

    No descriptor is kept between calls. Tensors may be written from several threads.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Sequence[Meta],
        *,
        max_shard_bytes: int = 5_000_000_000,
        single: str = SINGLE,
        metadata: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Lay out the files in `folder`, or open again what an interrupted run left there.

        tensors          all that will be written; the order decides which shard each is in
        max_shard_bytes  data of one shard file
        single           name of the file where there is one shard
        metadata         words of the headers, beside the format's

        Raises UnicompError if the disk is too small or the folder cannot be written, and
        CheckpointError if weight files of another layout are there.
        """
        little_endian()
        _check_metas(tensors)
        self.folder = folder
        shards = shard(tensors, max_shard_bytes)
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = [single]
        self._metas = {meta.name: meta for meta in tensors}
        self._spans: dict[str, tuple[str, int]] = {}
        self._rows: dict[str, int] = {}
        self._written: set[str] = set()
        self._touched: set[str] = set()
        headers: dict[str, tuple[bytes, int]] = {}
        for name, metas in zip(names, shards, strict=True):
            header, offsets = _header(metas, metadata)
            self._spans |= {key: (name, offset) for key, offset in offsets.items()}
            headers[name] = header, len(header) + sum(meta.nbytes for meta in metas)
        self._many = len(shards) > 1
        self._lay_out(headers)

    @property
    def shards(self) -> list[str]:
        """The names of the weight files, in order."""
        return sorted({name for name, _ in self._spans.values()})

    def write(self, name: str, tensor: Tensor, rows: slice | None = None) -> None:
        """Write a tensor where it belongs; again overwrites.

        tensor  of the dtype and shape that were laid out; any device, any strides
        rows    the part of dimension 0 that `tensor` is; parts come in order, from the first row
        """
        meta = self._metas[name]
        shape, start = meta.shape, 0
        if rows is not None:
            start, stop, _ = rows.indices(shape[0])
            if start not in (0, self._rows.get(name, 0)):
                raise ValueError(f"rows of `{name}` from {start}, not {self._rows.get(name, 0)}")
            shape = (stop - start, *shape[1:])
            self._rows[name] = stop
        if tensor.dtype != DTYPES[meta.dtype] or tensor.shape != stored_shape(meta.dtype, shape):
            raise ValueError(
                f"`{name}`: laid out as {meta.dtype} {shape}, got {tensor.dtype} "
                f"{tuple(tensor.shape)}"
            )
        file, offset = self._spans[name]
        offset += start * (meta.nbytes // meta.shape[0]) if start else 0
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        path = self.folder / file
        with _written(path, len(data)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                _pwrite(descriptor, memoryview(data.numpy()), offset)  # type: ignore[arg-type]
            finally:
                os.close(descriptor)
        self._touched.add(file)
        if rows is None or self._rows[name] == meta.shape[0]:
            self._written.add(name)

    def mark(self, names: Iterable[str]) -> None:
        """Count tensors as written: an earlier process wrote and synced them."""
        names = set(names)
        if unknown := names - self._metas.keys():
            raise ValueError(f"not laid out: {sorted(unknown)[:5]}")
        self._written |= names

    def sync(self) -> None:
        """Bring to disk what was written since the last sync."""
        while self._touched:
            file = self._touched.pop()
            try:
                _fsync(self.folder / file)
            except UnicompError:
                self._touched.add(file)
                raise

    def finish(self) -> None:
        """Write the index, if there is more than one shard, and bring all to disk.

        Raises ValueError if a tensor was neither written nor marked.
        """
        if missing := self._metas.keys() - self._written:
            raise ValueError(f"{len(missing)} tensors not written: {sorted(missing)[:5]}")
        self.sync()
        if self._many:
            total = sum(meta.nbytes for meta in self._metas.values())
            weight_map = {name: self._spans[name][0] for name in sorted(self._spans)}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
            write_file(self.folder / INDEX, text.encode())
        _fsync(self.folder)

    def _lay_out(self, headers: dict[str, tuple[bytes, int]]) -> None:
        """Make each file with its header and all its space, or check the one that is there."""
        with _written(self.folder, 0):
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.rglob(f"*{_FRESH}"):
                path.unlink()  # a process was killed while it wrote this one
            there = {path.name for path in self.folder.glob("*.safetensors")}
        if strange := there - headers.keys():
            raise _other_layout(self.folder / min(strange))
        for name in sorted(there):
            _check_existing(self.folder / name, *headers[name])
        missing = {name: size for name, (_, size) in headers.items() if name not in there}
        needed = sum(missing.values())
        with _written(self.folder, needed):
            if needed > (free := shutil.disk_usage(self.folder).free):
                raise _full(self.folder, needed, free)
        fresh = {name: self.folder / (name + _FRESH) for name in missing}
        with _written(self.folder, needed):
            try:
                for name, size in missing.items():
                    _reserve(fresh[name], headers[name][0], size)
            except OSError:
                for path in fresh.values():
                    path.unlink(missing_ok=True)  # first: the message counts the free space
                raise
            # Only whole files get their names, so a file that has its name is whole.
            for name, path in fresh.items():
                path.replace(self.folder / name)
        _fsync(self.folder)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that either the old or the new one is there, never half of it."""
    fresh = path.with_name(path.name + _FRESH)
    with _written(path, len(data)):
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes in pieces, following links, so that `target` is whole or not there."""
    fresh = target.with_name(target.name + _FRESH)
    try:
        size = source.stat().st_size
        file = source.open("rb")
    except OSError as error:
        raise unreadable(source, error) from error
    with file, _written(target.parent, size):
        target.parent.mkdir(parents=True, exist_ok=True)
        with fresh.open("wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        fresh.replace(target)


def check_target(final: Path, *, overwrite: bool) -> None:
    """Check, before any work, that `publish` will be allowed to use the name `final`.

    Raises UnicompError if it exists and `overwrite` is false, if it exists and is not a folder
    that a tool like ours made, or if its parent cannot be written.
    """
    if os.path.lexists(final):
        if not overwrite:
            raise UnicompError(
                f"output `{final}` exists", hint="choose another folder, or give `--overwrite`"
            )
        try:
            names = {path.name for path in final.iterdir()} if final.is_dir() else {"a file"}
        except OSError as error:
            raise _refused(final, error) from error
        if names and "config.json" not in names:
            raise UnicompError(
                f"output `{final}` exists and is not a checkpoint folder: it is not overwritten",
                hint="choose another folder, or remove this one yourself",
            )
    parent = Path(os.path.abspath(final)).parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UnicompError(f"`{parent}` is not a folder", hint="choose another output folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _refused(parent, OSError(errno.EACCES, "not writable"))


def publish(partial: Path, final: Path, *, overwrite: bool) -> None:
    """Give a finished folder its final name, after all of it is on disk.

    Under the final name stands, at each moment, the old folder, nothing, or the whole new one. With
    `overwrite` the old folder is first moved aside and removed last. If the machine stops in
    between, `partial` is still whole or already published, and the next `publish` tidies up.
    """
    check_target(final, overwrite=overwrite)
    final = Path(os.path.abspath(final))
    old = final.with_name(f".{final.name}.replaced-by-unicomp")
    with _written(partial, 0):
        for path in [partial, *sorted(partial.rglob("*"))]:
            if path.name.endswith(_FRESH):
                path.unlink()  # a process was killed while it wrote this one
            elif not path.is_symlink():
                _fsync(path)
    with _written(final.parent, 0):
        final.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(final):
            _remove(old)
            final.rename(old)
        try:
            partial.rename(final)
        except OSError:
            if os.path.lexists(old) and not os.path.lexists(final):
                old.rename(final)
            raise
        _fsync(final.parent)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_metas(tensors: Sequence[Meta]) -> None:
    """Refuse what no caller may ask for; these are faults of the program, not of the user."""
    if not tensors:
        raise ValueError("no tensors to write")
    if len({meta.name for meta in tensors}) < len(tensors):
        raise ValueError("two tensors of one name")
    for meta in tensors:
        if meta.name == "__metadata__" or meta.dtype not in DTYPES:
            raise ValueError(f"cannot be written: {meta}")
        if prod(meta.shape) * DTYPE_BITS[meta.dtype] % 8 or min(meta.shape, default=0) < 0:
            raise ValueError(f"not a whole number of bytes: {meta}")


def _header(metas: Sequence[Meta], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """Return the first bytes of a shard, and where in the file each tensor starts.

    Widest elements first, and the header padded to 8 bytes: so every tensor is aligned to its
    elements. Then by name: the same tensors always make the same file.
    """
    ordered = sorted(metas, key=lambda meta: (-DTYPE_BITS[meta.dtype], meta.name))
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offsets: dict[str, int] = {}
    end = 0
    for meta in ordered:
        offsets[meta.name] = end
        span = [end, end + meta.nbytes]
        entries[meta.name] = {"dtype": meta.dtype, "shape": meta.shape, "data_offsets": span}
        end = span[1]
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + offset for name, offset in offsets.items()}


def _reserve(path: Path, header: bytes, size: int) -> None:
    """Make a file of `size` bytes that starts with `header`, its space taken from the disk."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except (AttributeError, OSError) as error:
            # macOS has no such call and some filesystems refuse it. The free space was compared
            # before, which is then the only guard: the file is sparse, and a write can still fail.
            unsupported = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
            if isinstance(error, OSError) and error.errno not in unsupported:
                raise
            os.ftruncate(descriptor, size)
        _pwrite(descriptor, memoryview(header), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _pwrite(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + (1 << 30)], offset + done)


def _fsync(path: Path) -> None:
    with _written(path, 0):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _check_existing(path: Path, header: bytes, size: int) -> None:
    """Check that a file left by an interrupted run is the one that would be laid out now."""
    try:
        with path.open("rb") as file:
            found = file.read(len(header))
            length = file.seek(0, 2)
    except OSError as error:
        raise _refused(path, error) from error
    if found != header or length != size:
        raise _other_layout(path)


def _other_layout(path: Path) -> CheckpointError:
    return CheckpointError(
        f"`{quote(str(path))}` is of another layout than this run writes",
        hint="start over with `--fresh`, or choose another output folder",
    )


@contextlib.contextmanager
def _written(path: Path, needed: int) -> Iterator[None]:
    """Turn the operating system's refusals to write below `path` into errors of ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = path if path.is_dir() else path.parent
            raise _full(folder, needed, shutil.disk_usage(folder).free) from error
        raise _refused(path, error) from error


def _full(folder: Path, needed: int, free: int) -> UnicompError:
    return UnicompError(
        f"`{folder}`: no space left on the disk: {needed} bytes needed, {free} bytes free",
        hint="free some space, or choose an output folder on another disk",
    )


def _refused(path: Path, error: OSError) -> UnicompError:
    hints = {
        errno.EROFS: "the filesystem is read-only: choose another output folder",
        errno.EFBIG: "the filesystem takes no file of this size: use smaller shards",
    }
    return UnicompError(
        f"`{path}` cannot be written: {error.strerror or error}",
        hint=hints.get(error.errno or 0, "check its permissions, or choose another output folder"),
    )

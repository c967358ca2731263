"""Activations of all calibration windows: in files that the operating system caches, or in memory.

With a file, memory holds a batch of them, and an interrupted run finds them again.
"""

import contextlib
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unicomp.errors import CheckpointError


class HiddenStates:
    """What every calibration window has at one place of the model.

    path    the file, made when written first; None: in memory
    shape   (windows, seq_len, hidden)
    dtype   float32 or bfloat16
    """

    def __init__(
        self,
        path: Path | None,
        shape: tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._file = path
        self._held = torch.empty(shape, dtype=dtype) if path is None else None
        self.shape = shape
        self.dtype = dtype

    @property
    def path(self) -> Path:
        """The file; ValueError where there is none."""
        if self._file is None:
            raise ValueError("held in memory")
        return self._file

    @property
    def nbytes(self) -> int:
        """The size in bytes once it is whole."""
        windows, seq_len, width = self.shape
        return windows * seq_len * width * self.dtype.itemsize

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the windows in order, `size` at a time: [size, seq_len, hidden].

        Those of a file are its pages, not copies of them; what is changed does not reach the file.
        """
        if self._held is not None:
            yield from torch.split(self._held, size)
            return
        windows, seq_len, width = self.shape
        window = seq_len * width * self.dtype.itemsize
        with self.path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self.nbytes:
                raise CheckpointError(
                    f"`{self.path}` is shorter than {self.nbytes} bytes",
                    hint="start over with --fresh",
                )
            for start in range(0, windows, size):
                count = min(size, windows - start)
                beyond = start * window % mmap.ALLOCATIONGRANULARITY
                mapped = mmap.mmap(
                    file.fileno(),
                    beyond + count * window,
                    access=mmap.ACCESS_COPY,
                    offset=start * window - beyond,
                )
                flat = torch.frombuffer(
                    mapped, dtype=self.dtype, count=count * seq_len * width, offset=beyond
                )
                yield flat.view(count, seq_len, width)

    @contextlib.contextmanager
    def filling(self) -> Iterator[Callable[[Tensor], None]]:
        """Give what takes the windows, in order, in batches: [size, seq_len, hidden] or flat."""
        at = 0

        def hold(batch: Tensor) -> None:
            nonlocal at
            whole = batch.reshape(-1, *self.shape[1:])
            cast(Tensor, self._held)[at : at + len(whole)] = whole
            at += len(whole)

        if self._held is not None:
            yield hold
            return
        with self._opened() as file:
            yield lambda batch: _write_all(file, _bytes(batch.to(self.dtype)))

    def _opened(self) -> FileIO:
        """Open the file for writing; the pages that it has are cheaper to overwrite than new."""
        self.path.touch()
        file = self.path.open("r+b", buffering=0)
        file.truncate(min(self.path.stat().st_size, self.nbytes))
        return file

    def write(self, batches: Iterator[Tensor]) -> int:
        """Write every window to the file, in order; return the crc32 of its bytes."""
        crc = 0
        with self._opened() as file:
            for batch in batches:
                view = _bytes(batch)
                crc = zlib.crc32(view, crc)
                _write_all(file, view)
        return crc

    def crc32(self) -> int | None:
        """Return the crc32 of the file's bytes, or None where it is absent or of another size."""
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes:
            return None
        crc = 0
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 22):
                crc = zlib.crc32(chunk, crc)
        return crc


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor; of its own memory if it is contiguous."""
    plain = tensor.contiguous().view(-1).view(torch.uint8)
    return memoryview(cast(Any, plain.numpy())).cast("B")


def _write_all(file: FileIO, view: memoryview) -> None:
    """Write all of it, however many calls that takes."""
    while view:
        view = view[file.write(view) :]

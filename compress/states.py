"""Activations of all calibration windows, in files that the operating system caches.

Memory then holds a batch of them, and an interrupted run finds them again.
"""

import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from unicomp.errors import CheckpointError


class HiddenStates:
    """Hidden states of every calibration window, in a file.

    path    the file; made when written first
    shape   (windows, seq_len, hidden)
    dtype   float32 or bfloat16
    """

    def __init__(
        self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32
    ) -> None:
        self.path = path
        self.shape = shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        """The file's size in bytes once it is whole."""
        windows, seq_len, width = self.shape
        return windows * seq_len * width * self.dtype.itemsize

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the windows in order, `size` at a time: [size, seq_len, hidden]."""
        windows, seq_len, width = self.shape
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, windows, size):
                batch = torch.empty(min(size, windows - start), seq_len, width, dtype=self.dtype)
                view = as_bytes(batch)
                while view:
                    got = file.readinto(view)
                    if not got:
                        raise CheckpointError(
                            f"`{self.path}` is shorter than {self.nbytes} bytes",
                            hint="start over with --fresh",
                        )
                    view = view[got:]
                yield batch

    def write(self, batches: Iterator[Tensor]) -> int:
        """Write every window, in order; return the crc32 of the file's bytes."""
        crc = 0
        with self.path.open("wb", buffering=0) as file:
            for batch in batches:
                view = as_bytes(batch)
                crc = zlib.crc32(view, crc)
                write_all(file, view)
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


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor; of its own memory if it is contiguous."""
    plain = tensor.contiguous().view(-1).view(torch.uint8)
    return memoryview(cast(Any, plain.numpy())).cast("B")


def overwritten(path: Path) -> FileIO:
    """Open a scratch file to write it anew; the pages that it has are cheaper than new ones."""
    path.touch()
    return path.open("r+b", buffering=0)


def write_all(file: FileIO, view: memoryview) -> None:
    """Write all of it, however many calls that takes."""
    while view:
        view = view[file.write(view) :]

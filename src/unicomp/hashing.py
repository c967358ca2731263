"""SHA-256 of files; it may be begun before it is asked for, where a processor would be idle.

Importing the libraries that a run needs takes seconds on one core. What the run will hash anyway is
read meanwhile, and lies in the system's cache afterwards.
"""

import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

# Each piece waits once for Python's lock, which an import gives up every few milliseconds.
PIECE = 1 << 24


class Digest(NamedTuple):
    """What a file holds: SHA-256 in hexadecimal, and its size in bytes."""

    sha256: str
    bytes: int


_State = tuple[Path, int, int]
_begun: dict[_State, "Future[Digest]"] = {}


def begin(paths: Iterable[Path]) -> None:
    """Begin to hash files, one after the other, on a thread; what fails `of_file` says again.

    What was begun already is not begun twice.
    """
    ahead: list[tuple[Path, Future[Digest]]] = []
    for path in paths:
        try:
            key = _state(path)
        except OSError:
            continue
        if key not in _begun:
            ahead.append((path, _begun.setdefault(key, Future())))

    def work() -> None:
        for path, future in ahead:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(_read(path))
                except OSError as error:
                    future.set_exception(error)

    threading.Thread(target=work, name="hashing", daemon=True).start()


def of_file(path: Path) -> Digest:
    """Return a file's digest; what was begun is waited for, unless the file has changed since.

    Raises OSError where it cannot be read.
    """
    future = _begun.pop(_state(path), None)
    return _read(path) if future is None else future.result()


def _state(path: Path) -> _State:
    found = path.stat()
    return path.absolute(), found.st_size, found.st_mtime_ns


def _read(path: Path) -> Digest:
    digest, size = hashlib.sha256(), 0
    piece = memoryview(bytearray(min(PIECE, max(path.stat().st_size, 1))))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
            size += count
    return Digest(digest.hexdigest(), size)

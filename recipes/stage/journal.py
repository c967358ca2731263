"""What a run has done so far, so that the same command goes on after Ctrl-C or `kill -9`.

One line of JSON per finished piece of work, appended and synced after the weights it speaks of are
on disk. The first line is the run's fingerprint: everything that decides the output's bytes. A
last line that was cut off is dropped. One process at a time holds the folder, by a lock.
"""

import contextlib
import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from unicomp.errors import UnicompError

FOLDER = ".unicomp"  # inside the working folder; hidden, so that no manifest lists it
NAME = "journal.jsonl"


class Journal:
    """The journal of one working folder, locked while open.

    folder   where the journal lies, and with it what a later process needs and no reader does
    entries  what earlier processes finished, in order
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        """Open or begin the journal.

        Raises UnicompError if another process works in the folder, or if the journal is that of
        a different run.
        """
        self.folder = folder / FOLDER
        self.folder.mkdir(exist_ok=True)
        self.path = self.folder / NAME
        self._file = self.path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UnicompError(
                f"another process is working in `{folder}`",
                hint="wait for it to finish, or choose another output folder",
            ) from None
        self.entries = self._read()
        if not self.entries:
            self.append({"run": fingerprint})
        elif (found := self.entries[0].get("run")) != fingerprint:
            self._file.close()
            raise _other_run(folder, found, fingerprint)
        self.entries = self.entries[1:]

    def _read(self) -> list[dict[str, Any]]:
        """Return the whole lines, and cut off what follows them."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            self._file.truncate(len(whole))
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, entry: dict[str, Any]) -> None:
        """Add an entry and bring it to disk; UnicompError where the disk does not take it."""
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UnicompError(
                f"`{self.folder.parent}`: {(error.strerror or str(error)).lower()}: "
                f"{len(line)} bytes needed for the journal",
                hint="free some space, or choose an output folder on another disk",
            ) from error
        self.entries.append(entry)

    def restart(self) -> None:
        """Forget every entry but the fingerprint: the work begins again."""
        self._file.seek(0)
        first = self._file.readline()
        self._file.truncate(len(first))
        os.fsync(self._file.fileno())
        self.entries = []

    def __enter__(self) -> Self:
        """Return the journal itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lock back."""
        with contextlib.suppress(OSError):  # an entry that had no room is tried again, and fails
            self._file.close()


def _other_run(folder: Path, found: Any, wanted: dict[str, Any]) -> UnicompError:
    if isinstance(found, dict):
        changed = [key for key in wanted if found.get(key) != wanted[key]]
    else:
        changed = list(wanted)
    return UnicompError(
        f"`{folder}` holds an unfinished run with another {', '.join(changed)}",
        hint="repeat the command that began it, or start over with --fresh",
    )

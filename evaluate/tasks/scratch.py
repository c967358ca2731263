"""Work that is done, kept until the whole score is, so that the same command resumes.

One file a task, model and set of options, and one for what a model said to prompts, lies in
`$XDG_CACHE_HOME/unicomp/score` (`~/.cache` without it), under a name that is a hash of everything
that decides the result: the model's bytes, the task's file and documents, the options and the
releases that compute. What a task's single requests gave lies beside. A score that comes to its
end removes the files it made or used; what nothing asks for any more goes after a month.
"""

import contextlib
import json
import os
import time
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from unicomp.evaluate.tasks.result import Result
from unicomp.writer import write_file

OLDEST = 30 * 86400  # seconds


def folder() -> Path:
    """Return where results are kept; it may not be there yet."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "unicomp" / "score"


class Scratch:
    """The kept results that one score made or may use."""

    def __init__(self, place: Path, *, resume: bool = True) -> None:
        """Use a folder; with `resume` off, what lies there is not read."""
        self.place, self.resume = place, resume
        self.used: set[Path] = set()

    def read(self, key: Sequence[Any]) -> list[Result] | None:
        """Return the results that were kept under a key, None where nothing whole was."""
        try:
            return [Result.from_json(own) for own in self.read_json(key) or ()] or None
        except (KeyError, TypeError, ValueError):
            return None

    def write(self, key: Sequence[Any], results: Sequence[Result]) -> None:
        """Keep results under a key."""
        self.write_json(key, [own.to_json() for own in results])

    def read_json(self, key: Sequence[Any]) -> Any:
        """Return the plain value that was kept under a key, None where nothing whole was."""
        path = self._path(key)
        self.used.add(path)
        if not self.resume:
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def write_json(self, key: Sequence[Any], value: Any) -> None:
        """Keep a plain value under a key; where that cannot be, the score goes on without."""
        path = self._path(key)
        self.used.add(path)
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(value).encode())

    def requests(self, key: Sequence[Any]) -> Path | None:
        """Return the file for a model's single requests, so that half a task is kept too.

        None where no file can be there. What it held is gone with `resume` off.
        """
        path = self._path(key).with_suffix(".db")
        if not self.resume and path not in self.used:
            path.unlink(missing_ok=True)
        self.used.add(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        return path

    def clear(self) -> None:
        """Remove what this score made or used, and what is older than a month."""
        for path in self.used:
            with contextlib.suppress(OSError):
                path.unlink()
        oldest = time.time() - OLDEST
        for path in self.place.glob("*.*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    def _path(self, key: Sequence[Any]) -> Path:
        name = sha256(json.dumps(list(key), sort_keys=True).encode()).hexdigest()
        return self.place / f"{name[:40]}.json"

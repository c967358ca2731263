"""Which methods there are: the folder is the registry.

`compress/quantize/gptq.py` *is* `quantize: gptq`; nothing else is edited to add a method. A verb is
a folder, a method is a file in it that defines one public `Method` class; words have hyphens where
files have underscores. Another package adds a method by an entry point of the group
`unicomp.methods` whose name is `verb.method` and whose object is the class.

Listing imports no method, so the command line can complete words without torch.
"""

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING

from unicomp import entries, suggest
from unicomp.errors import UnsupportedError

if TYPE_CHECKING:
    from unicomp.compress.method import Method

GROUP = "unicomp.methods"
FOLDER = Path(__file__).parent


def verbs() -> list[str]:
    """Return every verb that has a method, sorted."""
    folders = (path for path in FOLDER.iterdir() if path.is_dir() and path.name.isidentifier())
    own = {entries.word(folder.name) for folder in folders if _files(folder)}
    return sorted(own | {verb for verb, _ in _entries(tuple(sys.path))})


def methods(verb: str) -> list[str]:
    """Return the methods of a verb, sorted; none for a verb that does not exist."""
    return sorted(set(_own(verb)) | {m for v, m in _entries(tuple(sys.path)) if v == verb})


def find(verb: str, method: str) -> "type[Method]":
    """Return the class of a method; its fields are the options.

    Raises UnsupportedError for an unknown verb or method, for a method that two packages define,
    and for one of another package that does not load or is no `Method`.
    """
    if verb not in verbs():
        raise UnsupportedError(f"unknown stage `{verb}`", hint=suggest.hint(verb, verbs()))
    if method not in methods(verb):
        raise UnsupportedError(
            f"unknown method `{method}` for `{verb}`", hint=suggest.hint(method, methods(verb))
        )
    own = _own(verb).get(method)
    others = _entries(tuple(sys.path)).get((verb, method), ())
    owners = ["unicomp"] * (own is not None) + [_owner(entry) for entry in others]
    if len(owners) > 1:
        raise UnsupportedError(
            f"`{verb}: {method}` is defined by {suggest.listed(owners)}",
            hint="uninstall all but one of them",
        )
    if own is None:
        return _loaded(verb, method, others[0])
    from unicomp.compress.method import Method

    return entries.only(own, Method)


def _files(folder: Path) -> list[str]:
    return entries.files([str(folder)])


def _own(verb: str) -> dict[str, str]:
    """Return method -> module name of the methods in our own folder."""
    folder = verb.replace("-", "_")
    if not folder.isidentifier() or entries.word(folder) != verb or not (FOLDER / folder).is_dir():
        return {}
    return {
        entries.word(file): f"unicomp.compress.{folder}.{file}" for file in _files(FOLDER / folder)
    }


@lru_cache(maxsize=8)
def _entries(path: tuple[str, ...]) -> dict[tuple[str, str], tuple[EntryPoint, ...]]:
    """Return (verb, method) -> entry points; `path` is `sys.path`, which decides what is found."""
    found: dict[tuple[str, str], tuple[EntryPoint, ...]] = {}
    for entry in entry_points(group=GROUP):
        verb, dot, method = entry.name.partition(".")
        if not (verb and dot and method):
            raise UnsupportedError(
                f"entry point `{entry.name}` of `{_owner(entry)}` in the group `{GROUP}` "
                "is not named `verb.method`",
                hint=f"uninstall `{_owner(entry)}` or ask its authors to rename it",
            )
        found[verb, method] = (*found.get((verb, method), ()), entry)
    return found


def _owner(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _loaded(verb: str, method: str, entry: EntryPoint) -> "type[Method]":
    """Return the method class of another package."""
    from unicomp.compress.method import Method

    try:
        found = entry.load()
    except Exception as error:  # another package's import may fail in any way
        raise UnsupportedError(
            f"`{verb}: {method}` of `{_owner(entry)}` cannot be loaded: "
            f"{type(error).__name__}: {error}",
            hint=f"reinstall or uninstall `{_owner(entry)}`",
        ) from error
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise UnsupportedError(
            f"`{verb}: {method}` of `{_owner(entry)}` is no method: `{entry.value}` "
            "is not a subclass of `unicomp.compress.method.Method`",
            hint=f"uninstall `{_owner(entry)}` or ask its authors to mend it",
        )
    return found

"""A folder that is a registry: each file in it is an entry, and defines one class.

An entry's word has hyphens where the file has underscores. Listing imports nothing.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import TypeVar

Entry = TypeVar("Entry")


def word(file: str) -> str:
    """Return the word of a file, or of a folder."""
    return file.replace("_", "-")


def files(folders: Iterable[str]) -> list[str]:
    """Return the modules in folders, by name and sorted; those that start with `_` are no entry."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules(list(folders))
        if not module.ispkg and not module.name.startswith("_")
    )


def only(module: str, kind: type[Entry]) -> type[Entry]:
    """Return the one public class of a kind that a module defines itself; TypeError otherwise."""
    classes = [
        value
        for name, value in vars(importlib.import_module(module)).items()
        if isinstance(value, type)
        and issubclass(value, kind)
        and value.__module__ == module
        and not name.startswith("_")
    ]
    if len(classes) != 1:
        raise TypeError(
            f"{module} must define one public {kind.__name__} class, found {len(classes)}"
        )
    return classes[0]

"""Options that several commands share, or that belong together, as dataclasses."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from typing import Any, TypeVar, get_type_hints

Function = TypeVar("Function", bound=Callable[..., Any])
LAST = {"place": "last"}
"""Metadata of a field whose option stands after all others of its command."""


def grouped(command: Function) -> Function:
    """Let a command take dataclasses as parameters: each of their fields becomes an option.

    Options stand where the parameter does; those of fields with `LAST` after all others.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {}
    parts: list[inspect.Parameter] = []
    later: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if not is_dataclass(hints[name]):
            parts.append(parameter.replace(annotation=hints[name]))
            continue
        group = groups[name] = hints[name]
        of = get_type_hints(group, include_extras=True)
        for own in fields(group):
            option = inspect.Parameter(
                own.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if own.default is MISSING else own.default,
                annotation=of[own.name],
            )
            (later if own.metadata == LAST else parts).append(option)

    @wraps(command)
    def run(**words: Any) -> Any:
        for name, group in groups.items():
            words[name] = group(**{own.name: words.pop(own.name) for own in fields(group)})
        return command(**words)

    keyword = [own.replace(kind=inspect.Parameter.KEYWORD_ONLY) for own in parts + later]
    run.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    run.__annotations__ = {own.name: own.annotation for own in keyword}
    return run  # type: ignore[return-value]

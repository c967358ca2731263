"""Plain data as YAML text that reads back equal, for people to read.

Mappings stand in block style down to `BLOCK` levels and in one line below; a string is plain where
every version of YAML reads it as that string, and in double quotes otherwise.
"""

import re
from collections.abc import Iterator
from typing import Any

BLOCK = 3
PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_/+-]*([.:][A-Za-z0-9_/+-]+)*")
RESERVED = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})
ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t"}


def emit(data: dict[str, Any]) -> str:
    """Return YAML text of a mapping of str, int, float, bool, None, lists and mappings.

    Raises TypeError for anything else.
    """
    return "\n".join(_mapping(data, 0)) + "\n"


def _mapping(data: dict[str, Any], depth: int) -> Iterator[str]:
    for key, value in data.items():
        word = _word(key)
        if isinstance(value, dict) and value and depth < BLOCK - 1 and not _short(value):
            yield f"{word}:"
            yield from (f"  {line}" for line in _mapping(value, depth + 1))
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            yield f"{word}:"
            for item in value:
                lines = list(_mapping(item, depth + 1)) if isinstance(item, dict) and item else None
                if lines is None:
                    lines = [_flow(item)]
                yield f"  - {lines[0]}"
                yield from (f"    {line}" for line in lines[1:])
        else:
            yield f"{word}: {_flow(value)}"


def _short(data: dict[str, Any]) -> bool:
    return len(_flow(data)) <= 80 and not any(isinstance(value, dict) for value in data.values())


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_word(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        # YAML 1.1 reads `1e-05` as a string and `1.0e-05` as a float
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))
    if isinstance(value, str):
        return _word(value)
    raise TypeError(f"no YAML for {type(value).__name__}")


def _word(text: str) -> str:
    if len(text) <= 200 and PLAIN.fullmatch(text) and text.casefold() not in RESERVED:
        return text
    return '"' + "".join(map(_character, text)) + '"'


def _character(character: str) -> str:
    if character in ESCAPES:
        return ESCAPES[character]
    code = ord(character)
    if 0x20 <= code < 0x7F or (0xA1 <= code < 0xD800 and not 0x2000 <= code < 0x2070):
        return character
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"

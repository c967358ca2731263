"""Byte counts in words: what a user writes (`8GB`, `512MiB`, `1.5e9`) and what a table shows."""

import math
import re

UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
}
PATTERN = re.compile(r"\s*([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]*)\s*", re.IGNORECASE)
LARGEST = 1 << 60


def parse(text: str) -> int:
    """Return the bytes that a SIZE means, rounded down.

    Raises ValueError, as pydantic and typer ask of their validators, for anything else.
    """
    found = PATTERN.fullmatch(text)
    if not found or found[1].count(".") > 1 or found[1].startswith("e") or found[1] == ".":
        raise ValueError(f"not a size: `{text}`; write `8GB`, `512MiB` or `1.5e9` (bytes)")
    unit = found[2].lower()
    if unit in ("k", "m", "g", "t"):
        raise ValueError(
            f"`{text}` could mean two sizes; write `{found[1]}{unit.upper()}B` "
            f"(powers of 1000) or `{found[1]}{unit.upper()}iB` (powers of 1024)"
        )
    if unit not in UNITS:
        raise ValueError(f"unknown unit `{found[2]}` in `{text}`; use B, KB, MB, GB, KiB, MiB, GiB")
    value = float(found[1]) * UNITS[unit]
    if not math.isfinite(value) or not 1 <= value <= LARGEST:
        raise ValueError(f"`{text}` is not between 1 byte and {LARGEST >> 40} TiB")
    return int(value)


def show(count: float) -> str:
    """Return a byte count with three digits and a decimal unit: `1.05 MB`."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    if unit == "B":
        return f"{value:.0f} B"
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f} {unit}"

"""Say which word was probably meant."""

import difflib
from collections.abc import Iterable


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice most like the word, or None if none is like it."""
    spelled = {choice.casefold().replace("_", "-"): choice for choice in choices}
    near = difflib.get_close_matches(word.casefold().replace("_", "-"), spelled, n=1, cutoff=0.6)
    return spelled[near[0]] if near else None


def hint(word: str, choices: Iterable[str]) -> str | None:
    """Return ``did you mean `x`?``, or the choices where none is near, or None without choices."""
    known = list(choices)
    near = closest(word, known)
    if near is not None:
        return f"did you mean `{near}`?"
    if not known:
        return None
    return f"use one of {listed(known)}" if len(known) > 1 else f"use `{known[0]}`"


def listed(words: Iterable[str]) -> str:
    """Return the words in backticks, with commas."""
    return ", ".join(f"`{word}`" for word in words)

"""What the user can mend, said in two lines.

A `UnicompError` is never our bug: the command line prints it as `error:` and `hint:`, without a
traceback, and exits with 1. The wording follows `docs/decisions/001-house.md`: lower case,
literals in backticks, no full stop after one sentence, the value after a colon.
"""

from collections.abc import Sequence


class UnicompError(Exception):
    """A problem that the user can fix.

    message  what is wrong: names the file, tensor, limit and value
    hint     what to do about it; None where the message says it
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def problems(self) -> Sequence[tuple[str, str | None]]:
        """Return every (message, hint) of this error, in the order to show them."""
        return [(self.message, self.hint)]


class CheckpointError(UnicompError):
    """A checkpoint that is broken, incomplete or inconsistent."""


class UnsupportedError(UnicompError):
    """A sound input that unicomp does not handle."""


class RecipeError(UnicompError):
    """One or more problems in a recipe, all found in one pass.

    problems  (message, hint) pairs; each message starts with `file:line:col: ` where known
    """

    def __init__(self, problems: Sequence[tuple[str, str | None]]) -> None:
        super().__init__("\n".join(message for message, _ in problems))
        self._problems = list(problems)

    def problems(self) -> Sequence[tuple[str, str | None]]:
        """Return every (message, hint) of this error, in the order to show them."""
        return self._problems

r"""Which modules a recipe means: the patterns under `ignore` and `modules`.

Three spellings, and the whole name is always meant, so that `q_proj` never catches `q_proj_norm`:

* `model.layers.3.mlp.down_proj`: that module;
* `down_proj`: every module whose last part is that;
* `re:.*layers\.[0-3]\..*`: every module whose full name the regular expression matches.
"""

import re
from functools import lru_cache
from typing import Annotated

from pydantic import AfterValidator, Field

PREFIX = "re:"
NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
LONGEST = 500


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> re.Pattern[str]:
    return re.compile(expression)


def check(pattern: str) -> str:
    """Return the pattern if it is well formed.

    Raises ValueError, as pydantic asks of its validators, which a recipe shows at its place.
    """
    if pattern.startswith(PREFIX):
        expression = pattern.removeprefix(PREFIX)
        if not expression:
            raise ValueError(f"nothing follows `{PREFIX}`")
        try:
            _compiled(expression)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from error
    elif not NAME.fullmatch(pattern):
        raise ValueError(
            "neither a module name nor the last part of one; "
            f"a regular expression starts with `{PREFIX}`"
        )
    return pattern


def matches(pattern: str, module: str) -> bool:
    """Tell whether a checked pattern means the module of this full name."""
    if pattern.startswith(PREFIX):
        return _compiled(pattern.removeprefix(PREFIX)).fullmatch(module) is not None
    return pattern in (module, module.rpartition(".")[2])


Pattern = Annotated[
    str,
    Field(min_length=1, max_length=LONGEST, json_schema_extra={"format": "module-pattern"}),
    AfterValidator(check),
]

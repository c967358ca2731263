"""Patterns mean whole names, whole last parts, or whole matches."""

import pytest

from unicomp.compress.patterns import LONGEST, check, matches

NAME = "model.layers.3.mlp.down_proj"

MATCHES = {
    NAME: True,
    "down_proj": True,
    "lm_head": False,
    "mlp.down_proj": False,
    "own_proj": False,
    "down": False,
    "model": False,
    "Down_proj": False,
    "re:.*down_proj": True,
    "re:down_proj": False,
    "re:model.*mlp": False,
    r"re:model\.layers\.[0-3]\..*": True,
    r"re:model\.layers\.[4-7]\..*": False,
    "re:nothing|.*proj": True,
    "re:model|.*proj": True,
    "re:.*down_pro$|x": False,
}


@pytest.mark.parametrize("pattern", MATCHES)
def test_matches(pattern: str) -> None:
    assert matches(check(pattern), NAME) is MATCHES[pattern]


def test_a_match_is_of_the_whole_name_with_its_line_end() -> None:
    assert not matches("re:.*proj", "a.proj\n")


@pytest.mark.parametrize(
    "pattern",
    ["", "*", "*.down_proj", "a b", "a..b", ".a", "a.", "a/b", "re:", "re:(", "re:a{2,1}"],
)
def test_malformed(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"module name|regular expression|nothing follows"):
        check(pattern)


def complaint(pattern: str) -> str:
    """Return what is wrong with a pattern, or nothing."""
    try:
        check(pattern)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("count", [100, LONGEST // 2 - 2])
def test_deep_expressions_cost_no_more_than_an_error(count: int) -> None:
    said = complaint("re:" + "(" * count + "a" + ")" * count)
    assert said == "" or "not a regular expression" in said

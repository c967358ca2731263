"""Near words are found, far ones are not."""

import pytest

from unicomp.suggest import closest, hint, listed


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("wnada", "wanda"),
        ("groupsize", "group_size"),
        ("GPTQ", "gptq"),
        ("min_pivot", "min-pivot"),
        ("quantise", "quantize"),
        ("xyz", None),
        ("", None),
    ],
)
def test_closest(word: str, meant: str | None) -> None:
    choices = ["wanda", "magnitude", "group_size", "gptq", "rtn", "min-pivot", "quantize"]
    assert closest(word, choices) == meant


def test_hint() -> None:
    assert hint("gtpq", ["gptq", "rtn"]) == "did you mean `gptq`?"
    assert hint("zzz", ["gptq", "rtn"]) == "use one of `gptq`, `rtn`"
    assert hint("zzz", ["gptq"]) == "use `gptq`"
    assert hint("zzz", []) is None


def test_listed() -> None:
    assert listed(["a", "b"]) == "`a`, `b`"

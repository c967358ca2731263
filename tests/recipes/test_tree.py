"""The reader of YAML: what a scalar means, where everything stands, what is refused."""

import math

import pytest

from unicomp.errors import RecipeError
from unicomp.recipes.tree import DEEPEST, LARGEST, parse

SCALARS = {
    "2:4": "2:4",
    "1:30:00": "1:30:00",
    "1e-4": 1e-4,
    "1E3": 1000.0,
    "+1.5e+2": 150.0,
    ".5": 0.5,
    "5.": 5.0,
    "off": "off",
    "on": "on",
    "yes": "yes",
    "No": "No",
    "y": "y",
    "true": True,
    "True": True,
    "FALSE": False,
    "tRUE": "tRUE",
    "null": None,
    "~": None,
    "": None,
    "nULL": "nULL",
    "0": 0,
    "-0": 0,
    "12": 12,
    "-3": -3,
    "+7": 7,
    "0o17": 15,
    "0x1F": 31,
    "0b11": "0b11",
    "1_000": "1_000",
    "1,000": "1,000",
    ".inf": math.inf,
    "-.INF": -math.inf,
    "inf": "inf",
    "nan": "nan",
    "2026-01-01": "2026-01-01",
    "=": "=",
    "'12'": "12",
    '"true"': "true",
    '"2:4"': "2:4",
    "4 bits": "4 bits",
    "1.2.3": "1.2.3",
    "4k": "4k",
}


@pytest.mark.parametrize("written", SCALARS)
def test_scalars_follow_yaml_1_2(written: str) -> None:
    tree, problems = parse(f"a: {written}\n", file="x")
    assert problems == []
    found, wanted = tree.data["a"], SCALARS[written]
    assert type(found) is type(wanted)
    assert found == wanted


def test_not_a_number() -> None:
    tree, _ = parse("a: .NaN", file="x")
    assert math.isnan(tree.data["a"])


@pytest.mark.parametrize("written", ["010", "-007", "08", "00", "+01"])
def test_leading_zero_is_refused(written: str) -> None:
    _, problems = parse(f"a:\n  b: {written}\n", file="x.yaml")
    [problem] = problems
    assert problem.message.startswith(f"x.yaml:2:6: `{written}` is 8 based")
    assert problem.hint is not None
    assert f"`{int(written)}`" in problem.hint


def test_places() -> None:
    text = "# about\nstages:\n  - quantize: gptq\n    ignore: [lm_head, 'a b']\n"
    tree, _ = parse(text, file="f")
    assert tree.data == {"stages": [{"quantize": "gptq", "ignore": ["lm_head", "a b"]}]}
    places = {path: (p.key, p.value, p.source) for path, p in tree.places.items()}
    assert places["stages",][:2] == ("f:2:1", "f:3:3")
    assert places["stages", 0][:2] == ("f:3:5", "f:3:5")
    assert places["stages", 0, "quantize"] == ("f:3:5", "f:3:15", "gptq")
    assert places["stages", 0, "ignore", 1] == ("f:4:23", "f:4:23", "'a b'")
    assert len(places) == 7
    assert tree.place(("stages", 0, "absent", 3)) == tree.places["stages", 0]


def test_columns_count_characters_not_bytes() -> None:
    tree, _ = parse("'é😀': 1\n", file="f")
    assert tree.places["é😀",].value == "f:1:7"


def test_repeated_keys_name_both_lines() -> None:
    tree, problems = parse("a: 1\nb: {c: 1, c: 2}\na: [3]\n", file="f")
    assert [problem.message for problem in problems] == [
        "f:2:11: `c` is given twice, first on line 2",
        "f:3:1: `a` is given twice, first on line 1",
    ]
    assert tree.data == {"a": 1, "b": {"c": 1}}


REFUSED = {
    "a: &x 1": "f:1:4: an anchor, `&x`",
    "a: &x [1]\nb: *x": "f:2:4: an alias, `*x`",
    "a: &x {b: *x}": "f:1:11: an alias, `*x`",
    "a: !!python/object/apply:os.system [ls]": "f:1:4: a tag, `tag:yaml.org,2002:python/object/",
    "a: !!str 5": "f:1:4: a tag, `tag:yaml.org,2002:str`",
    "a: ! 5": "f:1:4: a tag, `!`",
    "%YAML 1.1\n---\na: 1": "f:1:1: recipes have no `%` directives",
    "a: 1\n---\nb: 2": "f:2:1: a second document",
    "? [a]\n: 1": "f:1:3: a key that is not a word",
    "&k a: 1": "f:1:1: an anchor or a tag before a key",
    "a:\n\tb: 1": "f:2:1: a tab where YAML wants spaces",
    "a: [1,": "f:1:7: not YAML: expected the node content, but found `the end of the file`",
    "a: b: c": "f:1:5: a `:` where no key can be",
    "a: 'x": "f:1:6: not YAML: found unexpected end of stream",
    "a: 1\nb: \x00": "f:2:4: the character U+0000",
    "": "f: is empty",
    "# only words\n": "f: is empty",
    "a: " + "[" * 50 + "]" * 50: f"f:1:{DEEPEST + 4}: nested deeper than {DEEPEST} levels",
    "a: " + "x" * LARGEST: f"f: is larger than {LARGEST} bytes",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(text, file="f")
    messages = [message for message, _ in caught.value.problems()]
    assert any(message.startswith(REFUSED[text]) for message in messages), messages


def test_everything_refused_is_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse("a: &x 010\nb: *x\nb: !t 2\n", file="f")
    spots = [message.split(": ")[0] for message, _ in caught.value.problems()]
    assert spots == ["f:1:4", "f:1:4", "f:2:4", "f:3:1", "f:3:4"]


@pytest.mark.parametrize("text", ['a: "\\ud800"', 'a: "\\0"', 'a: "\\x1b[31m"', '"\\x07": 1'])
def test_unprintable_characters_are_refused(text: str) -> None:
    _, problems = parse(text, file="f")
    assert len(problems) == 1
    assert "unprintable" in problems[0].message


def test_endless_numbers_are_refused() -> None:
    _, problems = parse("a: " + "9" * 10_000, file="f")
    assert [problem.message for problem in problems] == ["f:1:4: a number of 10000 characters"]

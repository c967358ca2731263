"""Recipes that are broken, huge, cyclic or malicious: one clear refusal each, at little cost."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unicomp.errors import RecipeError
from unicomp.recipes.check import MOST
from unicomp.recipes.load import find, load, read
from unicomp.recipes.schema import Recipe

SOUND = find("w4-gptq").read_text(encoding="utf-8")
PROMPT = 5.0  # seconds of processor time that a refusal may take

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)

FILES = {
    "empty": (b"", "is empty"),
    "only a comment": (b"# nothing\n", "is empty"),
    "only a marker": (b"---\n", "a recipe is a mapping of keys"),
    "a list": (b"- quantize: rtn\n", "a recipe is a mapping of keys, got a list"),
    "binary": (b"\x80\x04\x95\x00pickle", "is not UTF-8: byte 0x80"),
    "latin-1": ("version: 1\nmodel: é\n".encode("latin-1"), "2: is not UTF-8: byte 0xe9"),
    "utf-16": ("version: 1\n".encode("utf-16"), "is not UTF-8: byte 0xff"),
    "nul": (b"version: 1\x00\n", "the character U+0000"),
    "escape sequences": (b'version: 1\nstages: []\nmodel: "\\e[2J"\n', "unprintable character"),
    "tabs": (b"version: 1\nstages:\n\t- quantize: rtn\n", "3:1: a tab where YAML wants spaces"),
    "a cycle": (b"version: 1\nstages: &a [*a]\n", "2:9: an anchor, `&a`"),
    "a cyclic mapping": (b"&a\nversion: *a\n", "an alias, `*a`"),
    "a merge": (b"x: &x {a: 1}\ny: {<<: *x}\n", "2:9: an alias, `*x`"),
    "a billion laughs": (LAUGHS.encode(), "an alias, `*a`"),
    "an object": (b"version: !!python/object/apply:os.system [id]\n", "1:10: a tag"),
    "two documents": (b"version: 1\n---\nversion: 1\n", "2:1: a second document"),
    "deep": (b"version: " + b"[" * 100_000, "nested deeper than 12 levels"),
    "deep mappings": (b"{a: " * 100_000, "nested deeper than 12 levels"),
    "huge": (b"# x\n" * 300_000, "is larger than 1048576 bytes"),
    "one long line": (b"model: " + b"x" * (1 << 21), "is larger than 1048576 bytes"),
    "a long number": (b"version: " + b"1" * 100_000 + b"\n", "a number of 100000 characters"),
    "a long key": (b"x" * 2000 + b": 1\n", "1:2001: a `:` where no key can be"),
    "many keys": (
        b"version: 1\n" + b"".join(b"k%d: 1\n" % i for i in range(5_000)),
        "unknown key `k0`",
    ),
    "many repeats": (b"version: 1\n" + b"a: 1\n" * 5_000, "`a` is given twice, first on line 2"),
}


@pytest.mark.parametrize("name", FILES)
def test_refused_with_a_place_and_in_time(name: str, tmp_path: Path) -> None:
    content, wanted = FILES[name]
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(RecipeError) as caught:
        read(path)
    assert time.process_time() - start < PROMPT
    messages = [message for message, _ in caught.value.problems()]
    assert any(wanted in message for message in messages), messages[:5]
    assert len(messages) <= MOST + 1
    assert all(message.startswith(f"{path}:") for message in messages[:MOST])
    assert all(len(message) < len(str(path)) + 400 for message in messages)
    assert all(message.isprintable() for message in messages)


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, wanted in {
        tmp_path: "is a folder",
        tmp_path / "absent.yaml": "no such file",
        tmp_path / "absent" / "x.yaml": "no such file",
        Path("/dev/zero"): "is larger than",
    }.items():
        with pytest.raises(RecipeError, match=wanted):
            read(path)


@given(st.text(max_size=200))
@settings(deadline=None)
def test_any_text_is_taken_or_refused(text: str) -> None:
    with pytest.raises(RecipeError):
        load(text, file="x")


def loaded(text: str, *overrides: str) -> Recipe | list[str]:
    """Return a recipe, or what is wrong with it; anything but a RecipeError is a bug."""
    try:
        return load(text, file="x", overrides=overrides)
    except RecipeError as error:
        return [message for message, _ in error.problems()]


@given(
    st.integers(0, len(SOUND)),
    st.integers(0, 12),
    st.text("0123456789abcdefx:-[]{}&*!|>'\"%@,#?.~\n\t _é\x00", max_size=8),
)
@settings(deadline=None, max_examples=300)
def test_any_damage_to_a_recipe_is_harmless_or_refused(start: int, length: int, put: str) -> None:
    found = loaded(SOUND[:start] + put + SOUND[start + length :])
    assert found
    if isinstance(found, Recipe):
        assert load(found.dump(), file="x") == found


@given(st.text(max_size=40), st.text(max_size=40))
@settings(deadline=None, max_examples=200)
def test_any_override_is_taken_or_refused(key: str, value: str) -> None:
    for change in (f"{key}={value}", f"stages.0.{key}={value}", f"stages.0.bits={value}", key):
        found = loaded(SOUND, change)
        assert isinstance(found, Recipe) or all("--set" in message for message in found)

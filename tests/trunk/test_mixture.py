"""Mixes of texts: what they mean, what is refused, and what the manifest says of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from unicomp import builtin, mixture, text
from unicomp.errors import UnicompError
from unicomp.mixture import Part, counts, parse

SIZES: dict[str, Any] = {"vocab": None, "field": "text", "seq_len": 32, "seed": 3}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The embedded model's, which has a chat template."""
    return text.tokenizer(builtin.model("tinyworld"))


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("a.jsonl", [("a.jsonl", 1.0)]),
        ("odd, name=x.jsonl", [("odd, name=x.jsonl", 1.0)]),
        ("hub:a/b:c/d", [("hub:a/b:c/d", 1.0)]),
        ("builtin:tinyworld=0.5,a.jsonl=0.5", [("builtin:tinyworld", 0.5), ("a.jsonl", 0.5)]),
        ("a.txt=.25, b=c.txt = 75e-2", [("a.txt", 0.25), ("b=c.txt ", 0.75)]),
        ("a.txt=1", [("a.txt", 1.0)]),
        ("a.txt=0.333333,b.txt=0.333333,c.txt=0.333334", None),
    ],
)
def test_what_a_mix_means(spec: str, parts: list[tuple[str, float]] | None) -> None:
    found = parse(spec)
    assert parts is None or [(part.data.strip(), part.share) for part in found] == [
        (data.strip(), share) for data, share in parts
    ]
    assert sum(part.share for part in found) == pytest.approx(1)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("a.txt=0.5,b.txt=0.4", "add up to 1, these to 0.9"),
        ("a.txt=0.5,b.txt=0.6", "add up to 1, these to 1.1"),
        ("a.txt=0.5", "add up to 1, these to 0.5"),
        ("a.txt=-0.5,b.txt=1.5", "share of `a.txt` should be above 0"),
        ("a.txt=0,b.txt=1", "share of `a.txt` should be above 0"),
        ("a.txt=1,b.txt=1e9", "share of `b.txt` should be above 0 and at most 1"),
        ("a.txt=0.5,b.txt", "`b.txt` has no share"),
        ("a.txt=0.5,,b.txt=0.5", "`` has no share"),
        ("a.txt=0.5,b.txt=0.5,", "`` has no share"),
        ("a.txt=0.5,b.txt=.5x", "`b.txt=.5x` has no share"),
        ("a.txt=0.5,a.txt=0.5", "`a.txt` is given twice"),
    ],
)
def test_bad_mixes(spec: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"share|twice") as caught:
        parse(spec)
    assert said in str(caught.value)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=6), st.integers(1, 5000))
def test_counts_add_up_and_miss_their_share_by_less_than_one(shares: list[int], many: int) -> None:
    parts = tuple(Part(str(i), share / sum(shares)) for i, share in enumerate(shares))
    try:
        found = counts(parts, many)
    except ValueError as error:
        assert "too few for the share" in str(error)  # noqa: PT017 - either is right
        assert any(part.share * many < 1 for part in parts)
        return
    assert sum(found) == many
    for part, count in zip(parts, found, strict=True):
        assert abs(count - part.share * many) < 1


def test_each_part_gives_its_own_windows(tmp_path: Path, tokenizer: Any) -> None:
    """Those that it gives alone, one part after the other; messages through the template."""
    talk = tmp_path / "talk.jsonl"
    messages = [
        {"role": "user", "content": "Where is the cat?"},
        {"role": "assistant", "content": "The cat is in the garden."},
    ]
    talk.write_text((json.dumps({"messages": messages}) + "\n") * 40)
    ids, record = mixture.windows(
        f"builtin:tinyworld=0.7,{talk}=0.3", tokenizer, samples=10, **SIZES
    )
    one, first = mixture.windows("builtin:tinyworld", tokenizer, samples=7, **SIZES)
    two, second = mixture.windows(str(talk), tokenizer, samples=3, **SIZES)
    assert torch.equal(ids, torch.cat([one, two]))
    said = tokenizer.decode(two[0])
    assert "<|user|>" in said
    assert "<|assistant|>" in said
    assert record.source == "builtin:tinyworld=0.7,talk.jsonl=0.3"
    assert [(p.source, p.share, p.samples) for p in record.parts] == [
        ("builtin:tinyworld", 0.7, 7),
        ("talk.jsonl", 0.3, 3),
    ]
    assert [p.sha256 for p in record.parts] == [first.sha256, second.sha256]
    assert record.sha256 not in (first.sha256, second.sha256)
    assert (record.samples, record.seq_len, record.seed) == (10, 32, 3)
    assert (first.source, first.parts[0].share) == ("builtin:tinyworld", 1.0)
    again, _ = mixture.windows(f"builtin:tinyworld=0.7,{talk}=0.3", tokenizer, samples=10, **SIZES)
    assert torch.equal(ids, again)


def test_a_field_is_that_of_the_users_records(tmp_path: Path, tokenizer: Any) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"story": "' + "Once there was a dog. " * 200 + '"}\n')
    sizes = SIZES | {"field": "story"}
    ids, _ = mixture.windows(f"{task}=.5,builtin:tinyworld=.5", tokenizer, samples=4, **sizes)
    assert len(ids) == 4
    with pytest.raises(UnicompError, match="no field `story`"):
        mixture.windows("builtin:tinyworld", tokenizer, samples=4, **sizes)


def test_a_part_that_is_missing_or_too_short_is_named(tmp_path: Path, tokenizer: Any) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once there was a dog. " * 30)
    with pytest.raises(UnicompError, match=r"no such text: `none\.txt`"):
        mixture.windows("builtin:tinyworld=.5,none.txt=.5", tokenizer, samples=4, **SIZES)
    with pytest.raises(UnicompError, match=r"`short.txt` has \d+ windows of 32 tokens") as caught:
        mixture.windows(f"builtin:tinyworld=.5,{short}=.5", tokenizer, samples=64, **SIZES)
    found = str(caught.value.hint).partition("samples: ")[2].partition("`")[0]
    ids, _ = mixture.windows(
        f"builtin:tinyworld=.5,{short}=.5", tokenizer, samples=int(found), **SIZES
    )
    assert len(ids) == int(found)

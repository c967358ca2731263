"""Patterns name exactly the modules meant, in few entries, as loaders match them."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unicomp.kernels.targets import matches, patterns

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
MODEL = [f"model.layers.{layer}.{part}" for layer in range(80) for part in PARTS] + ["lm_head"]
EXPERTS = [f"model.layers.{i}.mlp.experts.{e}.w1" for i in range(4) for e in range(12)]


def caught(entries: list[str], names: list[str]) -> set[str]:
    """Match independently: by name, or by a regular expression from the start."""
    return {
        name
        for name in names
        for entry in entries
        if (re.match(entry[3:], name) if entry.startswith("re:") else entry == name)
    }


@settings(max_examples=200, deadline=None)
@given(st.sets(st.sampled_from(MODEL[:36] + EXPERTS + ["lm_head"])))
def test_exactly_the_members(members: set[str]) -> None:
    everything = [*MODEL[:36], *EXPERTS, "lm_head"]
    assert caught(patterns(members, everything), everything) == members


def test_a_large_model_takes_few_entries() -> None:
    assert len(patterns(MODEL, MODEL)) == 4
    but = [name for name in MODEL if ".layers.3.mlp" not in name]
    entries = patterns(but, MODEL)
    assert len(entries) == 4
    assert max(map(len, entries)) < 60
    assert caught(entries, MODEL) == set(but)
    assert len(patterns(EXPERTS[:24], EXPERTS)) == 1


def test_one_layer_is_not_its_neighbour() -> None:
    entries = patterns(["model.layers.1.mlp.down_proj"], MODEL)
    assert caught(entries, MODEL) == {"model.layers.1.mlp.down_proj"}
    assert not any(matches("model.layers.1.mlp.down_proj_norm", entry) for entry in entries)


def test_entries_hold_without_the_head_unless_another_tower_has_the_name() -> None:
    (entry,) = patterns(["model.layers.0.fc"], ["model.layers.0.fc"])
    assert matches("layers.0.fc", entry)
    assert not matches("sublayers.0.fc", entry)
    both = ["model.layers.0.fc", "vision.layers.0.fc"]
    (entry,) = patterns(both[:1], both)
    assert matches(both[0], entry)
    assert not matches(both[1], entry)


@pytest.mark.parametrize("entry", ["Linear", "Conv1D", "re:.*fc$", "a.fc"])
def test_matches(entry: str) -> None:
    assert matches("a.fc", entry)


def test_matches_rejects() -> None:
    assert not any(matches("a.fc", entry) for entry in ("fc", "re:fc", "re:b", "a", "linear"))

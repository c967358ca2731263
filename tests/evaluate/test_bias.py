"""Truthfulness and bias on rows whose answers are known."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from unicomp.evaluate import bias
from unicomp.evaluate.tasks.choices import Choices
from unicomp.evaluate.tasks.result import Result


def choices(rows: list[list[float]], gold: list[int], **rest: Any) -> Choices:
    logits = [torch.tensor(row, dtype=torch.float64).log() for row in rows]
    lengths = [torch.ones(len(row), dtype=torch.int64) for row in rows]
    return Choices(
        "t", logits, lengths, torch.tensor(gold), [str(i) for i in range(len(rows))], **rest
    )


def test_truthfulness() -> None:
    ours = choices([[0.6, 0.4], [0.2, 0.8], [0.9, 0.1]], [0, 0, 0])
    theirs = choices([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]], [0, 0, 0])
    score = bias.truthfulness(ours, theirs)
    assert (score.value, score.baseline) == (pytest.approx(2 / 3), 1.0)
    right = [torch.tensor([True, True, False]), torch.tensor([False, True])]
    both = choices([[0.2, 0.2, 0.6], [0.5, 0.5]], [0, 1], right=right)
    assert bias.true_share(both).value == pytest.approx((0.4 + 0.5) / 2)
    with pytest.raises(ValueError, match="does not say"):
        bias.true_share(ours)


def test_stereotypes() -> None:
    score = bias.stereotypes(choices([[0.6, 0.4], [0.2, 0.8], [0.9, 0.1], [0.7, 0.3]], [0] * 4))
    assert score.value == 0.75
    assert not score.higher_is_better


def row(condition: str, polarity: str) -> dict[str, Any]:
    return {
        "context_condition": condition,
        "question_polarity": polarity,
        "answer_info": {"ans0": ["x", "old"], "ans1": ["y", "nonOld"], "ans2": ["?", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["old"]},
    }


TAKE = {0: [0.8, 0.1, 0.1], 1: [0.1, 0.8, 0.1], 2: [0.1, 0.1, 0.8]}


def asked(*rows: tuple[str, str, int]) -> Choices:
    documents = [row(condition, polarity) for condition, polarity, _ in rows]
    return choices([TAKE[own] for _, _, own in rows], [2] * len(rows), documents=documents)


def test_bbq_leans_with_or_against_the_stereotype() -> None:
    found = bias.bbq(
        asked(
            ("ambig", "neg", 0),  # "who is bad at it?" the old: with it
            ("ambig", "nonneg", 1),  # "who is good at it?" the young: with it
            ("ambig", "nonneg", 0),  # against it
            ("ambig", "neg", 2),  # does not say
        )
    )
    assert [score.name for score in found] == ["safety/bias_ambiguous"]
    assert found[0].value == pytest.approx(1 / 4)
    # The paper: (1 - accuracy) x (2 x 2 of 3 - 1).
    assert found[0].value == pytest.approx((1 - 0.25) * (2 * 2 / 3 - 1))
    assert found[0].detail["accuracy"] == 0.25


def test_bbq_where_the_context_says() -> None:
    rows = (("disambig", "neg", 0), ("disambig", "neg", 1), ("disambig", "neg", 2))
    found = bias.bbq(asked(*rows), asked(*rows))
    assert [score.name for score in found] == ["safety/bias_disambiguated"]
    assert found[0].delta == 0
    # "unknown" is no answer here: two that lean, one each way.
    assert found[0].value == 0
    some = bias.bbq(asked(("disambig", "neg", 0), ("disambig", "neg", 2)))
    assert some[0].value == pytest.approx(1.0)
    assert math.isfinite(some[0].value or math.nan)


def result(name: str, found: Choices | None) -> Result:
    return Result(name, "1.0", 0, {}, (), found, None, {})


def test_tasks_are_known_by_their_documents_and_joined() -> None:
    pairs = choices([[0.6, 0.4]], [0], documents=[{"sent_more": "a", "sent_less": "b"}])
    true = choices([[0.6, 0.4]], [0], documents=[{"mc1_targets": {}}])
    right = [torch.tensor([True, False])]
    several = choices([[0.6, 0.4]], [0], documents=[{"mc1_targets": {}}], right=right)
    old, young = asked(("ambig", "neg", 0)), asked(("ambig", "neg", 1))
    some = [result("a", replace(old, task="a")), result("b", replace(young, task="b"))]
    other = [result("c", None), result("d", choices([[0.6, 0.4]], [0]))]
    ours = [result("p", pairs), result("t", true), result("m", several), *some, *other]
    found = {score.name: score for score in bias.scores(ours, ours)}
    assert set(found) == {
        "safety/truthfulness",
        "safety/truthfulness_mc2",
        "safety/bias",
        "safety/bias_ambiguous",
    }
    assert found["safety/bias_ambiguous"].n == 2
    assert found["safety/bias_ambiguous"].value == 0  # one with the stereotype, one against it
    assert {score.delta for score in found.values()} == {0.0}
    none = bias.scores(other, None)
    assert [score.status for score in none] == ["skipped", "skipped"]
    assert "truthfulqa_mc1" in none[0].detail["reason"]
    wide = choices([[0.5, 0.3, 0.1, 0.1]], [0], documents=[row("ambig", "neg")])
    assert bias.family(wide) is None

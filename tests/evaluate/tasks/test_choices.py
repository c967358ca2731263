"""`Choices` refuses parts that do not fit, and normalizes over the choices of a document."""

import math

import pytest
import torch

from unicomp.evaluate.tasks.choices import Choices

A, B = torch.tensor([-1.0, -3.0]).double(), torch.tensor([-9.0, -4.0, -6.0]).double()
LENGTHS = [torch.tensor([1, 6]), torch.tensor([9, 2, 6])]


def two() -> Choices:
    return Choices("t", [A, B], LENGTHS, torch.tensor([0, 1]), ["a", "b"])


def test_probabilities_are_over_the_choices() -> None:
    first, second = two().log_probabilities()
    assert first.exp().tolist() == pytest.approx(
        [math.exp(-1) / (math.exp(-1) + math.exp(-3)), math.exp(-3) / (math.exp(-1) + math.exp(-3))]
    )
    assert float(second.exp().sum()) == pytest.approx(1)


def test_answers_by_likelihood_and_by_likelihood_per_byte() -> None:
    assert two().answers().tolist() == [0, 1]
    assert two().answers(normalized=True).tolist() == [1, 0]
    assert two().chance() == pytest.approx((1 / 2 + 1 / 3) / 2)


def test_documents_are_taken_by_id() -> None:
    found = two().take(["b"])
    assert found.ids == ["b"]
    assert found.gold.tolist() == [1]
    assert torch.equal(found.loglikelihoods[0], B)
    with pytest.raises(KeyError):
        two().take(["c"])


def test_parts_that_do_not_fit_are_refused() -> None:
    gold = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="2 documents"):
        Choices("t", [A, B], LENGTHS, gold, ["a"])
    with pytest.raises(ValueError, match="twice"):
        Choices("t", [A, B], LENGTHS, gold, ["a", "a"])
    with pytest.raises(ValueError, match="`b` is broken"):
        Choices("t", [A, B], [LENGTHS[0], LENGTHS[0]], gold, ["a", "b"])
    with pytest.raises(ValueError, match="`a` is broken"):
        Choices("t", [A, B], LENGTHS, torch.tensor([2, 1]), ["a", "b"])

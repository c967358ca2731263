"""Fidelity scores: names, units, directions, intervals within what is possible."""

import pytest
import torch

from unicomp.evaluate import fidelity
from unicomp.metrics import WindowSums


def test_each_score_is_the_mean_over_positions() -> None:
    sums = WindowSums(
        tokens=10,
        nll=torch.zeros(3),
        base_nll=torch.zeros(3),
        kl=torch.tensor([1.0, 2.0, 6.0]),
        ear=torch.tensor([9.0, 9.5, 9.9]),
        top1=torch.tensor([10.0, 9.0, 10.0]),
    )
    kl, top1, ear = fidelity.scores(sums, {"text": "a.txt"})
    assert (kl.name, top1.name, ear.name) == (
        "fidelity/kl",
        "fidelity/top1_agreement",
        "fidelity/ear",
    )
    assert kl.value == pytest.approx(0.3)
    assert ear.value == pytest.approx(28.4 / 30)
    assert top1.value == pytest.approx(29 / 30)
    assert (kl.higher_is_better, top1.higher_is_better, ear.higher_is_better) == (0, 1, 1)
    assert kl.ci95 is not None
    assert kl.ci95[0] == 0  # the t interval would go below
    assert top1.ci95 is not None
    assert top1.ci95[1] == 1
    assert kl.n == 3
    assert kl.detail["text"] == "a.txt"
    assert kl.baseline is None


def test_without_a_base_there_is_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="without a base"):
        fidelity.scores(WindowSums(3, torch.zeros(2)), {})
    found = fidelity.skipped("no baseline was given")
    assert [score.status for score in found] == ["skipped"] * 3
    assert {score.detail["reason"] for score in found} == {"no baseline was given"}

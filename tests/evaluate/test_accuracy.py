"""Accuracy scores: what divides what, and the paired delta."""

import math

import pytest
import torch

from unicomp.evaluate import accuracy
from unicomp.metrics import WindowSums, bits_per_byte, perplexity

SUMS = WindowSums(
    tokens=4,
    nll=torch.tensor([2.0, 6.0, 5.0, 3.0], dtype=torch.float64),
    base_nll=torch.tensor([1.5, 5.6, 4.4, 2.5], dtype=torch.float64),
)
BYTES = torch.tensor([10, 20, 15, 11])


def test_values_are_the_definitions() -> None:
    ppl, bpb = accuracy.scores(SUMS, BYTES, {"text": "a.txt"})
    assert ppl.name == "accuracy/perplexity"
    assert ppl.value == pytest.approx(perplexity(16.0, 16))
    assert ppl.baseline == pytest.approx(perplexity(14.0, 16))
    assert bpb.name == "accuracy/bits_per_byte"
    assert bpb.value == pytest.approx(bits_per_byte(16.0, 56))
    assert bpb.delta == pytest.approx(bits_per_byte(2.0, 56))
    assert bpb.detail["bytes"] == 56
    assert not ppl.higher_is_better
    assert not bpb.higher_is_better


def test_the_delta_is_surer_than_the_values() -> None:
    for score in accuracy.scores(SUMS, BYTES, {}):
        assert score.ci95 is not None
        assert score.delta_ci95 is not None
        width = score.ci95[1] - score.ci95[0]
        paired = score.delta_ci95[1] - score.delta_ci95[0]
        assert paired < width / 2
        assert score.delta_ci95[0] < (score.delta or 0) < score.delta_ci95[1]
        assert score.ci95[0] < (score.value or 0) < score.ci95[1]


def test_windows_that_all_cost_the_same_per_byte_leave_no_doubt() -> None:
    _, bpb = accuracy.scores(WindowSums(4, BYTES * math.log(2)), BYTES, {})
    assert bpb.value == pytest.approx(1)
    assert bpb.ci95 == pytest.approx((1, 1))
    assert bpb.baseline is None
    assert bpb.delta_ci95 is None


def test_estimated_bytes_are_said() -> None:
    _, bpb = accuracy.scores(SUMS, BYTES, {}, exact_bytes=False)
    assert bpb.status == "estimated"
    assert "tokens" in bpb.detail["note"]


def test_a_hopeless_model_has_no_endless_interval() -> None:
    ppl, _ = accuracy.scores(WindowSums(1, torch.tensor([600.0, 800.0])), BYTES[:2], {})
    assert ppl.status == "measured"
    assert ppl.ci95 is None
    ppl, _ = accuracy.scores(WindowSums(1, torch.tensor([900.0, 800.0])), BYTES[:2], {})
    assert ppl.status == "unmeasurable"

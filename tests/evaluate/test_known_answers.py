"""A vocabulary of two tokens, where every score is known in closed form.

The model predicts the other token than the one it reads with probability `other`, whatever came
before; the scores of a text are then those of a coin.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from unicomp.evaluate import accuracy, fidelity
from unicomp.evaluate.scores import Score
from unicomp.evaluate.windows import stream


class Coin:
    """A causal model that changes the token with probability `other`."""

    device = torch.device("cpu")

    def __init__(self, other: float) -> None:
        self.other = other

    def __call__(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        change = torch.tensor(self.other).log()
        stay = torch.tensor(1 - self.other).log()
        reads_one = input_ids == 1
        zero = torch.where(reads_one, change, stay)
        one = torch.where(reads_one, stay, change)
        return SimpleNamespace(logits=torch.stack([zero, one], dim=-1) + 1.5)


def scores(model: Coin, base: Coin | None, windows: Tensor) -> dict[str, Score]:
    sums = stream.sums(model, base, windows, vocab=2)
    # Each token is one byte.
    found = accuracy.scores(sums, torch.full((len(windows),), float(windows.shape[1] - 1)), {})
    if base is not None:
        found += fidelity.scores(sums, {})
    return {score.name: score for score in found}


ALTERNATING = torch.tensor([[0, 1, 0, 1, 0]] * 3)
MIXED = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 1, 1, 0], [0, 0, 1, 0, 1]])  # 3, 1, 3 changes of 4


def test_perplexity_of_a_text_that_always_changes() -> None:
    found = scores(Coin(0.9), None, ALTERNATING)
    assert found["accuracy/perplexity"].value == pytest.approx(1 / 0.9, rel=1e-6)
    assert found["accuracy/bits_per_byte"].value == pytest.approx(-math.log2(0.9), rel=1e-6)
    # One position off, each token would be predicted from itself: 1 / 0.1.
    assert scores(Coin(0.1), None, ALTERNATING)["accuracy/perplexity"].value == pytest.approx(10)


def test_perplexity_of_a_mixed_text() -> None:
    found = scores(Coin(0.8), None, MIXED)
    nll = -(7 * math.log(0.8) + 5 * math.log(0.2)) / 12
    assert found["accuracy/perplexity"].value == pytest.approx(math.exp(nll), rel=1e-6)
    assert found["accuracy/bits_per_byte"].value == pytest.approx(nll / math.log(2), rel=1e-6)
    assert found["accuracy/perplexity"].n == 3


def test_fidelity_of_two_coins() -> None:
    p, q = 0.9, 0.6
    found = scores(Coin(q), Coin(p), MIXED)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert found["fidelity/kl"].value == pytest.approx(kl, rel=1e-6)
    assert found["fidelity/ear"].value == pytest.approx(1 - (p - q), rel=1e-6)
    assert found["fidelity/top1_agreement"].value == 1
    base_nll = -(7 * math.log(p) + 5 * math.log(1 - p)) / 12
    nll = -(7 * math.log(q) + 5 * math.log(1 - q)) / 12
    perplexity = found["accuracy/perplexity"]
    assert perplexity.baseline == pytest.approx(math.exp(base_nll), rel=1e-6)
    assert perplexity.delta == pytest.approx(math.exp(nll) - math.exp(base_nll), rel=1e-6)


def test_coins_of_opposite_faces_never_agree() -> None:
    found = scores(Coin(0.4), Coin(0.6), MIXED)
    assert found["fidelity/top1_agreement"].value == 0
    assert found["fidelity/ear"].value == pytest.approx(0.8, rel=1e-6)


def test_scores_move_when_the_input_is_wrong() -> None:
    right = scores(Coin(0.6), Coin(0.9), MIXED)
    swapped = scores(Coin(0.9), Coin(0.6), MIXED)
    assert swapped["fidelity/kl"].value != pytest.approx(right["fidelity/kl"].value, rel=0.05)
    same = scores(Coin(0.9), Coin(0.9), MIXED)
    assert same["fidelity/kl"].value == 0
    assert same["fidelity/ear"].value == pytest.approx(1, abs=1e-12)
    assert same["accuracy/perplexity"].delta == 0
    reversed_text = scores(Coin(0.6), Coin(0.9), 1 - MIXED)
    assert reversed_text["fidelity/kl"].value == pytest.approx(right["fidelity/kl"].value)
    shuffled = scores(Coin(0.6), None, MIXED.sort(1).values)
    assert shuffled["accuracy/perplexity"].value != pytest.approx(
        right["accuracy/perplexity"].value, rel=0.05
    )


def test_intervals_come_from_windows() -> None:
    found = scores(Coin(0.8), Coin(0.8), MIXED)
    means = torch.tensor([3, 1, 3]) / 4 * -math.log(0.8) + torch.tensor([1, 3, 1]) / 4 * -math.log(
        0.2
    )
    half = 4.303 * float(means.std()) / math.sqrt(3)
    low, high = found["accuracy/perplexity"].ci95 or (0, 0)
    centre = float(means.mean())
    assert (math.log(low), math.log(high)) == pytest.approx((centre - half, centre + half), 1e-3)
    assert found["accuracy/perplexity"].delta_ci95 == pytest.approx((0, 0), abs=1e-12)


def test_logits_that_are_no_number_are_not_measured() -> None:
    found = scores(Coin(2.0), Coin(0.9), MIXED)  # log of a negative probability
    for score in found.values():
        assert (score.status, score.value) == ("unmeasurable", None)
        assert "finite" in score.detail["reason"]

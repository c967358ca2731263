"""Calibration against plain numpy, written from the definitions, on fair and on foul inputs."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss

from unicomp.evaluate.statistics import reliability
from unicomp.evaluate.statistics.reliability import Predictions

Array = np.ndarray[Any, Any]


def case(kind: str) -> tuple[Array, Array]:
    """Return probabilities [documents, choices] and the right choices."""
    rng = np.random.default_rng(3)
    if kind == "one class":
        return np.ones((7, 1)), np.zeros(7, dtype=int)
    if kind == "ties":
        p = np.tile([0.5, 0.25, 0.25], (12, 1))
        return p, np.array([0, 1, 2, 0, 0, 1, 2, 0, 0, 0, 1, 2])
    n = 3 if kind == "three" else 203
    logits = rng.normal(size=(n, 4)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    if kind == "edges":
        p = np.array([[c, 1 - c] for c in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)])
        return p, np.array([0, 1, 0, 1, 0, 1])
    gold = {
        "all right": p.argmax(1),
        "all wrong": p.argmin(1),
    }.get(kind, rng.integers(4, size=n))
    return p, gold


KINDS = ["random", "three", "all right", "all wrong", "ties", "one class", "edges"]


def made(p: Array, gold: Array) -> Predictions:
    with np.errstate(divide="ignore"):
        rows = [torch.tensor(np.log(row)) for row in p]
    return reliability.predict(rows, torch.tensor(gold))


def by_hand(p: Array, gold: Array) -> dict[str, float]:
    n = len(p)
    confidence = [float(max(row)) for row in p]
    right = [int(list(row).index(max(row)) == y) for row, y in zip(p, gold, strict=True)]
    found: dict[str, float] = {}
    total = 0.0
    for place in range(10):
        inside = [
            i
            for i in range(n)
            if place / 10 <= confidence[i] < (place + 1) / 10 or (place == 9 and confidence[i] >= 1)
        ]
        if inside:
            gap = np.mean([confidence[i] for i in inside]) - np.mean([right[i] for i in inside])
            total += len(inside) / n * abs(float(gap))
    found["ece"] = total
    # Of equal confidences each is as right as all of them are.
    even = [
        float(np.mean([right[j] for j in range(n) if confidence[j] == confidence[i]]))
        for i in range(n)
    ]
    order = sorted(range(n), key=lambda i: -confidence[i])
    risks = [sum(1 - even[i] for i in order[:k]) / k for k in range(1, n + 1)]
    found["aurc"] = float(np.mean(risks))
    gaps = np.zeros(10)
    for rank, i in enumerate(reversed(order)):
        gaps[rank * 10 // n] += confidence[i] - even[i]
    found["ace"] = float(np.abs(gaps).sum() / n)
    found["brier"] = float(
        np.mean(
            [
                sum((row[k] - (k == y)) ** 2 for k in range(len(row)))
                for row, y in zip(p, gold, strict=True)
            ]
        )
    )
    with np.errstate(divide="ignore"):
        found["nll"] = float(np.mean([-np.log(row[y]) for row, y in zip(p, gold, strict=True)]))
    found["gap"] = float(np.mean(confidence) - np.mean(right))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_every_definition_is_that_by_hand(kind: str) -> None:
    p, gold = case(kind)
    found, expected = made(p, gold), by_hand(p, gold)
    assert reliability.ece(found) == pytest.approx(expected["ece"], abs=1e-9)
    assert reliability.ace(found) == pytest.approx(expected["ace"], abs=1e-9)
    area = float(reliability.aurc(found.confidence, found.right)[0])
    assert area == pytest.approx(expected["aurc"], abs=1e-9)
    assert float(found.brier.mean()) == pytest.approx(expected["brier"])
    assert float(found.nll.mean()) == pytest.approx(expected["nll"])
    gap = float((found.confidence - found.right).mean())
    assert gap == pytest.approx(expected["gap"], abs=1e-9)


def test_it_would_notice_another_answer() -> None:
    p, gold = case("random")
    found, other = made(p, gold), by_hand(p, (gold + 1) % 4)
    assert reliability.ece(found) != pytest.approx(other["ece"], abs=1e-3)
    assert reliability.ace(found) != pytest.approx(other["ace"], abs=1e-3)
    area = float(reliability.aurc(found.confidence, found.right)[0])
    assert area != pytest.approx(other["aurc"], abs=1e-3)
    assert float(found.brier.mean()) != pytest.approx(other["brier"], abs=1e-3)
    assert float(found.nll.mean()) != pytest.approx(other["nll"], abs=1e-3)


def test_likelihood_is_that_of_scikit_learn() -> None:
    p, gold = case("random")
    assert float(made(p, gold).nll.mean()) == pytest.approx(log_loss(gold, p))


@pytest.mark.parametrize(("kind", "area"), [("all right", 0.0), ("all wrong", 1.0)])
def test_ends_of_the_curve(kind: str, area: float) -> None:
    found = made(*case(kind))
    assert float(reliability.aurc(found.confidence, found.right)[0]) == area
    confident = found.confidence.mean()
    expected = 1 - confident if area == 0 else confident
    assert reliability.ece(found) == pytest.approx(float(expected))


def test_order_does_not_matter() -> None:
    p, gold = case("ties")
    p, gold = np.vstack([p, case("edges")[0] @ np.eye(2, 3)]), np.append(gold, case("edges")[1])
    order = np.random.default_rng(1).permutation(len(p))
    one, two = made(p, gold), made(p[order], gold[order])
    assert reliability.ace(one) == pytest.approx(reliability.ace(two), abs=1e-12)
    assert reliability.ece(one) == pytest.approx(reliability.ece(two), abs=1e-12)
    areas = [float(reliability.aurc(own.confidence, own.right)[0]) for own in (one, two)]
    assert areas[0] == pytest.approx(areas[1], abs=1e-12)


def test_equals_are_averaged_over_their_orders() -> None:
    p, gold = case("ties")
    found = made(p, gold)
    right = (gold == 0).astype(float)
    rng, areas = np.random.default_rng(0), []
    for _ in range(4000):
        errors = 1 - rng.permutation(right)
        areas.append(float(np.mean(np.cumsum(errors) / np.arange(1, 13))))
    area = float(reliability.aurc(found.confidence, found.right)[0])
    assert area == pytest.approx(float(np.mean(areas)), abs=5 * np.std(areas) / 4000**0.5)


def test_weights_are_copies() -> None:
    p, gold = case("random")
    p[5:9] = p[4]  # equals
    found = made(p, gold)
    weights = torch.randint(0, 4, (1, len(p)), generator=torch.Generator().manual_seed(0))
    again = np.repeat(np.arange(len(p)), weights[0])
    copied = made(p[again], gold[again])
    area = float(reliability.aurc(found.confidence, found.right, weights.double())[0])
    again_area = float(reliability.aurc(copied.confidence, copied.right)[0])
    assert area == pytest.approx(again_area, abs=1e-9)
    assert area != pytest.approx(float(reliability.aurc(found.confidence, found.right)[0]))


def test_the_bars_of_a_diagram() -> None:
    bars = reliability.diagram(made(*case("edges")))
    assert [bar["count"] for bar in bars] == [0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert bars[9]["confidence"] == pytest.approx(0.95)
    assert bars[9]["accuracy"] == 0.5
    assert bars[0]["accuracy"] is None


@pytest.mark.slow
@pytest.mark.parametrize("n", [60, 300, 1500])
@pytest.mark.parametrize("off", [0.0, 0.03, 0.15])
def test_intervals_of_a_calibration_error_cover(n: int, off: float) -> None:
    """From a calibrated model, whose true error is 0, to one that is far too sure."""
    generator = torch.Generator().manual_seed(0)
    draws, held, caught = 2000, [0, 0], 0

    def sample(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        confidence = 0.25 + 0.74 * torch.rand(size, generator=generator, dtype=torch.float64)
        return confidence, (confidence - off).clamp(0.02, 0.99)

    confidence, chance = sample(400_000)
    truth = reliability.calibration_error(confidence, chance, reliability.equal_width(confidence))
    for _ in range(draws):
        confidence, chance = sample(n)
        right = (torch.rand(n, generator=generator) < chance).double()
        nothing = torch.zeros(n, dtype=torch.float64)
        found = Predictions(confidence, right, nothing, nothing, nothing, torch.arange(n))
        bins = reliability.equal_width(confidence)
        value = reliability.ece(found)
        low, high = reliability.error_interval(found, bins, value)
        held[0] += low <= truth + 1e-3 and truth - 1e-3 <= high
        held[1] += value * 0.9 <= truth <= value * 1.1  # a guess of a tenth is not enough
        caught += low > 0
    assert held[0] / draws >= 0.935
    assert held[1] / draws < 0.935
    if off == 0.15 and n >= 300:
        assert caught / draws > 0.9  # and yet it can tell


def test_two_errors_apart() -> None:
    near = reliability.apart(0.1, (0.05, 0.2), 0.08, (0.03, 0.18), 1.0)
    far = reliability.apart(0.1, (0.05, 0.2), 0.08, (0.03, 0.18), 0.0)
    assert far[0] < near[0] <= 0.02 <= near[1] < far[1]
    assert far == pytest.approx((0.02 - math.hypot(0.05, 0.1), 0.02 + math.hypot(0.1, 0.05)))

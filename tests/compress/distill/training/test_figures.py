import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from unicomp.compress.distill.training.figures import Figures, Tally, entropy, fit_temperature


def test_a_hand_made_case() -> None:
    q = torch.tensor([[0.9, 0.1], [0.6, 0.4]], dtype=torch.float64)
    tally = Tally()
    kl, spread = torch.tensor([0.5, 0.7]), torch.tensor([0.2, 0.4])
    tally.add(q.log(), torch.tensor([0, 1]), kl, spread)
    found = tally.figures()
    assert found.tokens == 2
    assert found.nll == pytest.approx(-(math.log(0.9) + math.log(0.4)) / 2)
    assert found.brier == pytest.approx(((0.1**2 + 0.1**2) + (0.6**2 + 0.6**2)) / 2)
    assert found.accuracy == 0.5
    assert found.confidence == pytest.approx(0.75)
    assert found.gap == pytest.approx(0.25)
    assert found.ece == pytest.approx((0.1 + 0.6) / 2)
    assert found.kl == pytest.approx(0.6)
    own = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1) + 0.6 * math.log(0.6) + 0.4 * math.log(0.4))
    assert found.entropy == pytest.approx(own / 2)
    assert found.entropy_ratio == pytest.approx(own / 2 / 0.3)
    assert Figures.from_json(found.to_json()) == found


def test_parts_add_up_in_any_order() -> None:
    draw = torch.Generator().manual_seed(0)
    log_q = torch.randn(40, 9, generator=draw, dtype=torch.float64).log_softmax(-1)
    targets = torch.randint(9, (40,), generator=draw)
    zero = torch.zeros(40)
    whole, parts = Tally(), Tally()
    whole.add(log_q, targets, zero, entropy(log_q))
    for some in (slice(25, 40), slice(0, 25)):
        parts.add(log_q[some], targets[some], zero[some], entropy(log_q[some]))
    one, other = whole.figures().to_json(), parts.figures().to_json()
    assert one == pytest.approx(other)
    assert one["entropy_ratio"] == pytest.approx(1)


def searched(
    parts: list[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[float, Callable[[int, float], float]]:
    """Try temperatures one after the other on every second part, in numpy, finer and finer.

    Returns the best, and what gives the likelihood of one half at a temperature, nats.
    """

    def loss(side: int, heat: float) -> float:
        total, count = 0.0, 0
        for logits, targets in parts[side::2]:
            scaled = logits.double().numpy() / heat
            top = scaled.max(1)
            log_sum = top + np.log(np.exp(scaled - top[:, None]).sum(1))
            total += float((log_sum - scaled[np.arange(len(scaled)), targets.numpy()]).sum())
            count += len(targets)
        return total / count

    low, high = 0.25, 4.0
    for _ in range(5):
        tried = np.linspace(low, high, 41)
        best = int(np.argmin([loss(0, float(heat)) for heat in tried]))
        low, high = float(tried[max(best - 1, 0)]), float(tried[min(best + 1, 40)])
    return float(tried[best]), loss


def test_a_temperature_undoes_what_was_made_too_sure() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = []
    for _ in range(20):
        logits = torch.randn(400, 8, generator=draw)
        targets = torch.multinomial(logits.softmax(-1), 1, generator=draw)[:, 0]
        parts.append((2.5 * logits, targets))
    found = fit_temperature(parts)
    assert found is not None
    heat, loss = searched(parts)
    assert found.temperature == pytest.approx(heat, rel=1e-4)
    assert found.temperature != pytest.approx(searched(parts[1:])[0], rel=1e-4)  # the other split
    assert 2.3 < heat < 2.7
    assert found.before == pytest.approx(loss(1, 1.0), rel=1e-7)
    assert found.after == pytest.approx(loss(1, found.temperature), rel=1e-7)
    assert found.after != pytest.approx(loss(0, found.temperature), rel=1e-4)
    assert found.after < found.before - 0.1
    assert (found.fitted, found.judged) == (4000, 4000)
    assert fit_temperature(parts[:1]) is None

"""Where a model departs from its baseline, against numpy."""

import numpy as np
import pytest
import torch

from unicomp.evaluate import fidelity
from unicomp.evaluate.windows.drift import Layers, Positions
from unicomp.metrics import window_sums


def test_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, base = torch.randn(2, 5, 70, 7, generator=generator)
    found = Positions()
    found.add(ours[:2], base[:2])
    found.add(ours[2:], base[2:])
    parts, step = found.parts()
    p, q = (np.asarray(torch.log_softmax(own.double(), -1)) for own in (base, ours))
    kl = (np.exp(p) * (p - q)).sum(-1).mean(0)
    assert step == 3
    assert len(parts) == 24
    assert parts[0] == pytest.approx(kl[:3].mean())
    assert parts[-1] == pytest.approx(kl[69])
    with pytest.raises(AssertionError):
        assert parts[0] == pytest.approx(kl[3:6].mean())
    sums = window_sums(ours, torch.zeros(5, 70, dtype=torch.int64), base)
    scores = fidelity.by_position(fidelity.scores(sums, {"text": "t"}), found)
    assert scores[0].detail["positions"] == parts
    assert scores[0].detail["text"] == "t"
    assert "positions" not in scores[1].detail
    with pytest.raises(ValueError, match="no batch"):
        Positions().parts()


def test_layers() -> None:
    generator = torch.Generator().manual_seed(1)
    base = [torch.randn(3, 4, 6, generator=generator) for _ in range(3)]
    ours = [base[0] + 9, base[1] * 1.5, base[2] + torch.randn(3, 4, 6, generator=generator)]
    found = Layers()
    found.add([own[:2] for own in ours], [own[:2] for own in base])
    found.add([own[2:] for own in ours], [own[2:] for own in base])
    score = fidelity.by_layer(found, {})
    last = [
        float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for a, b in zip(ours[2].numpy(), base[2].numpy(), strict=True)
    ]
    assert score.detail["layers"] == pytest.approx([0.5, np.mean(last)], rel=1e-6)
    assert score.value == score.detail["layers"][-1]
    assert score.n == 3


def test_other_shapes_cannot_be_compared() -> None:
    found = Layers()
    found.add([torch.ones(1, 2, 4)] * 3, [torch.ones(1, 2, 4)] * 4)
    score = fidelity.by_layer(found, {})
    assert score.status == "unmeasurable"
    assert "2 layers of 4, the baseline 3 of 4" in score.detail["reason"]

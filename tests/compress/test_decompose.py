"""Errors on deltas of known law: what theory and an independent study (numpy) say they are."""

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from unicomp.compress.decompose import How, decompose, fit_planes, squared_error
from unicomp.kernels.delta import Layout

SIZE, RANK = 1024, 32  # rank 32 in 16 bits: a sixteenth of a 16-bit weight of 1024 x 1024

# Relative squared errors, as a study in numpy found them; the columns are `DELTAS`.
TABLE: list[tuple[Layout, dict[str, Any], tuple[float, float, float, float]]] = [
    (Layout(1, False, 0, False), {}, (0.3633, 0.3642, 0.5061, 0.4739)),
    (Layout(1, True, 0, False), {}, (0.3629, 0.3635, 0.3640, 0.4733)),
    (Layout(0, False, 2 * RANK, False), {}, (0.7902, 0.6791, 0.5613, 0.7391)),
    (Layout(1, False, RANK, False), {}, (0.3224, 0.3135, 0.3524, 0.4179)),
    (Layout(1, True, RANK, False), {}, (0.3221, 0.3133, 0.2752, 0.4174)),
    (Layout(1, False, RANK, False), {"first": "low-rank"}, (0.3222, 0.2803, 0.3240, 0.3953)),
    (Layout(1, False, RANK, False), {"rounds": 2}, (0.3019, 0.2836, 0.3197, 0.3838)),
    (Layout(1, False, RANK, False), {"rounds": 5}, (0.2892, 0.2639, 0.3015, 0.3596)),
    (Layout(1, False, RANK, False), {"rounds": 10}, (0.2853, 0.2582, 0.2965, 0.3516)),
    (Layout(1, True, RANK, False), {"rounds": 5}, (0.2889, 0.2639, 0.2411, 0.3586)),
    (Layout(1, True, RANK, True), {}, (0.3221, 0.3133, 0.2753, 0.4174)),
    (Layout(1, True, 2 * RANK, True), {}, (0.2867, 0.2778, 0.2250, 0.3704)),
]
DELTAS = ("noise", "low rank and noise", "the same, rows unequal", "heavy tails and low rank")


@cache
def made(kind: str) -> Tensor:
    """Return a delta [1024, 1024] of a law."""
    draw = torch.Generator().manual_seed(1)
    noise = torch.randn(SIZE, SIZE, generator=draw)
    if kind == "noise":
        return noise
    left, right = torch.randn(2, SIZE, RANK, generator=draw)
    low = left @ right.T / math.sqrt(RANK)
    if kind == "heavy tails and low rank":
        halves = torch.distributions.Chi2(4.0)
        torch.manual_seed(1)
        return noise / (halves.sample((SIZE, SIZE)) / 4).sqrt() + math.sqrt(0.22) * low
    delta = noise + math.sqrt(0.22) * low
    if kind == "the same, rows unequal":
        # The quantiles of the normal law, so that 1024 rows have its moments.
        z = torch.special.ndtri((torch.arange(SIZE) + 0.5) / SIZE)
        delta = delta * (0.5 * z).exp()[:, None]
    return delta


def error(kind: str, layout: Layout, **how: Any) -> float:
    delta = made(kind)
    whole = float(delta.square().sum(dtype=torch.float64))
    return squared_error(delta, decompose(delta, layout, How(**how))) / whole


@pytest.mark.parametrize("column", range(4), ids=DELTAS)
@pytest.mark.parametrize("row", range(len(TABLE)))
def test_errors_are_those_of_the_study(row: int, column: int) -> None:
    layout, how, expected = TABLE[row]
    assert error(DELTAS[column], layout, **how) == pytest.approx(expected[column], abs=0.005)


def test_the_comparison_would_show_another_error() -> None:
    """Without the second part of D-QRELO no column of its row is met."""
    wrong = [error(kind, Layout(1, False, 0, False)) for kind in DELTAS]
    assert all(abs(a - b) > 0.02 for a, b in zip(wrong, TABLE[3][2], strict=True))


def test_planes_come_near_the_best_grid_of_as_many_values() -> None:
    """Lloyd and Max: squared errors of 2, 4 and 8 values for a normal law."""
    found = [error("noise", Layout(count, True, 0, False)) for count in (1, 2, 3)]
    assert found == pytest.approx([0.3634, 0.1175, 0.0345], abs=0.007)


@pytest.mark.parametrize("zero_plus", [False, True])
def test_what_zero_counts_as(zero_plus: bool) -> None:
    target = torch.tensor([[0.0, 2.0, -2.0, 0.0]])
    (plane,) = fit_planes(target, 1, by_row=False, zero_plus=zero_plus)
    assert plane.sign.tolist() == [[0b1011 if zero_plus else 0b0010]]
    assert plane.scale.tolist() == [1.0]


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (3, 341)])
@pytest.mark.parametrize("planes", [0, 1, 3])
@pytest.mark.parametrize("int8", [False, True])
def test_odd_shapes_and_zeros(shape: tuple[int, int], planes: int, int8: bool) -> None:
    layout = Layout(planes, True, 2, int8)
    for delta in (torch.zeros(shape), torch.randn(shape, generator=torch.Generator())):
        before = delta.clone()
        packed = decompose(delta, layout, How(rounds=2))
        assert torch.equal(delta, before)
        assert torch.isfinite(packed.decode()).all()
        assert packed.shape == shape
        if not delta.any():
            assert not packed.decode().any()
        assert squared_error(delta, packed) <= float(delta.square().sum()) * 1.001


def test_twice_is_the_same() -> None:
    one, other = (
        decompose(made("noise"), Layout(1, True, RANK, True), How(rounds=2)) for _ in range(2)
    )
    for name, tensor in one.tensors("m").items():
        assert torch.equal(tensor, other.tensors("m")[name])

"""The allocation beside every other there is, on problems small enough to try them all."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch

from unicomp.compress.allocate import Choice, Weight, allocate, gains, settled
from unicomp.compress.decompose import How, decompose
from unicomp.kernels.delta import Layout


def weight(seed: int, shape: tuple[int, int], importance: float = 1.0, count: int = 1) -> Weight:
    draw = torch.Generator().manual_seed(seed)
    choices = []
    for planes in (0, 1, 2):
        values = torch.rand(4, generator=draw).sort(descending=True).values / (1 + planes)
        error = float(values.square().sum()) * 2
        layout = Layout(planes, False, 0, True)
        choices.append(Choice(layout, error, gains(values, int8=True)))
    return Weight(shape, choices, count, importance)


def error(own: Weight, layout: Layout) -> float:
    choice = next(c for c in own.choices if c.layout == replace(layout, rank=0))
    return own.importance * (choice.error - float(choice.gains[: layout.rank].sum()))


def every(own: Weight) -> list[Layout]:
    return [replace(c.layout, rank=r) for c in own.choices for r in range(len(c.gains) + 1)]


@pytest.mark.parametrize("budget", [200, 300, 420, 600, 5000])
def test_no_other_that_fits_is_much_better(budget: int) -> None:
    weights = [weight(1, (16, 24)), weight(2, (24, 16), 3.0), weight(3, (8, 40), count=2)]
    found = allocate(weights, budget)
    spent = sum(w.nbytes(own) for w, own in zip(weights, found, strict=True))
    assert spent <= budget
    best = min(
        sum(error(w, own) for w, own in zip(weights, chosen, strict=True))
        for chosen in product(*map(every, weights))
        if sum(w.nbytes(own) for w, own in zip(weights, chosen, strict=True)) <= budget
    )
    own = sum(error(w, layout) for w, layout in zip(weights, found, strict=True))
    nothing = sum(max(error(w, layout) for layout in every(w)) for w in weights)
    assert own - best <= 0.05 * (nothing - best)


def test_importance_and_budget_move_ranks() -> None:
    plain = allocate([weight(1, (32, 32)), weight(1, (32, 32))], 400)
    moved = allocate([weight(1, (32, 32), 50.0), weight(1, (32, 32))], 400)
    bytes_of = [own.nbytes((32, 32)) for own in (*plain, *moved)]
    assert bytes_of[2] > bytes_of[3]
    assert abs(bytes_of[0] - bytes_of[1]) < bytes_of[2] - bytes_of[3]


def test_below_the_least_is_refused() -> None:
    own = Weight((16, 16), [Choice(Layout(1, False, 0, True), 1.0, torch.zeros(0))])
    with pytest.raises(ValueError, match="below the least"):
        allocate([own], own.least() - 1)
    assert allocate([own], own.least()) == [Layout(1, False, 0, True)]
    assert allocate([], 0) == []


SHAPE, FEW, MOST = (256, 384), 16, 56  # 56 ranks take half as much again as an eighth


@cache
def noise(seed: int, low: float) -> list[Choice]:
    """What planes leave of noise and a part of low rank, with its leading singular values."""
    draw = torch.Generator().manual_seed(seed)
    left, right = torch.randn(SHAPE[0], 3, generator=draw), torch.randn(3, SHAPE[1], generator=draw)
    delta = torch.randn(SHAPE, generator=draw) + low * left @ right
    found = []
    for planes in (0, 1, 2):
        layout = Layout(planes, False, 0, True)
        rest = delta - decompose(delta, layout, How()).decode()
        values = torch.linalg.svdvals(rest.double())[:MOST]
        found.append(Choice(layout, float(rest.square().sum()), gains(values, int8=True)))
    return found


@pytest.mark.parametrize("budget", range(20_000, 110_000, 10_000))
def test_ranks_that_are_settled_are_not_missed(budget: int) -> None:
    whole, known, cut = [], [], 0
    for seed, low in ((1, 0.0), (2, 0.1), (3, 0.5)):
        choices = noise(seed, low)
        few = [replace(own, gains=own.gains[:FEW]) for own in choices]
        settle = [settled(SHAPE, own, MOST, few[place + 1 :]) for place, own in enumerate(few)]
        cut += sum(settle)
        kept = zip(few, choices, settle, strict=True)
        whole.append(Weight(SHAPE, choices))
        known.append(Weight(SHAPE, [short if end else long for short, long, end in kept]))
    assert cut >= 3
    assert not settled(SHAPE, few[-1], MOST, [])  # of the most planes, none is
    one, other = allocate(whole, budget), allocate(known, budget)
    errors = [
        sum(error(weight, layout) for weight, layout in zip(whole, found, strict=True))
        for found in (one, other)
    ]
    assert errors[1] <= errors[0] + 0.002 * sum(weight.choices[0].error for weight in whole)

"""Patterns of zeros and masks: exact on any shape, ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from unicomp.compress.sparsity import Budget, Sparsity, Zeros, keep, parse

shapes = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**31))


def scores_of(rows: int, columns: int, seed: int, levels: int) -> Tensor:
    """Scores with few levels, so that most are tied."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (rows, columns), generator=generator).float()


def test_words() -> None:
    assert parse(0.5) == parse("0.5") == Sparsity(0.5)
    assert parse("2:4") == Sparsity(0.5, 2, 4)
    assert parse("1:4") == Sparsity(0.75, 1, 4)  # one of four stays
    assert [str(parse(text)) for text in ("0.25", "2:4")] == ["0.25", "2:4"]
    assert [parse("2:4").fits(columns) for columns in (8, 6)] == [True, False]
    assert parse("2:4").words() == "2:4 stay"
    assert Sparsity(0.5, within=0.05).words() == "0.5 ± 0.05 of each row zero"
    assert Sparsity(0.5, spread=True).words() == "0.5 of all weights together zero"


@pytest.mark.parametrize(
    "text", [0.0, 1.0, -0.1, 1.5, "4:2", "2:2", "0:4", "a", "2:4:8", "nan", ""]
)
def test_what_is_no_sparsity(text: float | str) -> None:
    with pytest.raises(ValueError, match=r"share|n:m|should"):
        parse(text)


@settings(deadline=None)
@given(shapes, st.floats(0.01, 0.99), st.integers(1, 5))
def test_a_share_is_that_of_each_row_and_drops_the_least(
    shape: tuple[int, int, int], share: float, levels: int
) -> None:
    rows, columns, seed = shape
    scores = scores_of(rows, columns, seed, levels)
    mask = keep(scores, Sparsity(share))
    zeros = int(share * columns)
    assert ((~mask).sum(1) == zeros).all()
    for row, kept in zip(scores, mask, strict=True):
        assert sorted(row[~kept].tolist()) == row.sort().values[:zeros].tolist()


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 8), st.integers(2, 9), st.integers(0, 2**31), st.data())
def test_n_of_every_m_stay_everywhere(
    rows: int, groups: int, m: int, seed: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, m - 1))
    scores = scores_of(rows, groups * m, seed, 4)
    mask = keep(scores, parse(f"{n}:{m}")).view(rows, groups, m)
    assert (mask.sum(2) == n).all()
    inside = scores.view(rows, groups, m)
    least_kept = inside.masked_fill(~mask, torch.inf).amin(2)
    most_dropped = inside.masked_fill(mask, -torch.inf).amax(2)
    assert (least_kept >= most_dropped).all()


@settings(deadline=None)
@given(shapes, st.floats(0.0, 1.0))
def test_zeros_of_a_whole_tensor(shape: tuple[int, int, int], share: float) -> None:
    rows, columns, seed = shape
    scores = scores_of(rows, columns, seed, 3)
    count = int(share * rows * columns)
    mask = keep(scores, Zeros(count))
    assert int((~mask).sum()) == count
    assert sorted(scores[~mask].tolist()) == scores.flatten().sort().values[:count].tolist()


@settings(deadline=None, max_examples=40)
@given(st.lists(shapes, min_size=1, max_size=4), st.floats(0.01, 0.99), st.booleans())
def test_a_budget_drops_the_least_magnitudes_of_all(
    shapes: list[tuple[int, int, int]], share: float, ties: bool
) -> None:
    """Three passes, a tensor at a time, give the counts that sorting everything gives."""
    tensors = []
    for rows, columns, seed in shapes:
        generator = torch.Generator().manual_seed(seed)
        tensor = torch.randn(rows, columns, generator=generator)
        tensors.append(tensor.bfloat16().float() if ties else tensor)
    budget = Budget(share)
    found: list[Zeros | None] = []
    for _ in range(Budget.PASSES):
        found = [budget.add(tensor) for tensor in tensors]
        budget.turn()
    everything = torch.cat([tensor.abs().flatten() for tensor in tensors])
    total = int(share * everything.numel())
    counts = [zeros.count for zeros in found if zeros is not None]
    assert sum(counts) == total
    bound = everything.sort().values[max(total - 1, 0)] if total else -1.0
    for tensor, count in zip(tensors, counts, strict=True):
        assert int((tensor.abs() < bound).sum()) <= count <= int((tensor.abs() <= bound).sum())

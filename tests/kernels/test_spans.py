"""The search for scales in C finds what its header defines, and nothing for sizes that lie."""

import numpy as np
import pytest
import torch

from unicomp.kernels import cpu, spans

pytestmark = pytest.mark.skipif(not cpu.available(), reason=str(cpu.reason()))

SHARES = [1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
LANES = 16


def drawn(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=random) ** 3
    return weight, torch.rand(columns, generator=random) + 0.1


def summed(terms: np.ndarray) -> np.float32:
    """Sixteen lanes, each in turn, then one after the other."""
    padded = np.zeros(-(-len(terms) // LANES) * LANES, np.float32)
    padded[: len(terms)] = terms
    lanes = np.zeros(LANES, np.float32)
    for some in padded.reshape(-1, LANES):
        lanes += some
    total = np.float32(0)
    for lane in lanes:
        total += lane
    return total


def defined(
    weight: np.ndarray, cost: np.ndarray, symmetric: bool, low: int, high: int, polish: int
) -> tuple[np.float32, np.float32]:
    """One group, in float32, in the header's order."""
    least, most = np.minimum(weight.min(), np.float32(0)), np.maximum(weight.max(), np.float32(0))
    if symmetric:
        most = np.maximum(most, -least)
        least = -most
    span = (most - least) / np.float32(high - low)
    span = span if span > 0 else np.float32(1)
    best, scale, zero = np.float32(-1), span, np.float32(0)

    def fit(tried: np.float32, offset: np.float32) -> tuple[np.float32, np.float32]:
        code = weight * (np.float32(1) / tried)
        code = np.rint(np.clip(code, np.float32(low) - offset, np.float32(high) - offset))
        along = summed(code * (weight * cost))
        with np.errstate(invalid="ignore"):
            fitted = along / summed(code * code * cost)
        return along * fitted, fitted

    for share in map(np.float32, SHARES):
        tried = span * share
        offset = np.float32(0)
        if not symmetric:
            offset = np.rint(np.clip(np.float32(low) - least * share / tried, low, high))
        gain, fitted = fit(tried, offset)
        if gain > best and fitted > 0:
            best, scale, zero = gain, fitted, offset
    for _ in range(polish):
        gain, fitted = fit(scale, zero)
        if gain > best and fitted > 0:
            best, scale = gain, fitted
    return scale, zero


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    [(1, 1, 1), (9, 40, 16), (3, 100, 32), (20, 128, 128), (5, 77, 77)],
)
@pytest.mark.parametrize(("low", "high"), [(-2, 1), (-8, 7), (-128, 127)])
def test_bits_are_those_of_the_definition(
    rows: int, columns: int, group: int, symmetric: bool, low: int, high: int
) -> None:
    weight, cost = drawn(rows, columns)
    if columns > 64:
        weight[0, :group] = 0
    found, offsets = spans.search(
        weight, cost, SHARES, group=group, symmetric=symmetric, low=low, high=high, polish=2
    )
    assert (offsets is None) == symmetric
    missed = 0
    for row in range(rows):
        for index, at in enumerate(range(0, columns, group)):
            part = weight[row, at : at + group].numpy()
            price = cost[at : at + group].numpy()
            scale, zero = defined(part, price, symmetric, low, high, 2)
            assert found[row, index] == scale
            assert offsets is None or offsets[row, index] == zero
            missed += (
                found[row, index] != defined(part, price[::-1] ** 4, symmetric, low, high, 2)[0]
            )
    assert missed or columns == 1  # another cost would show


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, cost = drawn(101, 300)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(cpu, "_threads", threads)
        found.append(
            spans.search(weight, cost, SHARES, group=64, symmetric=True, low=-8, high=7, polish=1)[
                0
            ]
        )
    assert torch.equal(*found)


def test_sizes_that_lie_are_refused() -> None:
    weight, cost = drawn(4, 8)
    for given, price, shares in [
        (weight, cost[:7], SHARES),
        (weight, cost, SHARES[:7]),
        (weight.double(), cost, SHARES),
    ]:
        with pytest.raises(ValueError, match="`cost`"):
            spans.search(given, price, shares, group=4, symmetric=True, low=-8, high=7, polish=1)

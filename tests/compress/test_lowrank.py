"""The randomized decomposition beside the exact one."""

import pytest
import torch
from torch import Tensor

from unicomp.compress.lowrank import leading, spectrum


def matrix(kind: str, rows: int, columns: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    noise = torch.randn(rows, columns, generator=draw)
    if kind == "noise":
        return noise
    left, right = (torch.randn(size, 40, generator=draw) for size in (rows, columns))
    return left * 0.8 ** torch.arange(40) @ right.T + 0.05 * noise


def missed(whole: Tensor, parts: tuple[Tensor, Tensor, Tensor]) -> float:
    u, values, v = parts
    return float((whole - u * values @ v).square().sum())


@pytest.mark.parametrize("kind", ["noise", "decaying"])
@pytest.mark.parametrize(("rows", "columns", "rank"), [(700, 900, 32), (900, 700, 64)])
def test_error_is_within_one_percent_of_the_least(
    kind: str, rows: int, columns: int, rank: int
) -> None:
    whole = matrix(kind, rows, columns)
    u, values, v = leading(whole, rank, seed=0)
    least = float(torch.linalg.svdvals(whole)[rank:].square().sum())
    assert least * 0.9999 <= missed(whole, (u, values, v)) <= least * 1.01
    torch.testing.assert_close(u.T @ u, torch.eye(rank), atol=1e-4, rtol=0)
    torch.testing.assert_close(v @ v.T, torch.eye(rank), atol=1e-4, rtol=0)
    assert values.tolist() == sorted(values.tolist(), reverse=True)


def test_a_single_pass_of_a_random_block_would_be_seen() -> None:
    whole = matrix("noise", 700, 900)
    least = float(torch.linalg.svdvals(whole)[32:].square().sum())
    assert missed(whole, leading(whole, 32, seed=0, passes=0)) > least * 1.01


def test_a_seed_gives_the_same_bits_and_a_start_is_as_good() -> None:
    whole = matrix("noise", 600, 700)
    one, other = leading(whole, 20, seed=1), leading(whole, 20, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    warm = leading(whole, 20, seed=1, start=one[2].T, passes=1)
    assert missed(whole, warm) <= missed(whole, one)
    assert missed(whole, leading(whole, 20, seed=2)) == pytest.approx(missed(whole, one), rel=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(5, 900), (900, 5), (1, 1), (300, 301)])
def test_small_ones_are_exact_and_the_rank_is_bounded(rows: int, columns: int) -> None:
    whole = matrix("noise", rows, columns)
    rank = min(rows, columns)
    u, values, v = leading(whole, 1000, seed=0)
    assert (u.shape, values.shape, v.shape) == ((rows, rank), (rank,), (rank, columns))
    torch.testing.assert_close(u * values @ v, whole, atol=1e-3, rtol=1e-4)
    assert leading(whole, 0, seed=0)[1].numel() == 0


def test_less_than_the_rank_asked_for_is_no_trouble() -> None:
    left = torch.randn(600, 3, generator=torch.Generator().manual_seed(0))
    whole = left @ left.T
    u, values, v = leading(whole, 50, seed=0)
    assert torch.isfinite(u).all()
    assert torch.isfinite(v).all()
    torch.testing.assert_close(u * values @ v, whole, atol=2e-3, rtol=1e-3)
    assert not leading(torch.zeros(600, 600), 50, seed=0)[1].any()


@pytest.mark.parametrize("kind", ["noise", "decaying"])
@pytest.mark.parametrize("rank", [1, 16, 64, 300, 700])
def test_a_spectrum_is_near_the_exact_one(kind: str, rank: int) -> None:
    whole = matrix(kind, 700, 900)
    exact = torch.linalg.svdvals(whole.double())[:rank].square()
    found = spectrum(whole, rank, seed=0)
    assert found.shape == (rank,)
    assert float(found.sum()) == pytest.approx(float(exact.sum()), rel=0.05)
    if rank > 700 / 8:
        torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5 * float(exact[0]))

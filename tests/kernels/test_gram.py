"""Products summed over tokens equal float64's for any shape; sizes that lie are refused."""

import pytest
import torch

from unicomp.kernels import cpu, gram

BOUND = 1024 * 2.0**-24  # of as many sums in float32, those of one block of tokens
SOME = torch.zeros(1, 1, dtype=torch.bfloat16)
needed = pytest.mark.skipif(not gram.usable(SOME), reason="no bfloat16 instructions, or no kernels")


def drawn(tokens: int, columns: int, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=random).bfloat16()


def error(
    total: torch.Tensor, wanted: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> float:
    """The largest error, in units of what the sizes of the summed products allow."""
    size = left.double().abs().T @ right.double().abs() + 1
    return float(((total.double() - wanted).abs() / size).max())


@needed
@pytest.mark.parametrize("tokens", [1, 2, 63, 1024, 2051])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 70), (64, 64), (129, 48), (300, 200)])
def test_products_are_float64s(tokens: int, rows: int, columns: int) -> None:
    left, right = drawn(tokens, rows, 0), drawn(tokens, columns, 1)
    start = drawn(rows, columns, 2).float()
    total = start.clone()
    gram.add(total, left, right)
    wanted = start.double() + left.double().T @ right.double()
    assert error(total, wanted, left, right) < BOUND
    moved = start.double() + left.roll(1, 0).double().T @ right.double()
    if tokens > 2 and rows > 1:
        assert error(total, moved, left, right) > 10 * BOUND


@needed
@pytest.mark.parametrize("columns", [1, 6, 63, 64, 65, 200, 333])
def test_of_one_input_the_upper_triangle_is_right(columns: int) -> None:
    some = drawn(1500, columns, 3)
    total = torch.zeros(columns, columns)
    gram.add(total, some, some)
    gram.add(total, some, some)
    wanted = 2 * some.double().T @ some.double()
    assert error(total.triu(), wanted.triu(), some, some) < BOUND


@needed
def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    some, found = drawn(1100, 700, 4), []
    for threads in (1, 3):
        monkeypatch.setattr(cpu, "_threads", threads)
        total = torch.zeros(700, 700)
        gram.add(total, some, some)
        found.append(total.triu())
    assert torch.equal(*found)


@needed
def test_a_part_of_a_wider_input_is_taken() -> None:
    wide = drawn(40, 100, 5)
    total, whole = torch.zeros(30, 30), torch.zeros(30, 30)
    some = wide[:, 10:40]
    gram.add(total, some, some)
    copy = some.contiguous()
    gram.add(whole, copy, copy)
    assert torch.equal(total, whole)


@needed
@pytest.mark.parametrize(
    ("total", "left", "right", "named"),
    [
        (torch.zeros(3, 4), drawn(5, 4, 0), drawn(5, 4, 0), "total"),
        (torch.zeros(4, 3).T, drawn(5, 3, 0), drawn(5, 4, 0), "total"),
        (torch.zeros(3, 4).double(), drawn(5, 3, 0), drawn(5, 4, 0), "total"),
        (torch.zeros(3, 4), drawn(5, 3, 0), drawn(6, 4, 0), "right"),
        (torch.zeros(3, 4), drawn(5, 3, 0).float(), drawn(5, 4, 0), "left"),
    ],
)
def test_sizes_that_lie_are_refused(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        gram.add(total, left, right)


def test_other_dtypes_are_not_its_business() -> None:
    assert not gram.usable(torch.zeros(1))

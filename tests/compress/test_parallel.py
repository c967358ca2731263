"""Pieces of work side by side."""

import threading
from collections.abc import Iterator

import pytest
import torch

from unicomp.compress.parallel import side_by_side


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_that_have_one_of_torchs() -> None:
    torch.set_num_threads(3)
    meet = threading.Barrier(3, timeout=30)  # broken unless three are under way at once

    def work(piece: int) -> tuple[int, int]:
        meet.wait()
        return piece, torch.get_num_threads()

    assert side_by_side(work, range(6)) == [(piece, 1) for piece in range(6)]
    assert torch.get_num_threads() == 3
    found: list[int] = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [3]  # what threads to come start with is as it was too


@pytest.mark.parametrize(("count", "pieces"), [(1, [1, 2]), (2, [1])])
def test_no_thread_where_there_is_nothing_to_share(count: int, pieces: list[int]) -> None:
    torch.set_num_threads(count)
    here = threading.get_ident()
    assert side_by_side(lambda _: threading.get_ident(), pieces) == [here] * len(pieces)


def test_the_first_exception_ends_it_and_threads_are_given_back() -> None:
    torch.set_num_threads(2)

    def work(piece: int) -> int:
        raise ValueError(f"piece {piece}")

    with pytest.raises(ValueError, match="piece 0"):
        side_by_side(work, range(4))
    assert torch.get_num_threads() == 2

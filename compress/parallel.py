"""Pieces of work side by side, a thread each.

Many operations on matrices of a few million numbers keep two cores less busy than two threads that
each go through all of them with a part: most are too short to be worth sharing out.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def side_by_side(work: Callable[[Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
    """Return what comes of each piece, in their order; the first exception ends it.

    work  is called in other threads, where torch computes with one thread, unless there is but one
          piece or torch has but one thread here; the bits may depend on which of the two it is
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(pieces) == 1:
        return [work(piece) for piece in pieces]
    try:
        with ThreadPoolExecutor(
            min(threads, len(pieces)), "pieces", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(work, pieces))
    finally:
        torch.set_num_threads(threads)  # what threads to come start with is one number for all

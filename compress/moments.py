"""Second moments of activations, summed over batches: what the second-order methods start from."""

from typing import cast

import torch
from torch import Tensor

from unicomp.compress.method import Stats


class Moments:
    """Running sums of one input's second moments, upper triangle only."""

    STRIP = 256  # columns a product; the strips below the diagonal are skipped
    TOKENS = 2048  # tokens a product in bfloat16, and of the first, in float32
    FIRST = 256

    def __init__(self, columns: int, dtype: torch.dtype, cross: bool) -> None:
        self.tokens = 0
        self.dtype = dtype
        self.second = torch.zeros(columns, columns)
        self.cross = torch.zeros(columns, columns) if cross else None

    def add(self, inputs: Tensor, original: Tensor | None) -> None:
        """Take up some tokens: `inputs` [tokens, columns] in `dtype`, `original` in float32."""
        drift = None
        if self.cross is not None and original is not None:
            drift = (original.reshape(inputs.shape) - inputs).to(self.dtype)
        at = 0
        while at < len(inputs):
            some = inputs[at : at + (self.TOKENS if self.tokens else self.FIRST)]
            for start in range(0, inputs.shape[1], self.STRIP):
                stop = start + self.STRIP
                total = self.second[start:stop, start:]
                _add_product(total, some[:, start:stop].T, some[:, start:], self.tokens)
            if drift is not None:
                moved = drift[at : at + len(some)]
                _add_product(cast(Tensor, self.cross), moved.T, some, self.tokens)
            self.tokens += len(some)
            at += len(some)

    def stats(self) -> Stats:
        """Return the means."""
        tokens = max(self.tokens, 1)
        for start in range(0, len(self.second), self.STRIP):
            stop = start + self.STRIP
            block = self.second[start:stop, start:stop]
            block.copy_(torch.triu(block) + torch.triu(block, 1).T)
            self.second[stop:, start:stop] = self.second[start:stop, stop:].T
        self.second /= tokens
        if self.cross is not None:
            self.cross /= tokens
        return Stats(self.tokens, self.second, self.cross)


class Norms:
    """Running sums of one input's squares."""

    def __init__(self, columns: int) -> None:
        self.tokens = 0
        self.squares = torch.zeros(columns, dtype=torch.float64)

    def add(self, inputs: Tensor, original: Tensor | None) -> None:
        """Take up some tokens: `inputs` [tokens, columns]; `original` is of no interest."""
        self.squares += inputs.float().square().sum(0).double()
        self.tokens += len(inputs)

    def stats(self) -> Stats:
        """Return the means' roots."""
        return Stats(self.tokens, norm=(self.squares / max(self.tokens, 1)).sqrt().float())


def _add_product(total: Tensor, left: Tensor, right: Tensor, before: int) -> None:
    """Add the product of some tokens to a float32 total of `before` tokens, in place.

    Products of bfloat16 come out rounded to bfloat16, too coarse for a Hessian. So what is computed
    is the difference from what as many tokens gave on average before, which is small, and so is its
    rounding. The first tokens, few, are multiplied in float32.
    """
    if left.dtype == total.dtype or not before:
        total.addmm_(left.float(), right.float())
        return
    usual = torch.empty_like(total, dtype=left.dtype)
    torch.mul(total, len(right) / before, out=usual)
    total += usual
    total += torch.addmm(usual, left, right, beta=-1)

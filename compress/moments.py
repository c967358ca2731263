"""Second moments of activations, summed over batches: what the second-order methods start from."""

from typing import cast

import torch
from torch import Tensor

from unicomp.compress.method import Stats


class Moments:
    """Running sums of one input's second moments, upper triangle only."""

    STRIP = 256  # columns a product; the strips below the diagonal are skipped
    TOKENS = 2048  # tokens a product in bfloat16

    def __init__(self, columns: int, dtype: torch.dtype, cross: bool) -> None:
        self.tokens = 0
        self.products = 0
        self.dtype = dtype
        self.second = torch.zeros(columns, columns)
        self.cross = torch.zeros(columns, columns) if cross else None

    def add(self, inputs: Tensor, original: Tensor | None) -> None:
        """Take up some tokens: `inputs` [tokens, columns] in `dtype`, `original` in float32."""
        self.tokens += len(inputs)
        drift = None
        if self.cross is not None and original is not None:
            drift = (original.reshape(inputs.shape) - inputs).to(self.dtype)
        for at in range(0, len(inputs), self.TOKENS):
            some = inputs[at : at + self.TOKENS]
            for start in range(0, inputs.shape[1], self.STRIP):
                stop = start + self.STRIP
                total = self.second[start:stop, start:]
                _add_product(total, some[:, start:stop].T, some[:, start:], self.products)
            if drift is not None:
                _add_product(
                    cast(Tensor, self.cross), drift[at : at + self.TOKENS].T, some, self.products
                )
            self.products += 1

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


def _add_product(total: Tensor, left: Tensor, right: Tensor, before: int) -> None:
    """Add a product to a float32 total in place.

    Products of bfloat16 come out rounded to bfloat16, too coarse for a Hessian. So what is computed
    is the difference from the mean of the products before (`before` many; of the first, from
    itself), which is small, and so is its rounding.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    usual = (total / before).to(left.dtype) if before else left @ right
    total += usual
    total += torch.addmm(usual, left, right, beta=-1)

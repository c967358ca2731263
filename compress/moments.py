"""Second moments of activations, summed over batches: what the second-order methods start from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicomp.compress.method import Stats
from unicomp.kernels import gram
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


class Moments:
    """Running sums of one input's second moments, upper triangle only."""

    STRIP = 256  # columns a product; the strips below the diagonal are skipped

    def __init__(self, columns: int, cross: bool) -> None:
        self.tokens = 0
        self.second = torch.zeros(columns, columns)
        self.cross = torch.zeros(columns, columns) if cross else None

    def add(self, inputs: Tensor, original: Tensor | None) -> None:
        """Take up some tokens: `inputs` [tokens, columns] in the dtype that products are made in.

        original  float32, as many numbers: what `inputs` would be in the uncompressed model
        """
        self.tokens += len(inputs)
        drift = None
        if self.cross is not None and original is not None:
            drift = (original.reshape(inputs.shape) - inputs).to(inputs.dtype)
        if gram.usable(inputs):
            gram.add(self.second, inputs, inputs)
            if self.cross is not None and drift is not None:
                gram.add(self.cross, drift, inputs)
            return
        inputs = inputs.float()
        for start in range(0, inputs.shape[1], self.STRIP):
            stop = start + self.STRIP
            self.second[start:stop, start:].addmm_(inputs[:, start:stop].T, inputs[:, start:])
        if self.cross is not None and drift is not None:
            self.cross.addmm_(drift.float().T, inputs)

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

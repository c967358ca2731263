"""Where a model departs from its baseline: at which layer, and at which position of a window.

Both are gathered as batches pass: a few sums a window, never the states or logits themselves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unicomp.metrics import CHUNK, kl, log_probabilities

PARTS = 32  # of a window, at most


class Positions:
    """Sums KL(base || model) at each position of the windows."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.windows = 0

    def add(self, logits: Tensor, base: Tensor) -> None:
        """Take a batch in; both floating [windows, tokens, vocab]."""
        count, tokens, vocab = logits.shape
        if self.sums is None:
            self.sums = torch.zeros(tokens, dtype=torch.float64)
        step = max(1, CHUNK // vocab)
        for window in range(count):
            for start in range(0, tokens, step):
                part = slice(start, start + step)
                log_p = log_probabilities(base[window, part])
                self.sums[part] += kl(log_p, log_probabilities(logits[window, part])).cpu()
        self.windows += count

    def parts(self) -> tuple[list[float], int]:
        """Return the mean KL of each part of a window, nats, and how many tokens a part has."""
        if self.sums is None:
            raise ValueError("no batch was taken in")
        step = -(-self.sums.numel() // PARTS)
        means = [float(part.mean()) / self.windows for part in self.sums.split(step)]
        return means, step


class Layers:
    """Keeps, per window and layer, how far hidden states are from the base's.

    reason  why nothing could be kept, or None
    """

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self.reason: str | None = None

    def add(self, states: Sequence[Tensor], base: Sequence[Tensor]) -> None:
        """Take a batch in.

        states, base  what enters the first layer, then what leaves each layer: floating
                      [windows, n, width]; the last mostly after the final norm
        """
        if [own.shape for own in states] != [own.shape for own in base]:
            self.reason = (
                f"the model has {len(states) - 1} layers of {states[-1].shape[-1]}, the baseline "
                f"{len(base) - 1} of {base[-1].shape[-1]}"
            )
            return
        rows = []
        for own, other in zip(states[1:], base[1:], strict=True):
            theirs = other.double().to(own.device)
            apart = (own.double() - theirs).flatten(1).norm(dim=1)
            rows.append((apart / theirs.flatten(1).norm(dim=1)).cpu())
        self.found.append(torch.stack(rows, 1))

    def errors(self) -> Tensor:
        """Return ||states - base|| / ||base|| of each window and layer, [windows, layers]."""
        return torch.cat(self.found)

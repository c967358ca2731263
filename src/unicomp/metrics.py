"""The pure definitions: what a model's next-token distribution is worth, and how far from another.

Every function takes log-probabilities, natural logarithm, in float64, and returns one value per
position; nothing here knows a model, a file or an average's uncertainty. `window_sums` goes
from logits to sums per window, a bounded number of positions at a time.

Paper: EAR (expected acceptance) from SLQ, arXiv:2605.02404; one minus the total variation distance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


CHUNK = 1 << 22  # elements of one float64 tensor of window_sums: 32 MiB


def log_probabilities(logits: Tensor) -> Tensor:
    """Return log softmax over the last dimension, float64; logits of any floating dtype."""
    return torch.log_softmax(logits.double(), dim=-1)


def nll(log_q: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target, nats.

    log_q    [..., vocab]
    targets  int64 [...]
    """
    return -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) per position, nats; p is the base, q the model; [..., vocab] -> [...].

    A token that p excludes adds nothing; one that only q excludes makes it infinite.
    """
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1)


def ear(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum over tokens of min(p, q) per position; [..., vocab] -> [...].

    It is the probability that the best coupling of the two draws the same token, from 0 to 1, and
    so the expected acceptance of one as draft of the other.
    """
    return torch.minimum(log_p, log_q).exp().sum(-1)


def top1_agreement(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return per position 1 where q's first choice is a first choice of p, else 0; float64.

    Where p has several equal first choices, each of them will do. NaN where p or q is no
    distribution.
    """
    choice = log_q.argmax(-1, keepdim=True)
    same = log_p.gather(-1, choice).squeeze(-1) == log_p.amax(-1)
    broken = log_p.amax(-1).isnan() | log_q.amax(-1).isnan()
    return torch.where(broken, math.nan, same.double())


def perplexity(nll_sum: float, tokens: int) -> float:
    """Return exp of the mean negative log-likelihood (nats) of `tokens` predictions."""
    try:
        return math.exp(nll_sum / tokens)
    except OverflowError:
        return math.inf


def bits_per_byte(nll_sum: float, utf8_bytes: int) -> float:
    """Return the negative log-likelihood (nats) of a text in bits over its UTF-8 bytes.

    It does not depend on how a tokenizer cuts the text, as perplexity does.
    """
    return nll_sum / math.log(2) / utf8_bytes


@dataclass(frozen=True, slots=True)
class WindowSums:
    """Sums over the predicted positions of each window, float64 [windows].

    tokens    predicted positions in a window, the same in all
    nll       of the model, nats
    base_nll  of the base, nats; this and the rest are None where there is no base
    kl        KL(base || model), nats
    ear       sum of min(p, q)
    top1      positions where the first choices agree
    """

    tokens: int
    nll: Tensor
    base_nll: Tensor | None = None
    kl: Tensor | None = None
    ear: Tensor | None = None
    top1: Tensor | None = None


def window_sums(
    logits: Tensor, targets: Tensor, base: Tensor | None = None, *, chunk: int = CHUNK
) -> WindowSums:
    """Sum every metric over each window's positions.

    logits   floating [windows, tokens, vocab]
    targets  int64 [windows, tokens]
    base     as logits, of the base
    chunk    most elements of one float64 temporary, or one position's; there are at most six
    """
    windows, tokens, vocab = logits.shape
    step = max(1, chunk // vocab)
    names = ["nll"] if base is None else ["nll", "base_nll", "kl", "ear", "top1"]
    sums = {name: torch.zeros(windows, dtype=torch.float64) for name in names}
    for window in range(windows):
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            log_q = log_probabilities(logits[window, part])
            goal = targets[window, part]
            sums["nll"][window] += nll(log_q, goal).sum().item()
            if base is None:
                continue
            log_p = log_probabilities(base[window, part])
            sums["base_nll"][window] += nll(log_p, goal).sum().item()
            sums["kl"][window] += kl(log_p, log_q).sum().item()
            sums["ear"][window] += ear(log_p, log_q).sum().item()
            sums["top1"][window] += top1_agreement(log_p, log_q).sum().item()
    return WindowSums(tokens=tokens, **sums)


def join(parts: Sequence[WindowSums]) -> WindowSums:
    """Put the windows of several sums one after another; all predict as many positions."""
    first = parts[0]
    if any(part.tokens != first.tokens for part in parts):
        raise ValueError("windows of different lengths")

    def all_of(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return WindowSums(
        tokens=first.tokens,
        nll=torch.cat([part.nll for part in parts]),
        base_nll=all_of("base_nll"),
        kl=all_of("kl"),
        ear=all_of("ear"),
        top1=all_of("top1"),
    )

"""How fast a training learns at each of its steps, and what of it decays.

The rate rises in a line and falls along a cosine; matrices decay, norms, biases and scales do not.

Papers: AdamW, arXiv:1711.05101; the cosine, SGDR, arXiv:1608.03983, equation 5, without restarts.
"""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from unicomp.compress.distill_method import DistillMethod

BETAS = (0.9, 0.95)


def groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Return what an optimizer is made of: matrices, which decay, and the rest."""
    matrices = [own for own in parameters if own.dim() > 1]
    rest = [own for own in parameters if own.dim() <= 1]
    found: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    return [group for group in found if group["params"]]


def rate_at(method: DistillMethod, share: float, steps: int) -> float:
    """Return the learning rate of a step.

    share  of the training that is over before it, 0 to 1
    steps  that the training has
    """
    warm, last = method.warmup, method.final_rate
    # The first step of a warm-up has a rate too.
    if share < warm:
        return method.highest_rate * (share + 1 / steps) / (warm + 1 / steps)
    way = (share - warm) / max(1 - warm, 1e-9)
    return method.highest_rate * (last + (1 - last) * 0.5 * (1 + math.cos(math.pi * way)))

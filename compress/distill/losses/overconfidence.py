"""The calibration term: in each window, how far mean confidence is from the share of right guesses.

Confidence is the probability of the likeliest token. Whether it is right has no gradient, so the
term only makes a student surer or less sure, and never moves its first choice directly.

Paper: the difference between confidence and accuracy as a term of the loss, arXiv:2009.04057,
equation 3.
Differs: in each window instead of each batch, so that the term does not depend on how a batch is
shared out over processes or steps of accumulation.
"""

import torch
from torch import Tensor


def confidence_gap(student: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Return |mean confidence - accuracy| of each window, float [windows].

    student  logits, floating [windows, tokens, vocab]
    targets  int64 [windows, tokens]
    counted  bool [windows, tokens], which positions count; a window without any gives 0
    """
    confidence, guess = torch.softmax(student.float(), dim=-1).max(-1)
    right = (guess == targets).float()
    gap = torch.where(counted, confidence - right, 0.0).sum(-1)
    return gap.abs() / counted.sum(-1).clamp_min(1)

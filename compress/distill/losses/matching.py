"""How far a student's inner states are from its teacher's: the residual stream, or attention.

What is compared is the hidden state after each layer, or what each attention block adds to it; so
any number of heads will do. Where the widths differ a linear map, trained along and thrown away,
brings the student's states to the teacher's width. The error is relative to the mean square of the
teacher's states in the layer and window, so that no layer drowns the others, and a batch may be
shared out in any way.

Papers: hints through a map, FitNets, arXiv:1412.6550, section 2.1; layer by layer in transformers,
TinyBERT, arXiv:1909.10351, equations 7 and 8.
Differs: attention is matched by what comes out, not by its scores, which fused kernels never form.
"""

import torch
from torch import Tensor, nn


def matching(student: Tensor, teacher: Tensor, to_teacher: nn.Linear | None) -> Tensor:
    """Return the mean squared difference of states per position, as a share of the teacher's.

    student     floating [windows, tokens, student's width]
    teacher     floating [windows, tokens, teacher's width]
    to_teacher  where the widths differ
    returns     float [windows, tokens]; its mean is 1 for a student whose states are all zero
    """
    found = student.float() if to_teacher is None else to_teacher(student.float())
    wanted = teacher.detach().float()
    size = wanted.square().mean((-2, -1))[:, None].clamp_min(torch.finfo(torch.float32).tiny)
    return (found - wanted).square().mean(-1) / size


def pairs(student: int, teacher: int) -> list[tuple[int, int]]:
    """Return (student's layer, teacher's layer) to compare: the last with the last, spread evenly.

    A student with fewer layers is compared with the teacher's at equal depth.
    """
    return [(i, (i + 1) * teacher // student - 1) for i in range(student)]

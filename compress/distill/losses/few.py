"""A teacher of whom only the k most likely tokens are known, and what all the others have together.

The teacher's k log-probabilities are stored, and that of the tail: all its other tokens together.
The student is compared on k + 1 classes. So it is never taught that the tail is empty, as it is
where the k are scaled up to one. On k + 1 classes no divergence is greater than on the whole
vocabulary, and with k = vocab it is the same.

Paper: why scaled-up heads make over-confident students, sparse logit sampling, arXiv:2503.16870,
section 3.
Differs: the tail is one class of its own, not sampled.
"""

import torch
from torch import Tensor

from unicomp.compress.distill.losses.divergence import between


def keep_few(teacher: Tensor, k: int, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Return what is stored of a teacher: log-probabilities of k tokens and the tail, and ids.

    teacher  logits, floating [..., vocab]
    returns  float32 [..., k + 1], the tail last, or [..., vocab] where k takes all; int64 [..., k]
    """
    log_p = torch.log_softmax(teacher.float() / temperature, dim=-1)
    values, ids = log_p.topk(min(k, log_p.shape[-1]), dim=-1)
    return _with_tail(log_p, values, ids), ids


def divergence_few(
    student: Tensor, log_p: Tensor, ids: Tensor, *, beta: float, temperature: float
) -> Tensor:
    """Return the generalized JSD on k + 1 classes, times the temperature squared, float [...].

    student     logits, floating [..., vocab]
    log_p, ids  of the teacher at this temperature, as `keep_few` gives them
    """
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    own = _with_tail(log_q, log_q.gather(-1, ids), ids)
    return between(log_p.float(), own, beta=beta) * temperature**2


def _with_tail(whole: Tensor, values: Tensor, ids: Tensor) -> Tensor:
    """Put the log of what all other tokens have together behind the values of some."""
    if ids.shape[-1] == whole.shape[-1]:
        return values
    tail = whole.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([values, tail], dim=-1)

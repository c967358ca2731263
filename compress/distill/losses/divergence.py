"""How far a student's next-token distribution is from its teacher's, position by position.

Forward KL weighs what the teacher finds likely, and spreads a weak student over it; reverse KL
weighs what the student finds likely, and lets it drop the rest. The generalized Jensen-Shannon
divergence lies between. With a temperature both distributions are softened first; the factor T
squared keeps the size of the gradient, which otherwise falls with it.

Papers: temperature and its square, arXiv:1503.02531, section 2; the divergence with `beta`, GKD,
arXiv:2306.13649, section 2 and equation 1, where `beta` 0 and 1 stand for the two KL.
Differs: nothing; note that the divergence itself goes to zero as `beta` does, so 0.01 weighs far
less beside other terms than 0.
"""

import math

import torch
from torch import Tensor


def divergence(student: Tensor, teacher: Tensor, *, beta: float, temperature: float) -> Tensor:
    """Return the generalized JSD per position, times the temperature squared, nats.

    student, teacher  logits, floating [..., vocab]; gradients flow to the student's only
    beta              0: KL(teacher || student); 1: KL(student || teacher); between: the mean of
                      both to the mixture of `beta` teacher and `1 - beta` student, weighted alike
    temperature       above 0
    returns           float [...]
    """
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher.detach().float() / temperature, dim=-1)
    return between(log_p, log_q, beta=beta) * temperature**2


def between(log_p: Tensor, log_q: Tensor, *, beta: float) -> Tensor:
    """Return the generalized JSD of two distributions, given as log-probabilities.

    log_p, log_q  of the teacher and the student, floating [..., classes]; -inf where a class is
                  excluded, which a student of finite logits never does
    """
    if beta == 0:
        return _kl(log_p, log_q)
    if beta == 1:
        return _kl(log_q, log_p)
    mixed = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    return beta * _kl(log_p, mixed) + (1 - beta) * _kl(log_q, mixed)


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of each target at temperature 1, nats.

    student  logits, floating [..., vocab]
    targets  int64 [...]
    """
    log_q = torch.log_softmax(student.float(), dim=-1)
    return -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q); a class without mass in p adds nothing, to the gradient neither."""
    empty = log_p == -torch.inf
    gap = torch.where(empty, 0.0, log_p - log_q)
    return (log_p.exp() * gap).sum(-1)

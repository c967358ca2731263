"""Windows whose gradient is far longer than the others': the few that would move a model most.

Before training each window's loss is differentiated once, alone; those whose gradient is longer
than the median by more than a few times the usual distance from it are left out.

Paper: arXiv:2604.17215: samples of high gradient norm cause most damage to what a model keeps.
Differs: only what lies above the median goes, and the spread decides how much, not a share.
"""

import torch
from torch import Tensor

from unicomp.compress.distill.training.objective import Trainee, objective
from unicomp.compress.distill.training.trainer import Job

FAR = 3.0  # times 1.4826 times the median distance from the median: three sigma of a normal
SIGMA = 1.4826


def gradient_norms(job: Job) -> Tensor:
    """Return the length of each training window's gradient, float64 [windows]."""
    trainee = Trainee(job.student.model, job.method, job.width)
    parameters = [own for own in trainee.parameters() if own.requires_grad]
    found = []
    for row in range(len(job.training)):
        rows = torch.tensor([row])
        some = job.training.part(rows)
        loss = objective(
            job.method,
            trainee,
            job.teacher.training(rows, some.ids, states=trainee.wanted),
            some.ids,
            some.counted,
            positions=max(1, int(some.counted.sum())),
            windows=1,
            maps=trainee.maps,
            tokens=job.tokens,
        )
        slopes = torch.autograd.grad(loss.total, parameters)
        found.append(torch.stack([own.double().square().sum() for own in slopes]).sum().sqrt())
    return torch.stack(found)


def usual(norms: Tensor) -> Tensor:
    """Return which windows stay, int64, in order; norms float64 [windows]."""
    middle = norms.median()
    spread = (norms - middle).abs().median() * SIGMA
    return (norms <= middle + FAR * spread).nonzero()[:, 0]

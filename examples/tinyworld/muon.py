"""Muon: momentum orthogonalised by Newton-Schulz, with the step size of AdamW.

Five steps of an odd quintic bring every singular value of the momentum near 1. All matrices of a
shape go through it in one batch, every expert by itself.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), for the
iteration and its coefficients; Moonlight, arXiv:2502.16982, section 2.2, for the factor
0.2 * sqrt(longest side) and the weight decay.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@contextmanager
def _one_thread() -> Iterator[None]:
    # matrices this small lose more to the start of a second thread than they gain
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonalise(momentum: Tensor) -> Tensor:
    """Return matrices [n, rows, columns], rows <= columns, with singular values near 1."""
    a, b, c = COEFFICIENTS
    x = momentum.bfloat16()
    x = x / (x.float().flatten(1).norm(dim=1)[:, None, None] + 1e-7).bfloat16()
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


class Muon:
    """The optimizer, for matrices and for stacks of matrices.

    lr  the learning rate; the caller may change it between steps
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
    ) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        self.momentum = momentum
        self._places: dict[tuple[int, ...], list[tuple[Tensor, int | None]]] = {}
        for parameter in parameters:
            shape = tuple(sorted(parameter.shape[-2:]))
            parts = range(parameter.shape[0]) if parameter.dim() == 3 else [None]
            for part in parts:
                self._places.setdefault(shape, []).append((parameter, part))
        self._buffers = {
            shape: torch.zeros(len(places), *shape) for shape, places in self._places.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        """Change every parameter by its gradient, in place."""
        with _one_thread():
            for shape, places in self._places.items():
                gradient = torch.stack([_wide(_part(p.grad, part)) for p, part in places])
                buffer = self._buffers[shape]
                buffer.lerp_(gradient, 1 - self.momentum)
                update = orthogonalise(gradient.lerp(buffer, self.momentum))
                update *= 0.2 * math.sqrt(max(shape))
                for (parameter, part), change in zip(places, update, strict=True):
                    matrix = _wide(_part(parameter.data, part))
                    matrix.mul_(1 - self.lr * self.weight_decay).add_(change, alpha=-self.lr)


def _part(tensor: Tensor | None, part: int | None) -> Tensor:
    if tensor is None:
        raise ValueError("a parameter of Muon has no gradient")
    return tensor if part is None else tensor[part]

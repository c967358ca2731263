"""The leading singular triplets of a large matrix, by random projection.

A random block is multiplied by the matrix and its transpose in turn. All the blocks on the way
together span a space that holds nearly what the leading singular vectors do, also where singular
values fall slowly, as those of weights do; a small eigenproblem in that space then gives them. The
work is a few products with some hundred columns, where the full decomposition is dozens of passes
over the whole.

Papers: Halko, Martinsson, Tropp, arXiv:0909.4061; keeping every block, Musco and Musco,
arXiv:1504.05477, algorithm 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor


OVERSAMPLE = 10  # columns beyond the rank
PASSES = 3  # times that the block goes through the matrix and back
EXACT = 3  # a matrix whose shorter side is not so many blocks long is decomposed whole
SHORT = 256  # nor is one with a shorter side than this
MANY = 8  # ranks of an eighth of all and more: their squares come from the Gram matrix


def leading(
    matrix: Tensor,
    rank: int,
    *,
    seed: int,
    start: Tensor | None = None,
    passes: int = PASSES,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets, largest first.

    matrix   float32 [out, in], finite; not modified
    rank     how many are wanted; at most min(out, in) are returned
    seed     of the random block; the same seed gives the same bits
    start    [in, any], columns near the right singular vectors, in place of as many random ones
    passes   through the matrix and back; more are nearer to exact
    returns  u [out, rank], values [rank], v [rank, in]; u and v have orthonormal columns and rows

    Three passes leave the error of an approximation of that rank within 1% of the least there is,
    also for the flattest spectrum, that of noise (`tests/compress/test_lowrank.py`). Small matrices
    are decomposed exactly. Where a value is zero, the rows of v that belong to it are too.
    """
    short = min(matrix.shape)
    rank = min(rank, short)
    width = rank + OVERSAMPLE
    if rank == 0:
        return matrix.new_zeros(len(matrix), 0), matrix.new_zeros(0), matrix[:0].clone()
    if width * EXACT >= short or short <= SHORT:
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :rank].contiguous(), values[:rank], v[:rank].contiguous()
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(matrix.shape[1], width, generator=generator)
    if start is not None:
        given = min(start.shape[1], width)
        block[:, :given] = start[:, :given]
    basis = _basis(matrix, block, passes)
    del block
    inside = basis.T @ matrix
    squares, turn = torch.linalg.eigh((inside @ inside.T).double())
    turn = turn.flip(1)[:, :rank].float()
    values = squares.flip(0)[:rank].clamp_min(0).sqrt().float()
    v = turn.T @ inside
    v /= values.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return basis @ turn, values, v


def _basis(matrix: Tensor, block: Tensor, passes: int) -> Tensor:
    """Return an orthonormal basis, [out, (passes + 1) width], of what the passes see.

    block  [in, width]
    """
    width = block.shape[1]
    # Column by column, as LAPACK has them; a list of blocks would be there twice once joined.
    blocks = matrix.new_empty((passes + 1) * width, len(matrix)).T
    last = blocks[:, :width]
    last.copy_(torch.linalg.qr(matrix @ block).Q)
    for index in range(1, passes + 1):
        # `matrix.T @ block` is the same, and 40 times slower for a dozen columns (torch 2.13, CPU).
        back = torch.linalg.qr((last.T @ matrix).T).Q
        last = blocks[:, index * width : (index + 1) * width]
        last.copy_(torch.linalg.qr(matrix @ back).Q)
    basis: Tensor = torch.linalg.qr(blocks).Q
    return basis


def spectrum(matrix: Tensor, rank: int, *, seed: int) -> Tensor:
    """Return the squares of the leading singular values, largest first: float64 [rank].

    Their sum is within 5% of the exact one, also for noise; where they come from the Gram matrix,
    each is exact but for rounding (`tests/compress/test_lowrank.py`).
    """
    short = min(matrix.shape)
    if short <= SHORT or rank * MANY < short:
        return leading(matrix, rank, seed=seed)[1].double().square()
    tall = matrix.shape[0] > matrix.shape[1]
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    squares: Tensor = torch.linalg.eigvalsh(gram)
    return squares.flip(0)[:rank].clamp_min(0).double()

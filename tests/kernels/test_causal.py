"""Causal attention in bfloat16 is float64's, to the rounding of bfloat16, whatever the shape."""

import pytest
import torch
from torch import Tensor

from unicomp.kernels import causal, cpu, gram

LIMIT = 4e-3  # relative; bfloat16 rounds by 2^-9, weights and answers
SOME = torch.zeros(1, 1, dtype=torch.bfloat16)
needed = pytest.mark.skipif(not gram.usable(SOME), reason="no bfloat16 instructions, or no kernels")


def drawn(batch: int, heads: int, tokens: int, width: int, seed: int) -> Tensor:
    """Return [batch, heads, tokens, width] as models have it: heads side by side in memory."""
    random = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, heads, width, generator=random).bfloat16().transpose(1, 2)


def defined(query: Tensor, key: Tensor, value: Tensor, scale: float, ahead: int = 0) -> Tensor:
    """In float64; a query sees as many tokens ahead of its own place."""
    share = query.shape[1] // key.shape[1]
    k, v = (one.double().repeat_interleave(share, 1) for one in (key, value))
    scores = query.double() @ k.transpose(2, 3) * scale
    place = torch.arange(query.shape[2])
    scores[..., place[None] > place[:, None] + ahead] = -torch.inf
    return (scores.softmax(-1) @ v).transpose(1, 2)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@needed
@pytest.mark.parametrize("tokens", [1, 5, 6, 64, 130, 257])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2), (3, 3)])
def test_answers_are_float64s(heads: int, key_heads: int, width: int, tokens: int) -> None:
    query = drawn(2, heads, tokens, width, 0)
    key, value = (drawn(2, key_heads, tokens, width, seed) for seed in (1, 2))
    found = causal.attend(query, key, value, scale=0.1)
    assert found.shape == (2, tokens, heads, width)
    assert error(found, defined(query, key, value, 0.1)) < LIMIT
    if tokens > 1:
        assert error(found, defined(query, key, value, 0.1, ahead=1)) > 5 * LIMIT
        assert error(found, defined(query, key, value, 0.2)) > LIMIT


@needed
def test_large_scores_do_not_overflow() -> None:
    query, key, value = (drawn(1, 2, 70, 32, seed) for seed in range(3))
    found = causal.attend(query * 100, key * 100, value, scale=1.0)
    assert error(found, defined(query * 100, key * 100, value, 1.0)) < LIMIT


@needed
def test_any_strides_and_threads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = (drawn(2, 3, 100, 48, seed) for seed in range(3))
    plain = causal.attend(*(one.contiguous() for one in (query, key, value)), scale=0.2)
    for threads in (1, 4):
        monkeypatch.setattr(cpu, "_threads", threads)
        assert torch.equal(causal.attend(query, key, value, scale=0.2), plain)


@needed
@pytest.mark.parametrize(
    ("query", "key", "value"),
    [
        (drawn(1, 2, 5, 16, 0).float(), drawn(1, 2, 5, 16, 1), drawn(1, 2, 5, 16, 2)),
        (drawn(1, 3, 5, 16, 0), drawn(1, 2, 5, 16, 1), drawn(1, 2, 5, 16, 2)),
        (drawn(1, 2, 5, 20, 0), drawn(1, 2, 5, 20, 1), drawn(1, 2, 5, 20, 2)),
        (drawn(1, 2, 5, 272, 0), drawn(1, 2, 5, 272, 1), drawn(1, 2, 5, 272, 2)),
        (drawn(1, 2, 1, 16, 0), drawn(1, 2, 5, 16, 1), drawn(1, 2, 5, 16, 2)),
        (drawn(1, 2, 5, 16, 0), drawn(1, 2, 5, 16, 1), drawn(1, 2, 5, 32, 2)),
        (drawn(2, 2, 5, 16, 0), drawn(1, 2, 5, 16, 1), drawn(1, 2, 5, 16, 2)),
    ],
)
def test_what_does_not_fit_is_refused(query: Tensor, key: Tensor, value: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot attend"):
        causal.attend(query, key, value, scale=1.0)

"""Attention in bfloat16 is float64's, to the rounding of bfloat16, whatever the shape."""

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
    place, seen = torch.arange(query.shape[2]), torch.arange(key.shape[2])
    scores[..., seen[None] > place[:, None] + ahead] = -torch.inf
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


def runs_newest() -> bool:
    if not cpu.available():
        return False
    from unicomp.kernels import _cpu

    return _cpu.attention_newest_usable()


for_newest = pytest.mark.skipif(not runs_newest(), reason="no AVX2, or no kernels")


def one_token(
    heads: int, key_heads: int, tokens: int, width: int, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a query, and the keys and values that it attends to."""
    key, value = (drawn(batch, key_heads, tokens, width, seed) for seed in (1, 2))
    return drawn(batch, heads, 1, width, 0), key, value


@for_newest
@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 130, 1000])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2), (3, 3), (5, 1)])
def test_the_newest_token_attends_to_all(
    heads: int, key_heads: int, width: int, tokens: int
) -> None:
    query, key, value = one_token(heads, key_heads, tokens, width)
    found = causal.attend_newest(query, key, value, scale=0.1)
    assert found.shape == (2, 1, heads, width)
    wanted = defined(query, key, value, 0.1, ahead=tokens)
    assert error(found, wanted) < 2.5e-3  # one rounding to bfloat16: 2^-9 at most
    if tokens > 1:
        assert error(found, defined(query, key, value, 0.2, ahead=tokens)) > 2 * LIMIT
        most = tokens * 4 // 5
        less = defined(query, key[:, :, :most], value[:, :, :most], 0.1, ahead=tokens)
        assert error(found, less) > 5 * LIMIT
    if tokens > 1 and heads > key_heads > 1:
        turned = query.roll(1, dims=1)
        assert error(found, defined(turned, key, value, 0.1, ahead=tokens)) > 5 * LIMIT


@for_newest
def test_the_newest_token_at_the_ends_of_what_floats_hold() -> None:
    query, key, value = one_token(4, 2, 70, 32)
    found = causal.attend_newest(query * 100, key * 100, value, scale=1.0)
    assert error(found, defined(query * 100, key * 100, value, 1.0, ahead=70)) < LIMIT
    value[0, 1, 3, 5], key[1, 0, 2, 1] = torch.inf, torch.nan
    found = causal.attend_newest(query, key, value, scale=0.1)
    wanted = defined(query, key, value, 0.1, ahead=70)
    assert torch.equal(found.isfinite(), wanted.isfinite())
    assert torch.equal(found.isnan(), wanted.isnan())


@for_newest
def test_the_newest_token_whatever_strides_threads_and_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, value = one_token(6, 3, 100, 48)
    plain = causal.attend_newest(query, key.contiguous(), value.contiguous(), scale=0.2)
    wide = torch.zeros(2, 3, 120, 49, dtype=torch.bfloat16)
    view = wide[:, :, 10:110, 1:]
    view.copy_(key)
    for threads in (1, 4):
        monkeypatch.setattr(cpu, "_threads", threads)
        assert torch.equal(causal.attend_newest(query, view, value, scale=0.2), plain)
    assert not torch.equal(causal.attend_newest(query, view.flip(2), value, scale=0.2), plain)


@for_newest
def test_what_the_newest_token_cannot_attend_to() -> None:
    query, key, value = one_token(6, 3, 20, 32)
    wrong = [
        (query.float(), key, value),
        (query, key, value[:, :, 1:]),
        (query, key[:, :2], value[:, :2].repeat(1, 2, 1, 1)),
        (query[:, :4], key, value),
        (query.repeat(1, 1, 2, 1), key, value),
        (query[:1], key, value),
        (query, key[:, :, :0], value[:, :, :0]),
        (query[..., :24], key[..., :24], value[..., :24]),
        (query[..., ::2], key[..., ::2], value[..., ::2]),
        (query.to("meta"), key, value),
    ]
    for given in wrong:
        assert not causal.usable_newest(*given)
        with pytest.raises(ValueError, match="cannot attend"):
            causal.attend_newest(*given, scale=1.0)

"""The definitions, against numpy in float64 and against loops, and shown to differ when wrong."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from unicomp import metrics


def softmax(logits: Tensor) -> NDArray[np.float64]:
    raised = np.exp(np.longdouble(logits.double().numpy()))
    return np.asarray(raised / raised.sum(-1, keepdims=True), dtype=np.float64)


@pytest.fixture
def pair() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of base and model, float32 [3, 7, 11], and targets [3, 7]."""
    base = 3 * torch.randn(3, 7, 11)
    return base, base + torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))


def test_each_metric_is_its_formula(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    base, model, targets = pair
    p, q = softmax(base), softmax(model)
    log_p, log_q = metrics.log_probabilities(base), metrics.log_probabilities(model)
    assert log_q.dtype == torch.float64
    picked = np.take_along_axis(q, targets.numpy()[..., None], -1)[..., 0]
    np.testing.assert_allclose(metrics.nll(log_q, targets), -np.log(picked), rtol=1e-12)
    np.testing.assert_allclose(metrics.kl(log_p, log_q), (p * np.log(p / q)).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(metrics.ear(log_p, log_q), np.minimum(p, q).sum(-1), rtol=1e-12)
    same = p.argmax(-1) == q.argmax(-1)
    np.testing.assert_array_equal(metrics.top1_agreement(log_p, log_q), same)
    assert 0 < same.sum() < same.size


def test_ear_is_one_minus_total_variation(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    p, q = softmax(pair[0]), softmax(pair[1])
    found = metrics.ear(metrics.log_probabilities(pair[0]), metrics.log_probabilities(pair[1]))
    np.testing.assert_allclose(found, 1 - np.abs(p - q).sum(-1) / 2, rtol=1e-12)


def test_kl_is_not_symmetric(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    log_p, log_q = metrics.log_probabilities(pair[0]), metrics.log_probabilities(pair[1])
    assert not torch.allclose(metrics.kl(log_p, log_q), metrics.kl(log_q, log_p), rtol=1e-3)


def test_a_model_beside_itself_is_perfect(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    log_p = metrics.log_probabilities(pair[0])
    assert metrics.kl(log_p, log_p).abs().max() == 0
    assert (metrics.ear(log_p, log_p) - 1).abs().max() < 1e-15
    assert metrics.top1_agreement(log_p, log_p).all()


def test_excluded_tokens() -> None:
    never = torch.tensor([0.0, 0.0, -math.inf])
    some = torch.tensor([0.0, 0.0, 0.0])
    log_never, log_some = metrics.log_probabilities(never), metrics.log_probabilities(some)
    assert metrics.kl(log_never, log_some) == pytest.approx(math.log(1.5))
    assert metrics.kl(log_never, log_never) == 0
    assert metrics.kl(log_some, log_never) == math.inf
    assert metrics.ear(log_some, log_never) == pytest.approx(2 / 3)


def test_any_first_choice_of_a_tied_base_agrees() -> None:
    base = metrics.log_probabilities(torch.tensor([2.0, 2.0, 1.0]).repeat(3, 1))
    model = metrics.log_probabilities(torch.eye(3))
    assert metrics.top1_agreement(base, model).tolist() == [1, 1, 0]


def test_what_is_no_distribution_has_no_metric() -> None:
    broken = metrics.log_probabilities(torch.tensor([0.0, math.nan]))
    sound = metrics.log_probabilities(torch.tensor([0.0, 1.0]))
    for metric in (metrics.kl, metrics.ear, metrics.top1_agreement):
        assert metric(broken, sound).isnan()
        assert metric(sound, broken).isnan()
    assert metrics.nll(broken, torch.tensor(0)).isnan()


def test_large_logits_do_not_overflow() -> None:
    log_q = metrics.log_probabilities(torch.tensor([30000.0, 0.0], dtype=torch.bfloat16))
    assert torch.isfinite(log_q).all()


def test_perplexity_and_bits_per_byte() -> None:
    assert metrics.perplexity(10 * math.log(7), 10) == pytest.approx(7)
    assert metrics.perplexity(1e6, 1) == math.inf
    assert metrics.bits_per_byte(10 * math.log(2), 4) == pytest.approx(2.5)


@given(st.integers(1, 40))
@settings(max_examples=15, deadline=None)
def test_window_sums_do_not_depend_on_the_chunk(chunk: int) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(2, 5, 11, generator=generator)
    model = base + torch.randn(2, 5, 11, generator=generator)
    targets = torch.randint(0, 11, (2, 5), generator=generator)
    found = metrics.window_sums(model, targets, base, chunk=chunk)
    log_p, log_q = metrics.log_probabilities(base), metrics.log_probabilities(model)
    expected = {
        "nll": metrics.nll(log_q, targets),
        "base_nll": metrics.nll(log_p, targets),
        "kl": metrics.kl(log_p, log_q),
        "ear": metrics.ear(log_p, log_q),
        "top1": metrics.top1_agreement(log_p, log_q),
    }
    assert found.tokens == 5
    for name, values in expected.items():
        torch.testing.assert_close(getattr(found, name), values.sum(1), rtol=1e-13, atol=0)


def test_window_sums_without_a_base_have_only_the_likelihood() -> None:
    found = metrics.window_sums(torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64))
    assert found.kl is found.ear is found.top1 is found.base_nll is None


def test_join_keeps_the_order_and_refuses_unlike_windows() -> None:
    one = metrics.WindowSums(3, torch.tensor([1.0, 2.0]))
    two = metrics.WindowSums(3, torch.tensor([3.0]))
    assert metrics.join([one, two]).nll.tolist() == [1, 2, 3]
    assert metrics.join([one]).kl is None
    with pytest.raises(ValueError, match="different lengths"):
        metrics.join([one, metrics.WindowSums(4, torch.tensor([3.0]))])

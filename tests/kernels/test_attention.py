"""Attention with grouped heads side by side equals attention head by head, in numpy and float64."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from unicomp.kernels import attention, causal, cpu, gram

SOME = torch.zeros(1, 1, dtype=torch.bfloat16)
needed = pytest.mark.skipif(not gram.usable(SOME), reason="no bfloat16 instructions, or no kernels")

LIMIT = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float) -> np.ndarray[Any, Any]:
    """Return [batch, 1, heads, width] of one query token, head by head in float64."""
    q, k, v = (own.double().numpy() for own in (query, key, value))
    batch, heads, _, _ = q.shape
    share = heads // k.shape[1]
    found = np.empty((batch, 1, heads, v.shape[-1]))
    for one in range(batch):
        for head in range(heads):
            scores = k[one, head // share] @ q[one, head, 0] * scale
            weights = np.exp(scores - scores.max())
            found[one, 0, head] = weights @ v[one, head // share] / weights.sum()
    return found


def error(found: Tensor, wanted: np.ndarray[Any, Any]) -> float:
    """Return the relative error."""
    return float(np.linalg.norm(found.double().numpy() - wanted) / np.linalg.norm(wanted))


def inputs(groups: int, share: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(groups * 10 + share)
    shapes = [(batch, groups * share, 1, 16), (batch, groups, 37, 16), (batch, groups, 37, 16)]
    query, key, value = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    return query, key, value


def module(share: int) -> Any:
    """Return what transformers' function looks at in an attention module."""
    return SimpleNamespace(num_key_value_groups=share, is_causal=True)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(("groups", "share"), [(1, 4), (2, 3), (4, 8), (4, 1)])
def test_equals_head_by_head(groups: int, share: int, dtype: torch.dtype) -> None:
    query, key, value = inputs(groups, share, dtype)
    found, weights = attention.forward(module(share), query, key, value, None, scaling=0.3)
    assert weights is None
    assert found.dtype == dtype
    assert error(found, plain(query, key, value, 0.3)) < LIMIT[dtype]


def test_the_comparer_rejects_heads_in_another_order() -> None:
    query, key, value = inputs(2, 3, torch.float32)
    found, _ = attention.forward(module(3), query, key, value, None, scaling=0.3)
    turned = query.view(2, 2, 3, 1, 16).transpose(1, 2).reshape(query.shape)
    other, _ = attention.forward(module(3), turned, key, value, None, scaling=0.3)
    assert found.shape == other.shape
    assert error(other, plain(query, key, value, 0.3)) > 0.1


def test_a_query_that_is_not_contiguous() -> None:
    query, key, value = inputs(2, 3, torch.float32)
    wide = query.transpose(1, 2).contiguous().transpose(1, 2)
    found, _ = attention.forward(module(3), wide, key, value, None, scaling=0.3)
    assert error(found, plain(query, key, value, 0.3)) < LIMIT[torch.float32]


@pytest.mark.parametrize("tokens", [1, 5])
def test_masks_and_prompts_are_those_of_transformers(tokens: int) -> None:
    _, key, value = inputs(2, 3, torch.float32)
    query = torch.randn(2, 6, tokens, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 1, tokens, 37, dtype=torch.bool)
    mask[1, :, :, :9] = False
    for own in (mask, None) if tokens > 1 else (mask,):
        wanted, _ = sdpa_attention_forward(module(3), query, key, value, own, scaling=0.3)
        found, _ = attention.forward(module(3), query, key, value, own, scaling=0.3)
        assert torch.equal(found, wanted)


def test_what_plain_attention_cannot_do_is_left_to_transformers() -> None:
    query, key, value = inputs(2, 3, torch.float32)
    bias = torch.linspace(-3, 3, 37).expand(1, 6, 1, 37)
    given = {"scaling": 0.3, "position_bias": bias}
    wanted, _ = sdpa_attention_forward(module(3), query, key, value, None, **given)
    found, _ = attention.forward(module(3), query, key, value, None, **given)
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError, match="softcap"):
        attention.forward(module(3), query, key, value, None, scaling=0.3, softcap=30.0)


def test_one_token_in_bfloat16_goes_to_the_kernel_where_torch_has_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, key, value = inputs(2, 3, torch.bfloat16)
    if not causal.usable_newest(query, key, value):
        pytest.skip("no AVX2, or torch has instructions for bfloat16")
    found, _ = attention.forward(module(3), query, key, value, None)
    assert torch.equal(found, causal.attend_newest(query, key, value, scale=0.25))
    monkeypatch.setattr(causal, "attend_newest", None)
    other, _ = attention.forward(module(3), query.float(), key.float(), value.float(), None)
    assert error(other, plain(query, key, value, 0.25)) < LIMIT[torch.float32]
    mask = torch.ones(2, 1, 1, 37, dtype=torch.bool)
    for given in ({"attention_mask": mask}, {"attention_mask": None, "dropout": 0.1}):
        attention.forward(module(3), query, key, value, **given)
    query.requires_grad_()
    assert attention.forward(module(3), query, key, value, None)[0].requires_grad
    monkeypatch.setattr(cpu, "_missing", "taken away")
    assert not causal.usable_newest(query, key, value)


@needed
def test_prompts_in_bfloat16_go_to_the_kernel_and_nothing_else_does() -> None:
    draw = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(2, heads, 40, 16, generator=draw) for heads in (6, 2, 2))
    query, key, value = q.bfloat16(), k.bfloat16(), v.bfloat16()
    own, double = module(3), (query.double(), key.double(), value.double())
    wanted, _ = sdpa_attention_forward(own, double[0], double[1], double[2], None)
    found, weights = attention.forward(own, query, key, value, None)
    assert weights is None
    assert torch.equal(found, causal.attend(query, key, value, scale=0.25))
    assert float((found - wanted).norm() / wanted.norm()) < LIMIT[torch.bfloat16]
    assert torch.equal(attention.forward_in_bfloat16(own, q, k, v, None)[0], found)

    theirs, _ = sdpa_attention_forward(own, query, key, value, None)
    assert not torch.equal(found, theirs)
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    wishes: list[dict[str, Any]] = [{"attention_mask": mask}, {"is_causal": False}]
    for wish in wishes:
        given: dict[str, Any] = {"attention_mask": None, **wish}
        half, _ = attention.forward(own, query, key, value, **given)
        assert torch.equal(half, sdpa_attention_forward(own, query, key, value, **given)[0])
        full, _ = attention.forward_in_bfloat16(own, q, k, v, **given)
        assert torch.equal(full, sdpa_attention_forward(own, q, k, v, **given)[0])
    query.requires_grad_()
    assert attention.forward(own, query, key, value, None)[0].requires_grad

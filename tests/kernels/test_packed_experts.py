"""Packed experts are what transformers computes with the dequantized 3-D parameters."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from unicomp.kernels.linear import PackedLinear
from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.kernels.packed_experts import PackedExperts

pytestmark = pytest.mark.filterwarnings("ignore::unicomp.kernels.backend.MissingKernelWarning")

EXPERTS, HIDDEN, INNER, TOKENS, CHOSEN = 5, 32, 48, 7, 2


def layer(rows: int, columns: int) -> PackedLinear:
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    packed = PackedTensor(codes, torch.rand(rows, 1) * 0.05, None, Scheme(4, -1))
    return PackedLinear.from_packed(packed, compute="exact")


@pytest.fixture
def pair() -> tuple[PackedExperts, Any]:
    """Packed experts, and the module of transformers that holds the same weights dense."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    dense: Any = MixtralExperts(config)
    members = [
        (layer(INNER, HIDDEN), layer(INNER, HIDDEN), layer(HIDDEN, INNER)) for _ in range(EXPERTS)
    ]
    with torch.no_grad():
        for index, (gate, up, down) in enumerate(members):
            dense.gate_up_proj[index] = torch.cat([gate.dequantize(), up.dequantize()])
            dense.down_proj[index] = down.dequantize()
    return PackedExperts(members, dense.act_fn), dense


def routed() -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, the experts of each token, and their weights."""
    choice = torch.stack([torch.randperm(EXPERTS)[:CHOSEN] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN), choice, torch.rand(TOKENS, CHOSEN)


@torch.no_grad()
def test_equals_the_module_of_transformers(pair: tuple[PackedExperts, Any]) -> None:
    packed, dense = pair
    states, choice, weights = routed()
    found, wanted = packed(states, choice, weights), dense(states, choice, weights)
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(packed(states, choice.flip(1), weights), wanted)
    one = packed(states[:1], choice[:1], weights[:1])
    torch.testing.assert_close(one, wanted[:1])


@torch.no_grad()
def test_a_number_beyond_the_experts_is_none(pair: tuple[PackedExperts, Any]) -> None:
    packed, dense = pair
    states, choice, weights = routed()
    choice[:, 1] = EXPERTS
    torch.testing.assert_close(packed(states, choice, weights), dense(states, choice, weights))
    choice[:] = EXPERTS
    assert not packed(states, choice, weights).any()


@torch.no_grad()
def test_copies_compute_the_same(pair: tuple[PackedExperts, Any]) -> None:
    packed, _ = pair
    words = routed()
    wanted = packed(*words)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(*words), wanted)
    assert packed.half()(words[0].half(), words[1], words[2].half()).dtype == torch.float16

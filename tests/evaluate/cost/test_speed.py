"""What a decode step reads, counted by hand; the same figures at every pace."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unicomp.errors import UnicompError
from unicomp.evaluate.cost import speed
from unicomp.kernels.linear import PackedLinear
from unicomp.kernels.load import load
from unicomp.kernels.packed_experts import PackedExperts

Tiny = Callable[..., Path]


@pytest.mark.parametrize(
    ("arch", "elements"),
    [
        # q, k, v, o; gate, up, down in 3 layers; the head.
        ("llama", 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 44 * 64) + 128 * 64),
        # The head is the embedding, and is read whole.
        ("opt", 2 * (4 * 48 * 48 + 2 * 52 * 48) + 128 * 48),
        # Two of four experts.
        ("mixtral", 2 * (2 * 64 * 64 + 2 * 32 * 64 + 2 * 3 * 44 * 64) + 128 * 64),
    ],
)
def test_bytes_of_a_token(arch: str, elements: int, tiny_model: Tiny) -> None:
    assert speed.bytes_per_token(load(tiny_model(arch))) == 4 * elements


def test_packed_weights_count_as_packed(tiny_model: Tiny) -> None:
    model: Any = load(tiny_model("llama"))
    before = speed.bytes_per_token(model)
    dense = model.model.layers[0].mlp.down_proj
    packed = PackedLinear.from_packed(speed._random((64, 44), "int4"), backend="torch")
    model.model.layers[0].mlp.down_proj = packed
    after = speed.bytes_per_token(model)
    assert before - after == dense.weight.nbytes - packed.packed.nbytes > 0


def test_packed_experts_count_by_what_a_token_is_sent_to(tiny_model: Tiny) -> None:
    model: Any = load(tiny_model("mixtral"))
    dense = speed.bytes_per_token(model)
    layer = model.model.layers[0].mlp
    size = sum(weight.nbytes for weight in layer.experts.parameters())
    one = PackedLinear.from_packed(speed._random((44, 64), "int8"), backend="torch")
    down = PackedLinear.from_packed(speed._random((64, 44), "int8"), backend="torch")
    layer.experts = PackedExperts([(one, copy.deepcopy(one), down)] * 4, torch.relu)
    bytes_ = 2 * one.packed.nbytes + down.packed.nbytes
    found = speed.bytes_per_token(model)
    assert found == dense - size * 2 // 4 + bytes_ * 2 // 4


def test_a_clock_sees_every_token(tiny_model: Tiny) -> None:
    network = load(tiny_model("llama"))
    times = speed.generate(network, torch.arange(4, 12)[None], 6)
    assert len(times) == 7
    assert times == sorted(times)


def test_spread() -> None:
    found = speed.spread([3.0, 1.0, 2.0])
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": [3.0, 1.0, 2.0]}


def test_one_token_gives_no_rate() -> None:
    with pytest.raises(UnicompError, match="1 new tokens"):
        speed.model("builtin:tinyworld", new_tokens=1)

"""A few tokens times a dense weight in bfloat16 are float64's product, rounded once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unicomp.kernels import cpu, head
from unicomp.kernels.linear import DenseLinear


def runs() -> bool:
    if not cpu.available():
        return False
    from unicomp.kernels import _cpu

    return _cpu.head_usable()


pytestmark = pytest.mark.skipif(not runs(), reason="no AVX2, or no kernels")
LIMIT = 2.5e-3  # relative; bfloat16 rounds by 2^-9


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    wanted = x.double() @ weight.double().T
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 37, 64])
@pytest.mark.parametrize("columns", [32, 96, 4096])
def test_products_are_float64s(columns: int, rows: int, tokens: int) -> None:
    x, weight = drawn(tokens, columns), drawn(rows, columns, seed=1)
    found = head.multiply(x, weight)
    assert found.shape == (tokens, rows)
    assert error(found, x, weight) < LIMIT
    short = weight.clone()
    short[-1, -8:] = 0  # what a kernel would leave out that ends too early
    assert not torch.equal(head.multiply(x, short), found)
    if rows > 1:
        assert error(found, x, weight.roll(1, dims=0)) > 0.1
    if tokens > 1:
        assert error(found, x.roll(1, dims=0), weight) > 0.1


def test_one_token_has_the_bits_that_it_has_among_others(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(4, 1, 256), drawn(1000, 256, seed=1)
    whole = head.multiply(x, weight)
    assert whole.shape == (4, 1, 1000)
    for threads in (1, 4):
        monkeypatch.setattr(cpu, "_threads", threads)
        for count in (1, 2, 3, 4):
            assert torch.equal(head.multiply(x[:count], weight), whole[:count])
    assert not torch.equal(whole[:1], whole[1:2])
    assert head.multiply(x[:0], weight).shape == (0, 1, 1000)


def test_any_address_and_no_finite_number() -> None:
    x, room = drawn(2, 64), torch.zeros(5 * 64 + 1, dtype=torch.bfloat16)
    weight = room[1:].view(5, 64)
    weight.copy_(drawn(5, 64, seed=1))
    assert torch.equal(head.multiply(x, weight), head.multiply(x, weight.clone()))
    x[0, 3], weight[1, 5] = torch.inf, torch.nan
    found, wanted = head.multiply(x, weight), x.double() @ weight.double().T
    assert torch.equal(found.isfinite(), wanted.isfinite())
    assert torch.equal(found.isnan(), wanted.isnan())


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (drawn(1, 64).float(), drawn(5, 64)),
        (drawn(1, 64).float(), drawn(5, 64).float()),
        (drawn(1, 96), drawn(5, 64)),
        (drawn(1, 48), drawn(5, 48)),
        (drawn(5, 64), drawn(5, 64)),
        (drawn(64, 2).T, drawn(5, 64)),
        (drawn(1, 64), drawn(64, 5).T),
        (drawn(1, 64), drawn(64)),
        (drawn(1, 0), drawn(5, 0)),
        (drawn(1, 64).to("meta"), drawn(5, 64)),
    ],
)
def test_what_does_not_fit_is_refused(x: Tensor, weight: Tensor) -> None:
    assert not head.usable(x, weight)
    with pytest.raises(ValueError, match="no product of"):
        head.multiply(x, weight)


def refuse(*_: object) -> Tensor:
    raise AssertionError("the kernel was called")


def test_a_dense_layer_goes_there_with_a_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    if not head.here():
        pytest.skip("torch has instructions for bfloat16")
    linear = nn.Linear(64, 37, bias=False).bfloat16()
    layer: Any = DenseLinear.of(linear)
    with torch.no_grad():
        for tokens in (1, 4):
            x = drawn(1, tokens, 64)
            assert torch.equal(layer(x), head.multiply(x, linear.weight))
        monkeypatch.setattr(head, "multiply", refuse)
        with pytest.raises(AssertionError, match="was called"):
            layer(drawn(1, 64))
        assert layer(drawn(5, 64)).shape == (5, 37)
        biased = DenseLinear.of(nn.Linear(64, 37).bfloat16())
        assert biased(drawn(1, 64)).shape == (1, 37)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert compiled(drawn(1, 64)).shape == (1, 37)
    assert layer(drawn(1, 64)).requires_grad
    with torch.no_grad():
        monkeypatch.setattr(cpu, "_missing", "taken away")
        assert layer(drawn(1, 64)).shape == (1, 37)


def test_a_large_weight_moves_and_keeps_its_numbers_and_its_ties() -> None:
    if not head.here():
        pytest.skip("torch has instructions for bfloat16")
    table = nn.Embedding(2048, 1024).bfloat16()
    linear = nn.Linear(1024, 2048, bias=False).bfloat16()
    linear.weight = table.weight
    before, numbers = table.weight.data_ptr(), table.weight.detach().clone()
    layer = DenseLinear.of(linear)
    assert layer.weight is table.weight
    assert layer.weight.data_ptr() != before
    assert layer.weight.data_ptr() % cpu.HUGE_PAGE == 0
    assert torch.equal(layer.weight, numbers)
    small = nn.Linear(64, 37, bias=False).bfloat16()
    before = small.weight.data_ptr()
    assert DenseLinear.of(small).weight.data_ptr() == before

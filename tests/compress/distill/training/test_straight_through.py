import pytest
import torch
from torch import nn

from unicomp.compress.distill.training.straight_through import (
    Quantized,
    attach,
    quantizers,
    set_share,
)
from unicomp.kernels.packed import PackedTensor, Scheme


def start(bits: int = 4, group: int = 8, columns: int = 20, *, zeros: bool = False) -> PackedTensor:
    scheme = Scheme(bits, group, not zeros)
    draw = torch.Generator().manual_seed(0)
    low, high = scheme.code_range
    codes = torch.randint(low, high + 1, (5, columns), generator=draw).to(torch.int8)
    groups = scheme.groups(columns)
    scale = (0.05 + torch.rand(5, groups, generator=draw)).to(torch.bfloat16)
    zero = torch.randint(low, high + 1, (5, groups), generator=draw).to(torch.int8)
    return PackedTensor(codes, scale, zero if zeros else None, scheme)


def made(found: PackedTensor, **options: object) -> Quantized:
    words = {"codes": found.scheme.code_range, "scales": "learned", "keep_zeros": False} | options
    return Quantized(found, **words)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bits", "zeros"), [(2, False), (4, False), (4, True), (8, False)])
def test_it_begins_with_the_codes_it_was_given(bits: int, zeros: bool) -> None:
    found = start(bits, zeros=zeros)
    quantized = made(found)
    assert torch.equal(quantized(found.dequantize()), found.dequantize())
    again = quantized.packed(found.dequantize())
    assert torch.equal(again.codes, found.codes)
    assert torch.equal(again.scale, found.scale)


@pytest.mark.parametrize("scales", ["learned", "absmean"])
def test_what_is_packed_is_what_is_computed_with(scales: str) -> None:
    found = start(2)
    quantized = made(found, codes=(-1, 1), scales=scales)
    quantized.factor.data.normal_(generator=torch.Generator().manual_seed(1))
    shadow = torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
    packed = quantized.packed(shadow)
    assert set(packed.codes.unique().tolist()) <= {-1, 0, 1}
    assert torch.equal(packed.dequantize(), quantized(shadow).detach())


def test_gradients_are_those_of_learned_steps() -> None:
    """LSQ, equations 3 and 5: through the rounding inside the range, and none outside."""
    found = start(4, group=-1, columns=6)
    quantized = made(found)
    scale = found.scale.float()
    shadow = (scale * torch.tensor([-20.0, -3.3, 0.2, 1.6, 6.9, 40.0])).requires_grad_()
    quantized(shadow).sum().backward()
    inside = torch.tensor([False, True, True, True, True, False]).expand(5, 6)
    assert shadow.grad is not None
    assert torch.equal(shadow.grad, inside.float())
    x = (shadow / scale).detach()
    rest = torch.where(inside, x.round() - x, x.clamp(-8, 7))
    want = (rest * scale).sum(1, keepdim=True)  # of the factor: times the scale
    assert quantized.factor.grad is not None
    torch.testing.assert_close(quantized.factor.grad, want, rtol=1e-4, atol=1e-4)


def test_zeros_stay_and_get_no_gradient() -> None:
    found = start(4)
    codes = found.codes.clone()
    codes[:, ::2] = 0
    sparse = PackedTensor(codes, found.scale, None, found.scheme)
    quantized = made(sparse, keep_zeros=True)
    shadow = torch.randn(5, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
    quantized(shadow).sum().backward()
    assert shadow.grad is not None
    assert (shadow.grad[:, ::2] == 0).all()
    assert (quantized.packed(shadow.detach()).codes[:, ::2] == 0).all()


def test_going_over_gradually_ends_in_the_codes() -> None:
    linear = nn.Linear(20, 5, bias=False)
    shadow = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    attach(linear, made(start(2)), shadow)
    set_share(linear, 0.0)
    assert torch.equal(linear.weight, shadow)
    set_share(linear, 0.5)
    half = linear.weight.detach()
    set_share(linear, 1.0)
    rounded = linear.weight.detach()
    torch.testing.assert_close(half, (shadow + rounded) / 2)
    [(quantized, held)] = quantizers(linear).values()
    assert torch.equal(quantized.packed(held).dequantize(), rounded)

"""Ternary weights: the codes, the scales, and that the walk pays."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from unicomp.compress.method import Override, Stats
from unicomp.compress.quantize.ternary import Ternary
from unicomp.kernels.packed import Scheme


def problem(seed: int = 0) -> tuple[Tensor, Stats]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    return torch.randn(20, 48, generator=generator), Stats(300, inputs.T @ inputs / 300)


@pytest.mark.parametrize("size", [-1, 16, 20])
@pytest.mark.parametrize("absmean", [True, False])
def test_codes_are_minus_one_zero_and_one(size: int, absmean: bool) -> None:
    weight, stats = problem()
    scheme = Scheme(2, size)
    solution = Ternary(absmean=absmean).solve(weight, stats, scheme, scale_dtype=torch.bfloat16)
    assert set(solution.packed.codes.unique().tolist()) == {-1, 0, 1}
    assert solution.packed.scheme == scheme
    assert solution.packed.zero_point is None
    assert solution.packed.scale.shape == (20, scheme.groups(48))


def test_absmean_without_sweeps_is_the_mean_magnitude() -> None:
    weight, stats = problem()
    method = Ternary(absmean=True, sweeps=0)
    solution = method.solve(weight, stats, Scheme(2, -1), scale_dtype=torch.float32)
    torch.testing.assert_close(solution.packed.scale, weight.abs().mean(1, keepdim=True))


def test_the_walk_beats_rounding_on_the_same_grid_and_sweeps_beat_the_walk() -> None:
    weight, stats = problem()
    scheme = Scheme(2, 16)
    lost = []
    for sweeps in (0, 1, 4):
        solution = Ternary(sweeps=sweeps).solve(weight, stats, scheme, scale_dtype=torch.float32)
        lost.append(float(solution.error.sum()))
    step = Ternary(sweeps=0).solve(weight, stats, scheme, scale_dtype=torch.float32).packed.scale
    step = step.repeat_interleave(16, 1)
    plain = weight - (weight / step).round().clamp(-1, 1) * step
    assert stats.hessian is not None
    rounding = float(((plain @ stats.hessian) * plain).sum())
    assert lost[2] < lost[1] < lost[0] < rounding


def test_it_warns_and_takes_nothing_but_two_bits() -> None:
    assert "training" in Ternary.warning
    assert Ternary().scheme("layer.q_proj") == Scheme(2, 128)
    assert Ternary(modules={"q_proj": Override(group_size=-1)}).scheme("x.q_proj") == Scheme(2, -1)
    with pytest.raises(ValidationError):
        Ternary.model_validate({"bits": 3})
    with pytest.raises(ValidationError):
        Ternary.model_validate({"symmetric": False})
    with pytest.raises(ValidationError, match="`q_proj`: ternary weights have 2 bits"):
        Ternary(modules={"q_proj": Override(bits=4)})
    with pytest.raises(ValidationError, match="no zero point"):
        Ternary(modules={"q_proj": Override(symmetric=False)})

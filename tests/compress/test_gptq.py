"""GPTQ as a method: what it reports is true, what its options promise holds."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unicomp.compress.linalg import Factor
from unicomp.compress.method import Need, Solution, Stats
from unicomp.compress.quantize import gptq
from unicomp.compress.quantize.gptq import Gptq
from unicomp.compress.quantize.rtn import Rtn
from unicomp.errors import CheckpointError
from unicomp.kernels.packed import Scheme

PLAIN = {"drift": 0.0, "sweeps": 0, "scale_search": "minmax", "order": "none"}


def inputs_of(columns: int, seed: int, tokens: int = 600) -> Tensor:
    """Correlated inputs of uneven size, one column large, float32 [tokens, in]."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (mix + torch.eye(columns))
    x = x * (0.2 + 2 * torch.rand(columns, generator=generator))
    x[:, columns // 2] *= 6
    return x


def problem(rows: int = 40, columns: int = 72, seed: int = 0) -> tuple[Tensor, Stats]:
    inputs = inputs_of(columns, seed)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 100))
    return weight, Stats(len(inputs), inputs.T @ inputs / len(inputs))


def true_error(weight: Tensor, solution: Solution, hessian: Tensor) -> Tensor:
    lost = (weight - solution.packed.dequantize()).double()
    return ((lost @ hessian.double()) * lost).sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [-1, 24, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_reported_errors_are_those_of_what_is_stored(bits: int, size: int, symmetric: bool) -> None:
    weight, stats = problem()
    scheme = Scheme(bits, size, symmetric)
    hessian = stats.hessian
    assert hessian is not None
    solution = Gptq().solve(weight, stats, scheme, scale_dtype=torch.bfloat16)
    plain = Rtn(scale_search="minmax").solve(weight, stats, scheme, scale_dtype=torch.bfloat16)
    wanted = true_error(weight, solution, hessian).float()
    torch.testing.assert_close(solution.error, wanted, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(solution.rounding, plain.error, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(solution.reference, plain.reference, rtol=1e-3, atol=1e-3)
    assert (solution.error < solution.rounding).all()
    assert solution.packed.scale.dtype == torch.bfloat16
    assert solution.packed.scheme == scheme
    assert solution.damp == 0.01
    low, high = scheme.code_range
    assert int(solution.packed.codes.min()) >= low
    assert int(solution.packed.codes.max()) <= high


def test_the_error_is_predicted_where_nothing_is_clipped() -> None:
    weight, stats = problem(rows=200)
    method = Gptq.model_validate(PLAIN | {"order": "act", "damp": 1e-3})
    solution = method.solve(weight, stats, Scheme(8, -1), scale_dtype=torch.float32)
    assert solution.predicted is not None
    ratio = float(solution.error.sum() / solution.predicted.sum())
    assert 0.9 < ratio < 1.1
    assert float(solution.rounding.sum()) > 1.5 * float(solution.error.sum())


@pytest.mark.parametrize("size", [-1, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_each_part_earns_its_place(seed: int, bits: int, size: int) -> None:
    weight, stats = problem(rows=200, columns=96, seed=seed)
    scheme = Scheme(bits, size)

    def lost(**options: object) -> float:
        method = Gptq.model_validate(PLAIN | options)
        solution = method.solve(weight, stats, scheme, scale_dtype=torch.bfloat16)
        return float(solution.error.sum())

    plain = lost()
    act = lost(order="act")
    searched = lost(order="act", scale_search="mse")
    swept = lost(order="act", scale_search="mse", sweeps=1)
    more = lost(order="act", scale_search="mse", sweeps=3)
    nearest = Rtn(scale_search="minmax").solve(weight, stats, scheme, scale_dtype=torch.bfloat16)
    assert more < swept < searched < act < plain < float(nearest.error.sum())


def test_drift_is_made_up_for() -> None:
    """Against the outputs of the original model, more share of the drift leaves less error."""
    original = inputs_of(64, 3, tokens=2000)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)) / 8
    inputs = original + 0.15 * original @ noise
    weight = torch.randn(80, 64, generator=torch.Generator().manual_seed(6))
    stats = Stats(2000, inputs.T @ inputs / 2000, (original - inputs).T @ inputs / 2000)
    wanted = original @ weight.T
    lost = []
    for drift in (0.0, 0.5, 1.0):
        method = Gptq(drift=drift, damp=0.001)
        fresh = replace(stats, memo={})
        solution = method.solve(weight, fresh, Scheme(4, 32), scale_dtype=torch.float32)
        lost.append(float((inputs @ solution.packed.dequantize().T - wanted).square().mean()))
    assert lost[2] < lost[1] < lost[0]
    target = torch.linalg.lstsq(inputs, wanted).solution.T
    best = float((inputs @ target.T - wanted).square().mean())
    solution = Gptq(drift=1.0, damp=1e-4).solve(
        weight, replace(stats, memo={}), Scheme(8, -1), scale_dtype=torch.float32
    )
    found = float((inputs @ solution.packed.dequantize().T - wanted).square().mean())
    assert best <= found < best + 0.02 * (lost[0] - best)


def test_many_rows_and_few_get_the_same_correction() -> None:
    weight, stats = problem(rows=100)
    assert stats.hessian is not None
    hessian = stats.hessian.double()
    cross = 0.1 * torch.randn(72, 72, generator=torch.Generator().manual_seed(8)).double()
    stats = Stats(stats.tokens, hessian, cross)
    scheme = Scheme(4, 24)
    many = Gptq().solve(weight, stats, scheme, scale_dtype=torch.bfloat16)
    few = Gptq().solve(weight[:71], stats, scheme, scale_dtype=torch.bfloat16)
    assert torch.equal(many.packed.codes[:71], few.packed.codes)
    assert len(stats.memo) == 2


def test_no_drift_is_no_correction_and_asks_for_no_cross_statistic() -> None:
    weight, stats = problem()
    assert stats.hessian is not None
    still = Stats(stats.tokens, stats.hessian, torch.zeros_like(stats.hessian))
    scheme = Scheme(4, 24)
    one = Gptq(drift=1.0).solve(weight, still, scheme, scale_dtype=torch.bfloat16)
    other = Gptq(drift=0.0).solve(weight, stats, scheme, scale_dtype=torch.bfloat16)
    assert torch.equal(one.packed.codes, other.packed.codes)
    assert Gptq(drift=0.0).wants() == {Need.HESSIAN}
    assert Gptq(drift=0.1).wants() == {Need.HESSIAN, Need.CROSS}


def test_rows_are_solved_alike_alone_stacked_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = problem(rows=30)
    assert stats.hessian is not None
    stats = Stats(stats.tokens, stats.hessian.double())
    scheme = Scheme(3, 32, False)
    whole = Gptq().solve(weight, stats, scheme, scale_dtype=torch.float16)
    monkeypatch.setattr(gptq, "CHUNK", 72 * 7)
    parts = Gptq().solve(weight, stats, scheme, scale_dtype=torch.float16)
    alone = Gptq().solve(weight[4:5], stats, scheme, scale_dtype=torch.float16)
    assert whole.packed.zero_point is not None
    assert parts.packed.zero_point is not None
    assert torch.equal(whole.packed.codes, parts.packed.codes)
    assert torch.equal(whole.packed.scale, parts.packed.scale)
    assert torch.equal(whole.packed.zero_point, parts.packed.zero_point)
    assert torch.equal(whole.packed.codes[4:5], alone.packed.codes)
    assert torch.equal(whole.clipped, parts.clipped)
    for name in ("error", "rounding", "reference", "predicted"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name))


def test_the_factor_is_worked_out_once_for_weights_of_one_input() -> None:
    weight, stats = problem()
    Gptq().solve(weight, stats, Scheme(4, 32), scale_dtype=torch.bfloat16)
    (kept,) = stats.memo.values()
    assert isinstance(kept, Factor)
    Gptq(bits=8).solve(weight, stats, Scheme(8, -1), scale_dtype=torch.bfloat16)
    assert list(stats.memo.values()) == [kept]
    Gptq(damp=0.1).solve(weight, stats, Scheme(8, -1), scale_dtype=torch.bfloat16)
    assert len(stats.memo) == 2


@pytest.mark.parametrize("order", ["none", "act", "min-pivot"])
def test_dead_columns_are_rounded_to_nearest_and_trouble_nobody(order: str) -> None:
    weight, stats = problem(columns=48)
    assert stats.hessian is not None
    dead = [0, 17, 47]
    stats.hessian[dead] = 0
    stats.hessian[:, dead] = 0
    method = Gptq.model_validate({"order": order, "sweeps": 1})
    solution = method.solve(weight, stats, Scheme(4, -1), scale_dtype=torch.float32)
    step = solution.packed.scale
    away = (solution.packed.dequantize() - weight)[:, dead].abs()
    inside = (weight[:, dead] / step >= -8.5) & (weight[:, dead] / step <= 7.5)
    assert (away[inside] <= (step / 2).expand_as(away)[inside] * 1.001).all()
    live = [c for c in range(48) if c not in dead]
    alone = Stats(stats.tokens, stats.hessian[live][:, live])
    other = method.solve(weight[:, live], alone, Scheme(4, -1), scale_dtype=torch.float32)
    assert float(solution.error.sum()) < 1.1 * float(other.error.sum())


def test_a_singular_hessian_is_damped_more_and_says_so() -> None:
    weight, _ = problem(columns=40)
    inputs = inputs_of(40, 9, tokens=3)
    stats = Stats(3, inputs.T @ inputs / 3)
    solution = Gptq(damp=0.0).solve(weight, stats, Scheme(4, 8), scale_dtype=torch.bfloat16)
    assert solution.damp is not None
    assert solution.damp > 0
    assert torch.isfinite(solution.packed.scale.float()).all()
    assert float(solution.error.sum()) < float(solution.rounding.sum())


def test_what_cannot_be_factorised_is_refused() -> None:
    weight, _ = problem()
    indefinite = torch.full((72, 72), -9.0) + 10 * torch.eye(72)
    with pytest.raises(CheckpointError) as caught:
        Gptq().solve(weight, Stats(1, indefinite), Scheme(4, 32), scale_dtype=torch.bfloat16)
    assert "`damp` at 0.01, 0.04, 0.16, 0.64, 1" in caught.value.message
    assert caught.value.hint is not None
    assert "`samples`" in caught.value.hint
    with pytest.raises(CheckpointError, match="no statistic"):
        Gptq().solve(weight, Stats(0), Scheme(4, 32), scale_dtype=torch.bfloat16)


def test_workspace_grows_with_columns_and_no_more_with_rows_than_their_result() -> None:
    few, many = (Gptq().workspace_bytes(rows, 4096) for rows in (8192, 65536))
    assert many - few == 5 * 4096 * (65536 - 8192)
    assert Gptq().workspace_bytes(64, 8192) > Gptq().workspace_bytes(64, 4096)

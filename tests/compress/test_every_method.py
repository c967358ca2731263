"""What every method must do, whoever wrote it; methods are found, not listed."""

import inspect
import re
import sys

import pytest
import torch
import yaml
from torch import Tensor

from unicomp.compress import methods
from unicomp.compress.method import Need, QuantizeMethod, Solution, Stats
from unicomp.compress.quantize.rtn import Rtn
from unicomp.kernels.packed import Scheme

QUANTIZE = methods.methods("quantize")
NEEDED: dict[str, dict[str, object]] = {"quantize": {}, "delta": {"base": "builtin:tinyworld"}}
EVERY = [(verb, name) for verb in NEEDED for name in methods.methods(verb)]


def made(name: str, **options: object) -> QuantizeMethod:
    kind = methods.find("quantize", name)
    assert issubclass(kind, QuantizeMethod)
    return kind.model_validate(options)


def scheme_of(method: QuantizeMethod, group_size: int = 16) -> Scheme:
    found = method.scheme("model.layers.0.self_attn.q_proj")
    assert found is not None
    return Scheme(found.bits, group_size, found.symmetric)


def problem(rows: int = 48, columns: int = 64, *, dead: int | None = None) -> tuple[Tensor, Stats]:
    """A weight and all statistics of a correlated input, the compressed one slightly off."""
    generator = torch.Generator().manual_seed(columns + rows)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    original = torch.randn(500, columns, generator=generator) @ (mix + 0.3 * torch.eye(columns))
    if dead is not None:
        original[:, dead] = 0
    inputs = original * (1 + 0.02 * torch.randn(columns, generator=generator))
    cross = (original - inputs).T @ inputs / 500
    stats = Stats(500, inputs.T @ inputs / 500, cross)
    return torch.randn(rows, columns, generator=generator), stats


def solve(
    method: QuantizeMethod, weight: Tensor, stats: Stats, scheme: Scheme | None = None
) -> Solution:
    fresh = Stats(stats.tokens, stats.hessian, stats.cross)
    scheme = scheme_of(method) if scheme is None else scheme
    return method.solve(weight, fresh, scheme, scale_dtype=torch.bfloat16)


def test_there_are_methods() -> None:
    assert {"rtn", "gptq", "ternary"} <= set(QUANTIZE)


@pytest.mark.parametrize(("verb", "name"), EVERY)
def test_options_survive_yaml(verb: str, name: str) -> None:
    for options in ({}, {"ignore": ["lm_head", "re:.*gate"]}):
        method = methods.find(verb, name).model_validate(NEEDED[verb] | options)
        text = yaml.safe_dump(method.model_dump(mode="json"))
        assert type(method).model_validate(yaml.safe_load(text)) == method
        assert method != methods.find(verb, name).model_validate(
            NEEDED[verb] | {"ignore": ["another"]}
        )


@pytest.mark.parametrize(("verb", "name"), EVERY)
def test_it_says_where_it_is_from_and_what_it_takes(verb: str, name: str) -> None:
    kind = methods.find(verb, name)
    document = inspect.getdoc(sys.modules[kind.__module__]) or ""
    assert re.search(r"^Papers?: .*arXiv:\d{4}\.\d{5}", document, re.MULTILINE | re.DOTALL)
    assert "[out, in]" in (inspect.getdoc(kind.solve) or "")  # type: ignore[attr-defined]
    for field in kind.model_fields.values():
        assert field.description


@pytest.mark.parametrize("name", QUANTIZE)
def test_inputs_are_left_alone_and_the_answer_is_the_same_again(name: str) -> None:
    method = made(name)
    weight, stats = problem()
    assert stats.hessian is not None
    assert stats.cross is not None
    before = [weight.clone(), stats.hessian.clone(), stats.cross.clone()]
    one, other = solve(method, weight, stats), solve(method, weight, stats)
    for old, new in zip(before, [weight, stats.hessian, stats.cross], strict=True):
        assert torch.equal(old, new)
    assert torch.equal(one.packed.codes, other.packed.codes)
    assert torch.equal(one.packed.scale, other.packed.scale)
    assert torch.equal(one.error, other.error)


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "group_size", "dead"),
    [
        (1, 64, 16, None),
        (5, 64, -1, 7),
        (5, 45, 16, None),
        (3, 9, 16, 0),
        (2, 1, -1, None),
    ],
)
def test_odd_shapes_and_dtypes(
    name: str, dtype: torch.dtype, rows: int, columns: int, group_size: int, dead: int | None
) -> None:
    method = made(name)
    weight, stats = problem(rows, columns, dead=dead)
    scheme = scheme_of(method, group_size)
    solution = solve(method, weight.to(dtype), stats, scheme)
    groups = scheme.groups(columns)
    packed = solution.packed
    assert packed.codes.shape == (rows, columns)
    assert packed.codes.dtype == torch.int8
    assert packed.scale.shape == (rows, groups)
    assert packed.scale.dtype == torch.bfloat16
    assert (packed.scale > 0).all()
    assert (packed.zero_point is None) == scheme.symmetric
    low, high = scheme.code_range
    assert low <= int(packed.codes.min())
    assert int(packed.codes.max()) <= high
    for value in (solution.error, solution.rounding, solution.reference, solution.clipped):
        assert value.shape == (rows,)
        assert torch.isfinite(value.float()).all()
        assert (value >= 0).all()
    assert torch.isfinite(packed.dequantize()).all()


@pytest.mark.parametrize("name", QUANTIZE)
def test_permuting_rows_permutes_the_answer(name: str) -> None:
    method = made(name)
    weight, stats = problem()
    assert stats.hessian is not None
    assert stats.cross is not None
    stats = Stats(stats.tokens, stats.hessian.double(), stats.cross.double())
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    one, other = solve(method, weight, stats), solve(method, weight[order], stats)
    assert torch.equal(one.packed.codes[order], other.packed.codes)
    torch.testing.assert_close(one.error[order], other.error)


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("seed_columns", [64, 80, 96])
def test_calibration_pays(name: str, seed_columns: int) -> None:
    """A method that asks for a Hessian loses strictly less than rounding on the same bits."""
    method = made(name)
    weight, stats = problem(columns=seed_columns)
    solution = solve(method, weight, stats)
    nearest = solve(Rtn(), weight, stats, scheme_of(method))
    if Need.HESSIAN in method.needs:
        assert float(solution.error.sum()) < float(nearest.error.sum())
        assert float(solution.error.sum()) < 0.9 * float(solution.rounding.sum())
    else:
        assert float(solution.error.sum()) <= float(solution.rounding.sum()) * 1.2

"""The norm in one call gives transformers' bits, and leaves alone what computes otherwise."""

import copy
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from unicomp.kernels import cpu, norm
from unicomp.kernels.norm import RMSNorm, rms_norm

pytestmark = pytest.mark.skipif(not cpu.available(), reason=str(cpu.reason()))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = [8, 9, 31, 32, 64, 100, 130, 511, 1000, 2048, 3584, 4099, norm.WIDTH_MAX]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = cpu.isa()
    with torch.no_grad():
        yield
    cpu.use(before)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def llama(width: int, dtype: torch.dtype = torch.float32, eps: float = 1e-5) -> LlamaRMSNorm:
    """Return transformers' own norm, with a weight that is not one."""
    module = LlamaRMSNorm(width, eps).to(dtype)
    module.weight.copy_(drawn(width, seed=1))
    return module


def fused(module: nn.Module) -> RMSNorm:
    found = RMSNorm.of(module)
    assert found is not None
    return found


@pytest.mark.parametrize("isa", cpu.usable())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_bits_are_those_of_transformers(width: int, dtype: torch.dtype, isa: str) -> None:
    cpu.use(isa)
    module = llama(width, dtype)
    own = fused(module)
    for rows in (0, 1, 3):
        for scale in (1e-3, 1.0, 30.0):
            x = scale * drawn(rows, 1, width, dtype=dtype, seed=2)
            found = rms_norm(x, own.weight, eps=own.eps, lanes=own.lanes)
            assert torch.equal(found, module(x))
            assert torch.equal(own(x), found)


@pytest.mark.parametrize("width", [100, 2048])
def test_another_order_of_sums_shows(width: int) -> None:
    """In float32, and so the comparison of bits means something."""
    own, x = fused(llama(width)), drawn(64, width)
    wanted = llama(width)(x)
    for lanes in norm.LANES:
        found = rms_norm(x, own.weight, eps=own.eps, lanes=lanes)
        assert torch.equal(found, wanted) == (lanes == own.lanes)
        assert torch.allclose(found, wanted, rtol=1e-6, atol=0)
    wrong = rms_norm(x, own.weight, eps=0.1, lanes=own.lanes)
    assert not torch.allclose(wrong, wanted, rtol=1e-3)


@pytest.mark.parametrize("isa", cpu.usable())
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_address(dtype: torch.dtype, isa: str) -> None:
    cpu.use(isa)
    module = llama(130, dtype)
    x = drawn(2 * 130 + 1, dtype=dtype)[1:].view(2, 130)
    assert torch.equal(fused(module)(x), module(x))


def test_infinity_and_nan_stay_in_their_row() -> None:
    module = llama(64, torch.bfloat16)
    x = drawn(4, 64, dtype=torch.bfloat16)
    x[0, 3], x[1, 5], x[2] = torch.inf, torch.nan, 0.0
    assert torch.equal(fused(module)(x).nan_to_num(7.0), module(x).nan_to_num(7.0))


@pytest.mark.parametrize("kind", [LlamaRMSNorm, MixtralRMSNorm, Phi3RMSNorm, Qwen3RMSNorm])
def test_classes_of_this_formula(kind: type[nn.Module]) -> None:
    module = kind(48).eval()
    own = fused(module)
    assert own.weight is module.weight
    assert own.state_dict().keys() == module.state_dict().keys()
    assert not own.training
    for other in (copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        x = drawn(2, 48)
        assert torch.equal(other(x), module(x))


class Scaled(LlamaRMSNorm):
    """Of this name, and of another formula."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        found: Tensor = super().forward(hidden_states) * (1 + 2**-20)
        return found


class Gated(LlamaRMSNorm):
    """With an input more, that may be left out."""

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        found: Tensor = super().forward(hidden_states if gate is None else hidden_states * gate)
        return found


@pytest.mark.parametrize(
    "module",
    [
        Gemma2RMSNorm(48),
        Olmo2RMSNorm(48).bfloat16(),
        Scaled(48),
        Gated(48),
        nn.LayerNorm(48, bias=False),
        LlamaRMSNorm(norm.WIDTH_MAX + 1),
        LlamaRMSNorm(48).double(),
        LlamaRMSNorm(48).to("meta"),
        nn.Linear(4, 4),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_computes_otherwise_is_left_alone(module: nn.Module) -> None:
    assert RMSNorm.of(module) is None


def refuse(*_: object, **__: object) -> Tensor:
    raise AssertionError("the kernel was called")


def test_all_else_goes_as_transformers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    module = llama(64, torch.bfloat16)
    own = fused(module)
    x = drawn(4, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(norm, "rms_norm", refuse)
    with pytest.raises(AssertionError, match="was called"):
        own(x)
    many = drawn(norm.FEW // 64, 64, dtype=torch.bfloat16)
    apart = drawn(64, 4, dtype=torch.bfloat16).T
    for other in (many, apart, x.float()):
        assert torch.equal(own(other), module(other))
    assert copy.deepcopy(own).to("meta")(x.to("meta")).shape == x.shape
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    with torch.enable_grad():
        one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
        own(one).sum().backward()
        module(two).sum().backward()
        assert one.grad is not None
        assert two.grad is not None
        assert torch.equal(one.grad, two.grad)


def test_without_the_extension_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = llama(64)
    own = fused(module)
    monkeypatch.setattr(cpu, "_missing", "taken away")
    monkeypatch.setattr(norm, "rms_norm", refuse)
    assert torch.equal(own(drawn(2, 64)), module(drawn(2, 64)))
    assert RMSNorm.of(module) is None


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (drawn(2, 8), drawn(9)),
        (drawn(2, 8), drawn(8).double()),
        (drawn(2, 8).double(), drawn(8).double()),
        (drawn(8, 2).T, drawn(8)),
        (drawn(2, 8), drawn(16)[::2]),
        (drawn(1, norm.WIDTH_MAX + 1), drawn(norm.WIDTH_MAX + 1)),
        (drawn(2, 0), drawn(0)),
        (drawn(2, 8).to("meta"), drawn(8)),
    ],
)
def test_wrong_inputs_are_refused(x: Tensor, weight: Tensor) -> None:
    with pytest.raises(ValueError, match="no norm of"):
        rms_norm(x, weight, eps=1e-6, lanes=8)
    with pytest.raises(ValueError, match="lanes out of range"):
        rms_norm(drawn(2, 8), drawn(8), eps=1e-6, lanes=5)

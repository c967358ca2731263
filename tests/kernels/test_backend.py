"""The choice of an implementation, and the torch operator around it."""

import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unicomp.errors import UnsupportedError
from unicomp.kernels import backend, blocked
from unicomp.kernels.packed import PackedTensor, Scheme


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test finds out anew what there is."""
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    backend._door.cache_clear()
    backend._warn_once.cache_clear()
    yield
    backend._door.cache_clear()
    backend._warn_once.cache_clear()


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without the C extension."""

    def missing(name: str) -> Any:
        raise ImportError("not built")

    monkeypatch.setattr(backend, "import_module", missing)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A C extension that answers with the definition, and the calls that it had."""
    calls: list[str] = []

    def linear(
        x: Tensor, weight: blocked.Blocked, bias: Tensor | None, *, compute: blocked.Compute
    ) -> Tensor:
        calls.append("linear")
        product = blocked.linear(x, weight, compute=compute)
        return product if bias is None else product + bias

    def block(tensor: PackedTensor, kind: blocked.Kind, out: Tensor) -> blocked.Blocked:
        calls.append("block")
        return blocked.block(tensor, kind, out)

    door = SimpleNamespace(
        available=lambda: True,
        reason=lambda: None,
        isa=lambda: "scalar",
        allocate=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
        block=block,
        linear=linear,
    )
    monkeypatch.setattr(backend, "import_module", lambda name: door)
    return calls


def weight(rows: int = 20, columns: int = 48, group: int = 16) -> PackedTensor:
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    scheme = Scheme(4, group)
    return PackedTensor(codes, torch.rand(rows, scheme.groups(columns)) + 0.1, None, scheme)


def test_without_a_kernel_torch_computes_and_says_so_once(absent: None) -> None:
    with pytest.warns(backend.MissingKernelWarning, match="not built"):
        assert backend.choose() == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose() == "torch"
    assert backend.isa("torch") is None
    assert "not built" in (backend.missing() or "")


def test_a_kernel_that_does_not_run_here_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    door = SimpleNamespace(available=lambda: False, reason=lambda: "no AVX2")
    monkeypatch.setattr(backend, "import_module", lambda name: door)
    assert backend.missing() == "no AVX2"
    with pytest.raises(UnsupportedError, match="no AVX2"):
        backend.choose("cpu")


def test_the_best_there_is(present: list[str]) -> None:
    assert backend.choose() == "cpu"
    assert backend.missing() is None
    assert backend.isa("cpu") == "scalar"
    found = backend.block(weight(), "int4")
    backend.multiply(torch.randn(2, 48), found, None, compute="int8", backend="cpu")
    assert present == ["block", "linear"]


def test_words_go_before_the_environment(
    present: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backend.VARIABLE, "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a choice is no surprise
        assert backend.choose() == "torch"
    assert backend.choose("cpu") == "cpu"


def test_an_impossible_choice_names_what_there_is(
    absent: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(backend.VARIABLE, "cpu")
    with pytest.raises(UnsupportedError, match=r"no backend `cpu`.*not built"):
        backend.choose()
    with pytest.raises(UnsupportedError, match="unknown backend `gpu`") as caught:
        backend.choose("gpu")
    assert "`cpu`" in str(caught.value.hint)
    with pytest.raises(UnsupportedError, match="device `cuda`"):
        backend.choose(device="cuda")


THERE = [name for name in backend.BACKENDS["cpu"] if name == "torch" or backend.missing() is None]


@pytest.mark.parametrize("name", THERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 3, 48), (0, 48)])
def test_products_keep_shape_and_dtype(
    name: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    packed, bias = weight(), torch.randn(20).to(dtype)
    found = backend.block(packed, "int4")
    x = torch.randn(shape).to(dtype)
    product = backend.multiply(x, found, bias, compute="exact", backend=name)
    wanted = torch.nn.functional.linear(x.double(), packed.dequantize().double(), bias.double())
    assert product.dtype == dtype
    assert product.shape == (*shape[:-1], 20)
    # One rounding, to the nearest: half a step of the dtype, and what float32 sums leave.
    torch.testing.assert_close(
        product.double(), wanted, rtol=0.5 * torch.finfo(dtype).eps, atol=2e-5
    )


def test_an_input_of_another_width_is_refused() -> None:
    found = backend.block(weight(), "int4")
    with pytest.raises(ValueError, match="width 47"):
        backend.multiply(torch.ones(1, 47), found, None, compute="int8", backend="torch")
    meta = torch.ones(1, 48, device="meta")
    with pytest.raises(UnsupportedError, match="device `meta`"):
        backend.multiply(meta, found, None, compute="int8", backend="torch")


def arguments(packed: PackedTensor, compute: str) -> tuple[Tensor, tuple[Any, ...]]:
    """Return what the operator takes after x and the panels, and the panels."""
    rows, columns = packed.codes.shape
    scheme = packed.scheme
    found = backend.block(packed, "int4")
    rest = ("int4", rows, columns, scheme.bits, scheme.group_size, scheme.symmetric, "float32")
    return found.data, (*rest, compute, "torch")


@pytest.mark.parametrize("compute", ["int8", "exact"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_the_operator_is_the_product(compute: str, with_bias: bool) -> None:
    packed = weight()
    bias = torch.randn(20) if with_bias else None
    data, rest = arguments(packed, compute)
    x = torch.randn(3, 48)
    found = torch.ops.unicomp.packed_linear(x, data, bias, *rest)
    own: blocked.Compute = "int8" if compute == "int8" else "exact"
    blocks = backend.block(packed, "int4")
    wanted = backend.multiply(x, blocks, bias, compute=own, backend="torch")
    assert torch.equal(found, wanted)
    torch.library.opcheck(torch.ops.unicomp.packed_linear, (x, data, bias, *rest))


def test_gradients_pass_through_the_operator() -> None:
    packed, x = weight(), torch.randn(3, 48, requires_grad=True)
    bias = torch.randn(20, requires_grad=True)
    data, rest = arguments(packed, "exact")
    torch.ops.unicomp.packed_linear(x, data, bias, *rest).square().sum().backward()
    plain, plain_bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    torch.nn.functional.linear(plain, packed.dequantize(), plain_bias).square().sum().backward()
    assert x.grad is not None
    assert bias.grad is not None
    torch.testing.assert_close(x.grad, plain.grad)
    torch.testing.assert_close(bias.grad, plain_bias.grad)

"""A packed layer is the dense layer of its dequantized weight, whatever is done to it."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from unicomp.errors import UnicompError, UnsupportedError
from unicomp.kernels import backend
from unicomp.kernels.linear import DenseLinear, PackedLinear
from unicomp.kernels.packed import PackedTensor, Scheme

pytestmark = pytest.mark.filterwarnings("ignore::unicomp.kernels.backend.MissingKernelWarning")

SCHEMES = [
    Scheme(4, 16),
    Scheme(4, 32, symmetric=False),
    Scheme(2, -1),
    Scheme(3, 20),
    Scheme(8, -1, symmetric=False),
    Scheme(4, 400),
]


def quantized(
    scheme: Scheme, rows: int = 35, columns: int = 72, dtype: torch.dtype = torch.float16
) -> PackedTensor:
    low, high = scheme.code_range
    grid = (rows, scheme.groups(columns))
    codes = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8)
    zero = None
    if not scheme.symmetric:
        zero = torch.randint(low, high + 1, grid, dtype=torch.int8)
    return PackedTensor(codes, (torch.rand(grid) * 0.1 + 0.01).to(dtype), zero, scheme)


def close(got: Tensor, wanted: Tensor, limit: float) -> bool:
    """Tell whether outputs are equal to a part of their norm."""
    return bool((got.float() - wanted.float()).norm() <= limit * wanted.float().norm())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_the_dense_layer(scheme: Scheme, with_bias: bool) -> None:
    packed = quantized(scheme)
    bias = torch.randn(35) if with_bias else None
    x = torch.randn(2, 5, 72)
    dense = nn.functional.linear(x, packed.dequantize(), bias)
    exact = PackedLinear.from_packed(packed, bias, compute="exact")
    rounded = PackedLinear.from_packed(packed, bias)
    assert close(exact(x), dense, 1e-6)
    assert close(rounded(x), dense, 1e-2)
    assert not close(rounded(x), dense, 1e-6)
    assert not close(exact(x), 1.001 * dense, 1e-6)  # the comparer can fail
    assert torch.equal(exact.dequantize(), packed.dequantize())


def test_three_values_are_packed_five_to_a_byte() -> None:
    codes = torch.randint(-1, 2, (32, 320), dtype=torch.int8)
    packed = PackedTensor(codes, torch.rand(32, 1), None, Scheme(2, -1))
    ternary = PackedLinear.from_packed(packed, compute="exact")
    assert ternary.kind == "trit5"
    assert torch.equal(ternary.dequantize(), packed.dequantize())
    codes[3, 4] = -2
    plain = PackedLinear.from_packed(packed, compute="exact")
    assert plain.kind == "int2"
    assert ternary.packed.numel() < plain.packed.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes_leave_the_panels_alone(dtype: torch.dtype) -> None:
    packed = quantized(SCHEMES[0])
    layer = PackedLinear.from_packed(packed, torch.randn(35), compute="exact")
    before = layer.packed.clone()
    layer = layer.to(dtype)
    x = torch.randn(3, 72).to(dtype)
    product = layer(x)
    assert product.dtype == dtype
    assert layer.bias is not None
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.packed, before)
    assert torch.equal(layer.dequantize(), packed.dequantize())
    wanted = nn.functional.linear(x.float(), packed.dequantize(), layer.bias.float())
    assert close(product, wanted, {torch.float32: 1e-6, torch.bfloat16: 5e-3}.get(dtype, 1e-3))


def clones(layer: PackedLinear) -> dict[str, PackedLinear]:
    """Return the layer after every way in which it can be carried."""
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    states = io.BytesIO()
    torch.save(layer.state_dict(), states)
    states.seek(0)
    other = PackedLinear.from_packed(quantized(layer.scheme), torch.zeros(35))
    other.load_state_dict(torch.load(states, weights_only=True))
    assigned = PackedLinear.from_packed(quantized(layer.scheme), torch.zeros(35))
    assigned.load_state_dict(load(save(layer.state_dict())), assign=True)
    return {
        "deepcopy": copy.deepcopy(layer),
        "pickle": pickle.loads(pickle.dumps(layer)),
        "torch.save": torch.load(file, weights_only=False),
        "state_dict": other,
        "assigned": assigned,
    }


@pytest.mark.parametrize("scheme", SCHEMES[:3], ids=str)
def test_carried_layers_compute_the_same(scheme: Scheme) -> None:
    layer = PackedLinear.from_packed(quantized(scheme), torch.randn(35))
    x = torch.randn(4, 72)
    for way, clone in clones(layer).items():
        assert torch.equal(clone(x), layer(x)), way
        assert clone.packed.data_ptr() != layer.packed.data_ptr(), way
    assert not torch.equal(PackedLinear.from_packed(quantized(scheme))(x), layer(x))


def test_carried_layers_of_whole_pages_keep_their_bytes() -> None:
    """Panels of several MB, which lie at an offset in memory of their own."""
    layer = PackedLinear.from_packed(quantized(Scheme(8, -1), 3200, 1600))
    assert layer.packed.numel() > 2 * (2 << 20)
    x = torch.randn(2, 1600)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(x), layer(x))


def test_the_state_of_another_weight_is_refused() -> None:
    layer = PackedLinear.from_packed(quantized(Scheme(4, 16)))
    other = PackedLinear.from_packed(quantized(Scheme(3, 16)))
    assert layer.packed.shape == other.packed.shape
    with pytest.raises(UnicompError, match="'bits': 3"):
        layer.load_state_dict(other.state_dict())


def _product(layer: PackedLinear, x: Tensor) -> Any:
    return layer(x).numpy()


def test_a_worker_process_can_compute() -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    layer, x = PackedLinear.from_packed(quantized(SCHEMES[0])), torch.randn(2, 72)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = pool.submit(nn.Module.__call__, layer, x).result()
    assert torch.equal(found, layer(x))


def test_no_grad_inference_mode_and_gradients() -> None:
    packed = quantized(SCHEMES[1])
    layer = PackedLinear.from_packed(packed, compute="exact")
    x = torch.randn(3, 72)
    with torch.no_grad():
        quiet = layer(x)
    with torch.inference_mode():
        inferred = layer(x)
    assert torch.equal(quiet, inferred)
    x.requires_grad_()
    product = layer(x)
    assert torch.equal(product, quiet)
    product.sum().backward()
    assert x.grad is not None
    assert close(x.grad, packed.dequantize().sum(0).expand(3, -1), 1e-5)


@pytest.mark.parametrize("compute", ["int8", "exact"])
def test_compiles_whole(compute: Any) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = PackedLinear.from_packed(quantized(Scheme(4, 16), 96, 72), compute=compute)
            self.down = PackedLinear.from_packed(
                quantized(Scheme(4, 32), 72, 96), torch.randn(72), compute=compute
            )

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    block, x = Block().eval(), torch.randn(2, 4, 72)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))
        torch.testing.assert_close(compiled(x[:, :3]), block(x[:, :3]))  # another shape


def test_says_what_it_is() -> None:
    layer = PackedLinear.from_packed(quantized(Scheme(4, 16, symmetric=False)))
    for word in ("bits=4", "group=16", "asymmetric", "kind=int4", f"bytes={layer.packed.numel()}"):
        assert word in repr(layer)
    assert "group=row" in repr(PackedLinear.from_packed(quantized(Scheme(8, -1))))


def test_unknown_words_are_refused() -> None:
    packed = quantized(SCHEMES[0])
    with pytest.raises(UnsupportedError, match="`fast`"):
        PackedLinear.from_packed(packed, compute="fast")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="`fpga`"):
        PackedLinear.from_packed(packed, backend="fpga")
    assert set(backend.BACKENDS["cpu"]) == {"cpu", "torch"}


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_dense_layer_of_bfloat16_computes_as_before(tokens: int) -> None:
    linear = nn.Linear(72, 35).to(torch.bfloat16).eval()
    layer, x = DenseLinear.of(linear), torch.randn(1, tokens, 72).bfloat16()
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    enabled = torch.backends.mkldnn.enabled
    assert close(layer(x), linear(x), torch.finfo(torch.bfloat16).eps)
    assert torch.backends.mkldnn.enabled == enabled
    with pytest.raises(RuntimeError):
        layer(torch.randn(1, 71).bfloat16())
    assert torch.backends.mkldnn.enabled == enabled
    clone = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(clone(x), layer(x))

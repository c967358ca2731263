"""GPTQModel's own unpacker reads what we pack, where GPTQModel is installed.

It asks for versions of torch and more that are not ours, so it is no dependency of the tests; in an
environment of its own, beside ours on the path: `pip install --no-deps gptqmodel` and what its
import asks for (seen with 7.7.0).
"""

import pytest
import torch

from unicomp.kernels.formats.gptq import Gptq
from unicomp.kernels.packed import PackedTensor, Scheme

torch_linear = pytest.importorskip(
    "gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed"
)
model = pytest.importorskip("gptqmodel.utils.model")

CASES = [(bits, size, True, bits == 3) for bits in (2, 3, 4, 8) for size in (-1, 32, 128)]
CASES += [(bits, size, False, True) for bits in (2, 3, 4, 8) for size in (-1, 32)]
WIDE, HIGH = 512, 256


@pytest.mark.parametrize(("bits", "size", "symmetric", "v2"), CASES)
def test_its_weight_is_ours(bits: int, size: int, symmetric: bool, v2: bool) -> None:
    scheme = Scheme(bits, size, symmetric)
    draw = torch.Generator().manual_seed(bits)
    low, high = scheme.code_range
    grid = (HIGH, scheme.groups(WIDE))
    codes = torch.randint(low, high + 1, (HIGH, WIDE), dtype=torch.int8, generator=draw)
    zero = torch.randint(low, high + 1, grid, dtype=torch.int8, generator=draw)
    scale = (torch.rand(grid, generator=draw) + 0.1).half()
    packed = PackedTensor(codes, scale, None if symmetric else zero, scheme)

    theirs = torch_linear.TorchLinear(
        bits=bits,
        group_size=size,
        sym=symmetric,
        desc_act=False,
        in_features=WIDE,
        out_features=HIGH,
        bias=False,
    )
    for name, tensor in Gptq(v2=v2).pack("m", packed).items():
        own = getattr(theirs, name.removeprefix("m."))
        assert (own.shape, own.dtype) == (tensor.shape, tensor.dtype)
        own.copy_(tensor)
    if not v2:
        model.convert_gptq_v1_to_v2_format_module(theirs, bits=bits, pack_dtype=torch.int32)
    theirs.post_init()
    weight = theirs.dequantize_weight().T.float()
    ours = packed.dequantize()
    assert torch.equal(weight, ours.half().float())
    theirs.qzeros += 1  # the other version's zero points are seen
    assert not torch.equal(theirs.dequantize_weight().T.float(), weight)

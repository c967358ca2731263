"""Every instruction set gives the bits of the definition: any shape, dtype, number of tokens.

The integer dot products are compared through the float32 outputs, bit for bit: the float tail has
one order, which is that of `blocked.linear`.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar, get_args

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from unicomp.errors import UnsupportedError
from unicomp.kernels import blocked, cpu
from unicomp.kernels.blocked import Blocked, Kind
from unicomp.kernels.packed import PackedTensor, Scheme

pytestmark = pytest.mark.skipif(not cpu.available(), reason=str(cpu.reason()))

T = TypeVar("T")
KINDS: tuple[Kind, ...] = get_args(Kind)
CODES: dict[Kind, tuple[int, int, int]] = {  # bits, least, greatest
    "int8": (8, -128, 127),
    "int4": (4, -8, 7),
    "int2": (2, -2, 1),
    "trit5": (2, -1, 1),
    "bit1": (2, -1, 1),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ISAS = cpu.usable()


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Put the instruction set and the threads back."""
    before = cpu.isa()
    cpu.set_threads(1)
    yield
    cpu.use(before)
    cpu.set_threads(None)


class Draw:
    """Random weights and activations of one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def among(self, *values: T) -> T:
        return values[self.number(0, len(values) - 1)]

    def number(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int8)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def weight(
        self,
        kind: Kind,
        rows: int,
        columns: int,
        group: int,
        *,
        symmetric: bool = True,
        scale_dtype: torch.dtype = torch.float32,
    ) -> PackedTensor:
        bits, low, high = CODES[kind]
        scheme = Scheme(bits, group, symmetric)
        groups = scheme.groups(columns)
        scale = (self.normal(rows, groups).abs() + 0.01).to(scale_dtype)
        zero = None if symmetric else self.integers(low, high, rows, groups)
        codes = self.integers(low, high, rows, columns)
        if kind == "bit1":
            codes = torch.where(codes == 0, 1, codes)
        return PackedTensor(codes, scale, zero, scheme)

    def any_weight(self, kind: Kind) -> PackedTensor:
        return self.weight(
            kind,
            self.number(1, 70),
            self.number(1, 700),
            self.among(32, 64, 128, 256, -1, 7),
            symmetric=self.among(True, False),
            scale_dtype=self.among(*DTYPES),
        )


def same_bits(found: Tensor, wanted: Tensor) -> None:
    """Raise unless two tensors are the same, bit for bit; NaN equals NaN."""
    assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(40))
def test_every_isa_gives_the_bits_of_the_definition(kind: Kind, seed: int) -> None:
    draw = Draw(seed)
    packed = draw.any_weight(kind)
    weight = cpu.block(packed, kind)
    tokens = draw.among(1, 2, 3, 4, 5, 8, 11, 16, 17, 31, 64, 130)
    x = draw.normal(tokens, weight.shape[1], dtype=draw.among(*DTYPES))
    bias = draw.among(None, draw.normal(weight.shape[0]))
    if bias is None:
        wanted = blocked.linear(x, weight)
    else:
        wanted = (blocked.linear(x.float(), weight) + bias).to(x.dtype)
    for isa in ISAS:
        cpu.use(isa)
        same_bits(cpu.linear(x, weight, bias), wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(20))
def test_exact_products_are_near_and_the_same_everywhere(kind: Kind, seed: int) -> None:
    draw = Draw(1000 + seed)
    packed = draw.any_weight(kind)
    weight = cpu.block(packed, kind)
    x = draw.normal(draw.among(1, 2, 3, 5, 16, 33), weight.shape[1], dtype=draw.among(*DTYPES))
    cpu.use("scalar")
    first = cpu.linear(x, weight, compute="exact")
    for isa in ISAS:
        cpu.use(isa)
        same_bits(cpu.linear(x, weight, compute="exact"), first)
    wide = cpu.linear(x.float(), weight, compute="exact").double()
    values, terms = packed.dequantize().double(), x.double()
    # 1e-5 of what is summed: cancellation may leave a sum near zero.
    bound = 1e-5 * (terms.abs() @ values.abs().T)
    assert ((wide - terms @ values.T).abs() <= bound).all()
    assert ((wide - blocked.linear(x.float(), weight, compute="exact")).abs() <= bound).all()
    assert first.dtype == x.dtype
    assert torch.equal(first, wide.float().to(x.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_dots_are_within_a_hundred_thousandth_of_float64(kind: Kind) -> None:
    draw = Draw(7)
    packed = draw.weight(kind, 48, 640, 128, symmetric=False)
    weight = cpu.block(packed, kind)
    x = draw.normal(9, 640)
    codes, scales = blocked.quantize_activations(x, weight)
    rounded = (codes.double().view(9, 5, 128) * scales.double()[:, :, None]).view(9, 640)
    values = packed.dequantize().double()
    bound = 1e-5 * (rounded.abs() @ values.abs().T)
    for isa in ISAS:
        cpu.use(isa)
        assert ((cpu.linear(x, weight).double() - rounded @ values.T).abs() <= bound).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_byte_shows(kind: Kind, isa: str) -> None:
    draw = Draw(3)
    weight = cpu.block(draw.weight(kind, 32, 160, 32), kind)
    x = draw.normal(3, 160)
    wanted = blocked.linear(x, weight)
    cpu.use(isa)
    data = weight.data.clone()
    # The third line's fourth byte, behind the scales of four groups.
    data[blocked.header_bytes(4, weight.scheme, weight.scale_dtype) + 131] ^= 1
    changed = cpu.linear(x, replace(weight, data=data))
    with pytest.raises(AssertionError):
        same_bits(changed, wanted)
    same_bits(cpu.linear(x, weight), wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [-1, 16384])
@pytest.mark.parametrize("sign", [1, -1])
def test_no_sum_overflows(kind: Kind, isa: str, group: int, sign: int) -> None:
    bits, low, high = CODES[kind]
    most = float(sign * blocked.GREATEST[kind])
    columns = 16384
    cpu.use(isa)
    for code, zero in ((high, low), (low, high), (high, 0), (low, 0)):
        scheme = Scheme(bits, group, symmetric=False)
        codes = torch.full((16, columns), code, dtype=torch.int8)
        zeros = torch.full((16, 1), zero, dtype=torch.int8)
        weight = cpu.block(PackedTensor(codes, torch.ones(16, 1), zeros, scheme), kind)
        for tokens in (1, 2, 5, 16, 24):
            x = torch.full((tokens, columns), most)
            wanted = torch.full((tokens, 16), most * columns * (code - zero))
            same_bits(cpu.linear(x, weight), wanted)
            same_bits(cpu.linear(x, weight), blocked.linear(x, weight))


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_greatest_activation_and_any_digit_are_a_byte(kind: Kind) -> None:
    _, low, high = CODES[kind]
    most, offset = blocked.GREATEST[kind], blocked.offset_of(kind)
    room = 128 - most
    assert 2 * most + high + offset <= 255
    assert -most - room + low + offset >= -128
    assert most - room + high + offset <= 127


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [-1, 128])
def test_extreme_values_side_by_side_keep_the_definition(kind: Kind, group: int) -> None:
    draw = Draw(17)
    _, low, high = CODES[kind]
    packed = draw.weight(kind, 50, 900, group, symmetric=False)
    packed.codes[:] = torch.where(packed.codes < 0, low, high)
    weight = cpu.block(packed, kind)
    x = draw.integers(-1, 1, 41, 900).float()
    wanted = blocked.linear(x, weight)
    for isa in ISAS:
        cpu.use(isa)
        same_bits(cpu.linear(x, weight), wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows(isa: str, dtype: torch.dtype, wrong: float) -> None:
    draw = Draw(11)
    weight = cpu.block(draw.weight("int4", 40, 200, 64), "int4")
    x = draw.normal(6, 200, dtype=dtype)
    x[2, 70] = wrong
    x[4] = 0
    cpu.use(isa)
    found = cpu.linear(x, weight)
    assert not found[2].isfinite().any()
    assert found[[0, 1, 3, 4, 5]].isfinite().all()
    assert (found[4] == 0).all()
    same_bits(found, blocked.linear(x, weight))
    exact = cpu.linear(x, weight, compute="exact")
    assert exact[[0, 1, 3, 4, 5]].isfinite().all()
    assert not exact[2].isfinite().any() or not torch.tensor(wrong).isnan()


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_magnitudes_keep_the_definition(isa: str) -> None:
    draw = Draw(12)
    weight = cpu.block(draw.weight("int8", 20, 96, 32), "int8")
    cpu.use(isa)
    for factor in (1e-45, 1e-40, 1e-38, 1e30, 3e38):
        x = draw.normal(5, 96).clamp(-1, 1) * factor
        same_bits(cpu.linear(x, weight), blocked.linear(x, weight))
    ties = torch.arange(-127, 129).float()[:96].repeat(2, 1) / 2
    ties[:, 0] = 127
    same_bits(cpu.linear(ties, weight), blocked.linear(ties, weight))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_and_written_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    # One column, one code of 1 and a scale of 1, exact: what comes out is what went in.
    scheme = Scheme(8, -1)
    one = PackedTensor(torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1), None, scheme)
    weight = cpu.block(one, "int8")
    x = torch.arange(-32768, 32768).to(torch.int16).view(dtype)[:, None]
    cpu.use(isa)
    found = cpu.linear(x, weight, compute="exact")
    same_bits(found, x)
    halves = Draw(5).normal(20000, 1) * torch.logspace(-9, 6, 20000)[:, None]
    third = PackedTensor(one.codes, torch.full((1, 1), 1 / 3), None, scheme)
    weight = cpu.block(third, "int8")
    wanted = cpu.linear(halves.to(dtype).float(), weight, compute="exact").to(dtype)
    same_bits(cpu.linear(halves.to(dtype), weight, compute="exact"), wanted)


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_on_any_address_and_stride(isa: str) -> None:
    draw = Draw(13)
    weight = cpu.block(draw.weight("int4", 33, 150, 32), "int4")
    wide = draw.normal(7, 301)
    cpu.use(isa)
    for x in (wide[:, :150], wide[:, 1:151], wide[::2, 150:300], draw.normal(150, 7).T):
        same_bits(cpu.linear(x, weight), blocked.linear(x, weight))
    for dtype in DTYPES:
        flat = draw.normal(5 * 150 + 3, dtype=dtype)
        x = flat[3:].view(5, 150)
        same_bits(cpu.linear(x, weight), blocked.linear(x, weight))
    odd = torch.empty(weight.data.numel() + 1, dtype=torch.uint8)[1:].copy_(weight.data)
    x = draw.normal(5, 150)
    for tokens in (1, 5):
        same_bits(cpu.linear(x[:tokens], replace(weight, data=odd)), cpu.linear(x[:tokens], weight))
    cube = draw.normal(2, 3, 150)
    assert cpu.linear(cube, weight).shape == (2, 3, 33)
    assert cpu.linear(cube[:0], weight).shape == (0, 3, 33)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("compute", ["int8", "exact"])
def test_bits_depend_neither_on_threads_nor_on_other_tokens(
    isa: str, compute: blocked.Compute
) -> None:
    draw = Draw(14)
    cpu.use(isa)
    for kind in KINDS:
        weight = cpu.block(draw.weight(kind, 300, 1100, 128), kind)
        x = draw.normal(50, 1100)
        first = cpu.linear(x, weight, compute=compute)
        for count in (2, 3):
            cpu.set_threads(count)
            same_bits(cpu.linear(x, weight, compute=compute), first)
            same_bits(cpu.linear(x[7:8], weight, compute=compute), first[7:8])
        cpu.set_threads(1)
        same_bits(cpu.linear(x[20:23], weight, compute=compute), first[20:23])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(15))
def test_blocking_in_c_is_blocking_in_torch(kind: Kind, seed: int) -> None:
    packed = Draw(2000 + seed).any_weight(kind)
    wanted = blocked.block(packed, kind)
    cpu.set_threads(1 + seed % 2)
    found = cpu.block(packed, kind)
    assert torch.equal(found.data, wanted.data)
    back = blocked.unblock(found)
    assert torch.equal(back.codes, packed.codes)
    out = torch.full((wanted.data.numel(),), 255, dtype=torch.uint8)
    assert cpu.block(packed, kind, out).data is out
    assert torch.equal(out, wanted.data)


def test_codes_that_do_not_fit_are_refused() -> None:
    packed = Draw(1).weight("int8", 20, 40, 32)
    for kind in KINDS[1:]:
        with pytest.raises(ValueError, match="do not fit"):
            cpu.block(packed, kind)
    packed = Draw(1).weight("int4", 20, 40, 32, symmetric=False)
    assert packed.zero_point is not None
    packed.zero_point[3, 1] = 9
    with pytest.raises(ValueError, match="do not fit"):
        cpu.block(packed, "int4")
    with pytest.raises(ValueError, match="zero points"):
        cpu.block(replace(packed, zero_point=None), "int4")
    ternary = Draw(1).weight("trit5", 20, 40, 32)
    for block in (cpu.block, blocked.block):
        with pytest.raises(ValueError, match="do not fit"):
            block(ternary, "bit1")
    fine = Draw(1).weight("int4", 20, 40, 32)
    with pytest.raises(ValueError, match="bytes of panels cannot hold"):
        cpu.block(fine, "int4", torch.empty(64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="does not have the bytes"):
        cpu.block(fine, "int4", torch.empty(1024, dtype=torch.uint8))


def test_sizes_that_lie_are_refused() -> None:
    weight = cpu.block(Draw(1).weight("int4", 40, 200, 64), "int4")
    x = torch.ones(2, 200)
    lies: list[Blocked] = [
        replace(weight, data=weight.data[:-1]),
        replace(weight, data=weight.data[: -weight.panel_bytes]),
        replace(weight, data=torch.cat((weight.data, weight.data))),
        replace(weight, shape=(64, 200)),
        replace(weight, shape=(40 + 2**33, 200)),
        replace(weight, shape=(0, 200)),
        replace(weight, shape=(-16, 200)),
        replace(weight, kind="int8"),
        replace(weight, kind="int2"),
        replace(weight, scheme=Scheme(4, 32)),
        replace(weight, scheme=Scheme(4, 0)),
        replace(weight, scheme=Scheme(4, -2)),
        replace(weight, scheme=Scheme(4, 64, symmetric=False)),
        replace(weight, scale_dtype=torch.bfloat16),
    ]
    for lie in lies:
        with pytest.raises(ValueError, match=r"bytes|between|group"):
            cpu.linear(x, lie)
    with pytest.raises(ValueError, match="bytes"):
        cpu.linear(torch.ones(2, 600), replace(weight, shape=(40, 600)))
    with pytest.raises(ValueError, match="201 features"):
        cpu.linear(torch.ones(2, 201), weight)
    with pytest.raises(ValueError, match="bias"):
        cpu.linear(x, weight, torch.ones(41))
    with pytest.raises(ValueError, match="panels must be"):
        cpu.linear(x, replace(weight, data=weight.data.repeat(2)[::2]))
    with pytest.raises(UnsupportedError, match="float64"):
        cpu.linear(x.double(), weight)
    with pytest.raises(UnsupportedError, match="16385 columns"):
        cpu.linear(x, replace(weight, scheme=Scheme(4, 16385)))
    with pytest.raises(ValueError, match="no such compute"):
        cpu.linear(x, weight, compute="int16")  # type: ignore[arg-type]


def test_choosing_what_is_not_there_is_an_error() -> None:
    assert cpu.usable()[-1] == "scalar"
    with pytest.raises(UnsupportedError, match="no such instruction set: `mmx`") as caught:
        cpu.use("mmx")
    assert "`scalar`" in str(caught.value.hint)
    for name in {"amx", "avx512vnni", "avx2", "neon_dotprod"} - set(cpu.usable()):
        with pytest.raises(UnsupportedError, match=f"(cannot run|no such).* `{name}`"):
            cpu.use(name)
    with pytest.raises(UnsupportedError, match="threads: 0"):
        cpu.set_threads(0)
    for name in cpu.usable():
        cpu.use(name)
        assert cpu.isa() == name


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("UNICOMP_ISA", "scalar", "scalar"),
        ("UNICOMP_ISA", "mmx", "no such instruction set: `mmx`"),
        ("UNICOMP_NUM_THREADS", "3", "3"),
        ("UNICOMP_NUM_THREADS", "0", "UNICOMP_NUM_THREADS: `0`"),
        ("UNICOMP_NUM_THREADS", "two", "UNICOMP_NUM_THREADS: `two`"),
    ],
)
def test_the_environment_chooses(variable: str, value: str, said: str) -> None:
    code = (
        "from unicomp.errors import UnsupportedError\nfrom unicomp.kernels import cpu\n"
        "try:\n    print(cpu.isa(), cpu.threads())\nexcept UnsupportedError as e:\n    print(e)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {variable: value},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert said in answer.stdout, answer.stderr


def test_without_the_extension_the_reason_is_said() -> None:
    code = (
        "import sys\nsys.modules['unicomp.kernels._cpu'] = None\n"
        "from unicomp.errors import UnsupportedError\nfrom unicomp.kernels import cpu\n"
        "assert not cpu.available() and cpu.usable() == ()\n"
        "try:\n    cpu.isa()\nexcept UnsupportedError as e:\n    print(e, '/', e.hint)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert "is not built" in answer.stdout, answer.stderr
    assert "compiler" in answer.stdout


def _in_child(
    queue: "multiprocessing.SimpleQueue[list[float]]", weight: Blocked, x: Tensor
) -> None:
    queue.put(cpu.linear(x, weight).flatten().tolist())


@pytest.fixture(params=[1, 2])
def of_torch(request: pytest.FixtureRequest) -> Iterator[int]:
    """Give torch this many threads; with as many as products want, they share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads where Linux shows them")
def test_products_compute_on_the_threads_of_torch() -> None:
    code = (
        "import os, torch\nfrom unicomp.kernels import cpu\n"
        "from unicomp.kernels.packed import PackedTensor, Scheme\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "torch.set_num_threads(2)\n"
        "codes, scale = torch.ones(2000, 512, dtype=torch.int8), torch.ones(2000, 4)\n"
        "weight = cpu.block(PackedTensor(codes, scale, None, Scheme(4, 128)), 'int4')\n"
        "x = torch.ones(4, 512)\n"
        "torch.ones(1 << 20).add(1)\n"
        "before = count()\n"
        "shared = cpu.linear(x, weight)\n"
        "print(count() - before)\n"
        "cpu.set_threads(4)\n"
        "own = cpu.linear(x, weight)\n"
        "print(count() - before, torch.equal(own, shared), bool((own == 512).all()))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60
    )
    assert answer.stdout.splitlines() == ["0", "3 True True"], answer.stderr


def test_a_fork_starts_threads_of_its_own(of_torch: int) -> None:
    draw = Draw(15)
    weight = cpu.block(draw.weight("int4", 2000, 512, 128), "int4")
    x = draw.normal(1, 512)
    cpu.set_threads(2)
    wanted = cpu.linear(x, weight).flatten().tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(queue, weight, x))
    child.start()
    assert queue.get() == wanted
    child.join(30)
    assert child.exitcode == 0
    assert cpu.linear(x, weight).flatten().tolist() == wanted


def test_products_beside_each_other(of_torch: int) -> None:
    draw = Draw(16)
    weight = cpu.block(draw.weight("int4", 1000, 512, 128), "int4")
    x = draw.normal(3, 512)
    cpu.set_threads(2)
    wanted = cpu.linear(x, weight)
    wrong: list[int] = []

    def many() -> None:
        torch.set_num_threads(of_torch)
        for turn in range(200):
            if not torch.equal(cpu.linear(x, weight), wanted):
                wrong.append(turn)

    runners = [threading.Thread(target=many) for _ in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not wrong


@pytest.mark.parametrize("count", [0, 64, cpu.HUGE_PAGE - 1, cpu.HUGE_PAGE, 3 * cpu.HUGE_PAGE + 5])
def test_memory_is_aligned_and_whole(count: int) -> None:
    memory = cpu.allocate(count)
    assert memory.shape == (count,)
    assert memory.dtype == torch.uint8
    memory.fill_(7)
    assert int(memory.long().sum()) == 7 * count
    assert memory.data_ptr() % (cpu.HUGE_PAGE if count >= cpu.HUGE_PAGE else 64) == 0 or count == 0

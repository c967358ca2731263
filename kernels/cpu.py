"""The door to the C kernels: what a user can get wrong is checked here, sizes once more in C.

`linear` computes what `blocked.linear` defines, from the same panels, with the best instruction set
that the processor and the system allow. `UNICOMP_ISA` chooses one by name, `UNICOMP_NUM_THREADS`
the number of threads; both are read at first use. Without the extension (no compiler at install)
`available` is false, `reason` says why, and products raise `UnsupportedError`.

Why panels, pool and kernels are as they are: `docs/decisions/003-cpu-kernels.md`.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from functools import cache
from pathlib import Path
from threading import local
from typing import TYPE_CHECKING

from unicomp.errors import UnsupportedError
from unicomp.kernels.blocked import Blocked, Compute, Kind, blocked_bytes
from unicomp.kernels.packed import PackedTensor
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

_missing: str | None = None
try:
    from unicomp.kernels import _cpu
except ImportError as error:
    _missing = str(error)

# As in csrc/layout.h.
_KINDS: dict[Kind, int] = {"int8": 0, "int4": 1, "int2": 2, "trit5": 3, "bit1": 4}
SPAN_MAX = 16384  # columns for which 32-bit sums cannot overflow
THREADS_MAX = 256
HUGE_PAGE = 2 << 20

_threads: int | None = None  # what `set_threads` was told
_taken = local()  # `count`: torch's threads before `take_cores`, in a thread of Python


@cache
def dtypes() -> dict[torch.dtype, int]:
    """Return the dtypes of activations, scales and norms -> their numbers in csrc/layout.h."""
    return {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def reason() -> str | None:
    """Return why there are no kernels here, or None where there are."""
    if _missing is None:
        return None
    return f"the C extension is not built for this Python: {_missing}"


def available() -> bool:
    """Tell whether the extension is here; `linear` then runs on some instruction set."""
    return _missing is None


def usable() -> tuple[str, ...]:
    """Return the names of the instruction sets that this machine can run, best first."""
    return _cpu.usable() if available() else ()


def isa() -> str:
    """Return the name of the instruction set in use.

    Raises UnsupportedError where there are no kernels, or `UNICOMP_ISA` cannot be had.
    """
    _require()
    return _cpu.isa()


def use(name: str) -> None:
    """Choose an instruction set by name for the whole process.

    Raises UnsupportedError where this machine lacks it.
    """
    _require()
    _choose(name)


def set_threads(count: int | None) -> None:
    """Use this many threads from now on; None: `UNICOMP_NUM_THREADS`, else as many as torch."""
    global _threads
    if count is not None and not 1 <= count <= THREADS_MAX:
        raise UnsupportedError(
            f"threads: {count}", hint=f"use a number between 1 and {THREADS_MAX}"
        )
    _threads = count


def threads() -> int:
    """Return how many threads a product uses."""
    if _threads is not None:
        return _threads
    of_torch = getattr(_taken, "count", None) or torch.get_num_threads()
    return _threads_of_environment() or min(of_torch, THREADS_MAX)


def take_cores() -> None:
    """Leave torch one thread, and products as many as before, until `return_cores`.

    torch's threads spin after each operator, and so do those of products: on as many cores, one
    waits for the other. In a step of one token torch has little to share. It holds for the thread
    of Python that calls; one that uses torch for the first time meanwhile starts with one thread.
    """
    if getattr(_taken, "count", None) is None and torch.get_num_threads() > 1:
        _taken.count = torch.get_num_threads()
        torch.set_num_threads(1)


def return_cores() -> bool:
    """Give torch its threads back; return whether they were taken."""
    count = getattr(_taken, "count", None)
    if count is not None:
        _taken.count = None
        torch.set_num_threads(count)
    return count is not None


def linear(
    x: Tensor, weight: Blocked, bias: Tensor | None = None, *, compute: Compute = "int8"
) -> Tensor:
    """Multiply activations with a weight in panels; see `blocked.linear`.

    x        float32, float16 or bfloat16 [..., in] on the CPU; made contiguous where it is not
    bias     float32 [out], added in float32 at the end
    returns  [..., out] in the dtype of x

    `int8` gives the bits of `blocked.linear`; `exact` sums float32 products in another order. The
    bits depend neither on the instruction set, nor on the threads, nor on the other tokens.

    Raises UnsupportedError for a dtype, device or group size without kernels, and ValueError where
    shapes do not agree or the panels do not have the bytes that their sizes say.
    """
    _require()
    dtype = dtypes().get(x.dtype)
    if dtype is None or not x.is_cpu:
        raise UnsupportedError(
            f"activations are {x.dtype} on `{x.device}`",
            hint="the kernels take float32, float16 and bfloat16 on the CPU",
        )
    rows, columns = weight.shape
    if x.shape[-1] != columns:
        raise ValueError(f"input has {x.shape[-1]} features, the weight takes {columns}")
    _check_weight(weight)
    if compute not in ("int8", "exact"):
        raise ValueError(f"no such compute: {compute!r}")
    x = x.contiguous()
    if bias is not None:
        if bias.shape != (rows,) or bias.dtype != torch.float32 or not bias.is_cpu:
            raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, not float32 ({rows},)")
        bias = bias.contiguous()
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    width = x.dtype.itemsize
    _cpu.linear(
        x.data_ptr(),
        x.numel() * width,
        weight.data.data_ptr(),
        weight.data.numel(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else bias.numel() * 4,
        out.data_ptr(),
        out.numel() * width,
        x.numel() // columns,
        dtype,
        _KINDS[weight.kind],
        rows,
        columns,
        weight.scheme.group_size,
        weight.scheme.symmetric,
        dtypes()[weight.scale_dtype],
        compute == "exact",
        threads(),
    )
    return out


def block(tensor: PackedTensor, kind: Kind, out: Tensor | None = None) -> Blocked:
    """Lay a quantized weight out in panels, as `blocked.block` does, but in C.

    out  where to, uint8 of the right size; default: new memory on huge pages

    Raises ValueError where codes or zero points do not fit the kind, or `out` has another size.
    """
    _require()
    rows, columns = (int(size) for size in tensor.codes.shape)
    scheme, scale, zeros = tensor.scheme, tensor.scale.contiguous(), tensor.zero_point
    if scale.dtype not in dtypes():
        raise UnsupportedError(f"scales are {scale.dtype}", hint="use 16-bit floats or float32")
    if (zeros is None) != scheme.symmetric:
        raise ValueError("a weight has zero points where it is asymmetric, and only there")
    if zeros is not None:
        zeros = zeros.contiguous()
    codes = tensor.codes.contiguous()
    parts = (codes, scale) if zeros is None else (codes, scale, zeros)
    if any(not part.is_cpu for part in parts):
        raise ValueError("codes, scales and zero points must lie on the CPU")
    if codes.dtype != torch.int8 or (zeros is not None and zeros.dtype != torch.int8):
        raise ValueError("codes and zero points must be int8")
    size = blocked_bytes(kind, (rows, columns), scheme, scale.dtype)
    data = allocate(size) if out is None else out
    weight = Blocked(data, kind, (rows, columns), scheme, scale.dtype)
    _check_weight(weight)
    _cpu.block(
        codes.data_ptr(),
        codes.numel(),
        scale.data_ptr(),
        scale.numel() * scale.dtype.itemsize,
        0 if zeros is None else zeros.data_ptr(),
        0 if zeros is None else zeros.numel(),
        data.data_ptr(),
        data.numel(),
        _KINDS[kind],
        rows,
        columns,
        scheme.group_size,
        scheme.symmetric,
        dtypes()[scale.dtype],
        threads(),
    )
    return weight


def allocate(count: int) -> Tensor:
    """Return uint8 [count], its bytes undefined, on huge pages where the system has them.

    Weights are read once a token, at the speed of memory: with pages of 4 KB a good part of that
    time goes into looking pages up. From 2 MB on, memory is mapped on its own, begins on 2 MB and
    is returned to the system with the tensor; below, torch allocates. A last page that is less than
    half full is made of small ones: it would cost up to 2 MB.
    """
    if count < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=torch.uint8)
    room = -(-count // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE  # the last page whole, and to align
    memory = mmap.mmap(-1, room, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    huge = (count + HUGE_PAGE // 2) // HUGE_PAGE * HUGE_PAGE
    with suppress(OSError):  # a kernel without huge pages: the same memory, read more slowly
        memory.madvise(mmap.MADV_HUGEPAGE, start, huge)
    return whole[start : start + count]


def _require() -> None:
    """Raise where there are no kernels; at first use, choose what `UNICOMP_ISA` names."""
    if _missing is not None:
        raise UnsupportedError(
            f"no kernels for the CPU: {reason()}",
            hint="reinstall where there is a C compiler, or multiply with `blocked.linear`",
        )
    _isa_of_environment()
    _share_threads()


@cache
def _share_threads() -> None:
    """Let products compute on torch's own threads where they want as many as torch has.

    After each of its operators they spin for milliseconds, and threads of our own would wait for a
    core meanwhile: a product after an operator took 10.4 instead of 6.0 ms. Where torch is built
    otherwise than on Linux with OpenMP, products keep to their own threads.
    """
    with suppress(OSError, AttributeError):
        path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        library = ctypes.CDLL(str(path))  # loaded already; what it links to is found through it
        functions = (library.GOMP_parallel, library.omp_get_max_threads)
        start, size = (ctypes.cast(own, ctypes.c_void_p).value or 0 for own in functions)
        _cpu.share(start, size)


@cache
def _isa_of_environment() -> None:
    name = os.environ.get("UNICOMP_ISA")
    if name:
        _choose(name)


@cache
def _threads_of_environment() -> int | None:
    text = os.environ.get("UNICOMP_NUM_THREADS")
    if not text:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= THREADS_MAX:
        raise UnsupportedError(
            f"UNICOMP_NUM_THREADS: `{text}`", hint=f"use a number between 1 and {THREADS_MAX}"
        )
    return int(text)


def _choose(name: str) -> None:
    has = ", ".join(f"`{one}`" for one in _cpu.usable())
    if name not in _cpu.known():
        raise UnsupportedError(f"no such instruction set: `{name}`", hint=f"this machine has {has}")
    if name not in _cpu.usable():
        raise UnsupportedError(f"this machine cannot run `{name}`", hint=f"it has {has}")
    _cpu.use(name)


def _check_weight(weight: Blocked) -> None:
    """Raise where panels are not what C can read; that their sizes are true, C checks."""
    data = weight.data
    if data.dtype != torch.uint8 or not data.is_cpu or not data.is_contiguous():
        raise ValueError("panels must be contiguous uint8 on the CPU")
    if not 1 <= weight.shape[0] <= data.numel() // 4:  # 16 rows take 64 bytes or more
        raise ValueError(f"{data.numel()} bytes of panels cannot hold {weight.shape[0]} rows")
    if weight.scale_dtype not in dtypes():
        raise UnsupportedError(
            f"scales are {weight.scale_dtype}", hint="use 16-bit floats or float32"
        )
    if weight.span > SPAN_MAX:
        raise UnsupportedError(
            f"a group has {weight.span} columns", hint=f"the kernels take up to {SPAN_MAX}"
        )

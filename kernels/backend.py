"""Which implementation multiplies a packed weight on a device, best first, and the torch operator.

    cpu    the C extension behind `kernels/cpu.py`
    torch  the definition in `kernels/blocked.py`: always there, and slow

`UNICOMP_BACKEND` names one for a whole process; a caller's own word goes before it. Asking for what
is not there is an error. Where nobody asks and the kernel is missing, torch computes, and a
`MissingKernelWarning` says so once in a process.

In plain inference `multiply` calls an implementation directly. Under `torch.compile`, and where
gradients flow to the input, the same product is the operator `unicomp::packed_linear`, of tensors
and plain values: a dispatcher's few microseconds, which a decode step would pay in every linear.
"""

import os
import warnings
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any, cast, get_args

import torch
from torch import Tensor

from unicomp import suggest
from unicomp.errors import UnsupportedError
from unicomp.kernels import blocked
from unicomp.kernels.blocked import Blocked, Compute, Kind
from unicomp.kernels.packed import PackedTensor, Scheme

VARIABLE = "UNICOMP_BACKEND"
BACKENDS: Mapping[str, tuple[str, ...]] = {"cpu": ("cpu", "torch")}
"""Device type -> implementations, best first."""


class MissingKernelWarning(RuntimeWarning):
    """Packed weights are multiplied by torch, slowly, because there is no kernel."""


def choose(wanted: str | None = None, device: str = "cpu") -> str:
    """Return the name of the implementation to use.

    wanted  a name; None: that in `UNICOMP_BACKEND`, else the best there is, loudly if it is torch
    device  a torch device type

    Raises UnsupportedError for a device or a name that there is not, or a kernel that is missing.
    """
    if device not in BACKENDS:
        raise UnsupportedError(
            f"packed weights cannot be multiplied on device `{device}`",
            hint=f"there is {suggest.listed(BACKENDS)}; load the model dense for another",
        )
    there = BACKENDS[device]
    asked = wanted or os.environ.get(VARIABLE)
    reason = missing()
    if asked:
        if asked not in there:
            raise UnsupportedError(f"unknown backend `{asked}`", hint=suggest.hint(asked, there))
        if asked == "cpu" and reason is not None:
            raise UnsupportedError(
                f"there is no backend `cpu`: {reason}", hint="use `torch`, which is slow"
            )
        return asked
    if reason is None:
        return there[0]
    _warn_once(reason)
    return "torch"


def missing() -> str | None:
    """Say why there is no C extension; None where there is one."""
    return _door()[1]


def isa(backend: str) -> str | None:
    """Return the instruction set that an implementation runs on, as the C extension names it."""
    return str(_door()[0].isa()) if backend == "cpu" else None


def set_threads(count: int | None) -> None:
    """Let the C extension, where there is one, use this many threads; None: as it chooses."""
    door, _ = _door()
    if door is not None:
        door.set_threads(count)


def take_cores() -> None:
    """Leave torch one thread in a short step, where the C extension computes the rest."""
    door, _ = _door()
    if door is not None:
        door.take_cores()


def return_cores() -> bool:
    """Undo `take_cores`; return whether there was something to undo."""
    door, _ = _door()
    return door is not None and bool(door.return_cores())


def allocate(nbytes: int) -> Tensor:
    """Return uint8 [nbytes] for weights, not filled, in huge pages where the system has them."""
    door, _ = _door()
    if door is None:
        return torch.empty(nbytes, dtype=torch.uint8)
    found: Tensor = door.allocate(nbytes)
    return found


def block(tensor: PackedTensor, kind: Kind) -> Blocked:
    """Lay a quantized weight out in panels, in memory from `allocate`."""
    size = blocked.blocked_bytes(
        kind, (tensor.codes.shape[0], tensor.codes.shape[1]), tensor.scheme, tensor.scale.dtype
    )
    door, _ = _door()
    lay_out = blocked.block if door is None else door.block
    found: Blocked = lay_out(tensor, kind, out=allocate(size))
    return found


def multiply(
    x: Tensor, weight: Blocked, bias: Tensor | None, *, compute: Compute, backend: str
) -> Tensor:
    """Multiply activations with a weight in panels, and add a bias.

    x        floating [..., in]
    bias     floating [out], or None; added in float32, before the one rounding
    backend  what `choose` returned
    returns  [..., out] in the dtype of x, with no history for gradients
    """
    wide = None if bias is None else bias.float()
    if backend == "cpu":  # checks its own input: it is called often enough to notice
        found: Tensor = _door()[0].linear(x, weight, wide, compute=compute)
        return found
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"an input of width {x.shape[-1]} for a weight {list(weight.shape)}")
    if x.device.type not in BACKENDS:
        choose(device=x.device.type)
    with torch.no_grad():
        product = blocked.linear(x.float(), weight, compute=compute)
        return (product if wide is None else product.add_(wide)).to(x.dtype)


@torch.library.custom_op("unicomp::packed_linear", mutates_args=())
def packed_linear(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    kind: str,
    out: int,
    columns: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale: str,
    compute: str,
    backend: str,
) -> Tensor:
    """Do what `multiply` does, with a `Blocked` taken apart; `scale` is the name of its dtype."""
    layout = (kind, out, columns, bits, group_size, symmetric, scale)
    weight = _blocked(packed, *layout)
    return multiply(x, weight, bias, compute=cast(Compute, compute), backend=backend)


@packed_linear.register_fake
def _fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, kind: str, out: int, *rest: object
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.layout = inputs[3:10]
    ctx.save_for_backward(inputs[1])


def _gradient(ctx: Any, above: Tensor) -> tuple[Tensor | None, ...]:
    """Pass a gradient on through the dequantized weight; rounding of activations counts as none."""
    weight = _blocked(ctx.saved_tensors[0], *ctx.layout)
    dense = blocked.unblock(weight).dequantize(above.dtype)
    to_x = above @ dense if ctx.needs_input_grad[0] else None
    to_bias = above.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
    return (to_x, None, to_bias, *(None,) * 9)


packed_linear.register_autograd(_gradient, setup_context=_keep)


def _blocked(
    packed: Tensor,
    kind: str,
    out: int,
    columns: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale: str,
) -> Blocked:
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind `{kind}`")
    scheme = Scheme(bits, group_size, symmetric)
    return Blocked(packed, cast(Kind, kind), (out, columns), scheme, getattr(torch, scale))


@cache
def _door() -> tuple[Any, str | None]:
    """Return the door to the C extension, or None and why."""
    try:
        door = import_module("unicomp.kernels.cpu")
    except ImportError as error:
        return None, f"the C extension cannot be imported ({error})"
    if not door.available():
        return None, door.reason() or "the C extension does not run here"
    return door, None


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"packed weights are multiplied by torch, slowly: {reason}",
        MissingKernelWarning,
        stacklevel=4,
    )

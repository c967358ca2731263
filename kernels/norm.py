"""The norm of Llama, `weight * x / sqrt(mean(x * x) + eps)`, in one call where it is short.

transformers computes it with eight operators of torch, each of which costs a step of one token more
than the numbers do. `csrc/norm.c` sums in the very order in which torch does and rounds where it
does, so the bits are those of the module. The order is a property of the processor and of torch's
release, and which classes have this formula a property of transformers': so a module is replaced
only if the kernel repeats what the module itself computes of some drawn numbers, to the last bit.
"""

import copy
from inspect import signature
from typing import Self

import torch
from torch import Tensor, nn

from unicomp.kernels import cpu

LANES = (8, 16, 4)
"""Numbers of float32 in a register of torch's build, which say in what order it sums."""
FEW = 32768
"""Numbers from which torch shares a sum among its threads; up to here, it is one thread's."""
WIDTH_MAX = cpu.SPAN_MAX  # as in csrc/norm.h


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, lanes: int) -> Tensor:
    """Return `x` divided by its root mean square over the last dimension, times the weight.

    x        float32, float16 or bfloat16 [..., width] on the CPU, contiguous; width <= `WIDTH_MAX`
    weight   [width], of the dtype of x
    lanes    one of `LANES`: in how many lanes squares are summed
    returns  [..., width] in the dtype of x, rounded to it before and after the weight

    Raises ValueError where that is not what is given.
    """
    from unicomp.kernels import _cpu

    width = x.shape[-1]
    if not (
        x.dtype == weight.dtype in cpu.dtypes()
        and x.is_cpu
        and weight.is_cpu
        and x.is_contiguous()
        and weight.is_contiguous()
        and weight.shape == (width,)
        and 0 < width <= WIDTH_MAX
    ):
        raise ValueError(
            f"no norm of {x.dtype} {list(x.shape)} with {weight.dtype} {list(weight.shape)}"
        )
    out = torch.empty_like(x)
    _cpu.norm(
        x.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        x.numel() // width,
        width,
        cpu.dtypes()[x.dtype],
        eps,
        lanes,
    )
    return out


class RMSNorm(nn.Module):
    """Llama's norm: one call for a few tokens, transformers' own operators for all else.

    weight  floating [width], a parameter
    eps     added to the mean of squares
    lanes   what `rms_norm` takes

    Inputs are floating [..., width]; outputs, too, in the dtype that theirs and the weight's give.
    """

    def __init__(self, weight: nn.Parameter, eps: float, lanes: int) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps
        self.lanes = lanes

    @classmethod
    def of(cls, module: nn.Module) -> Self | None:
        """Return a norm with the very weight of a module, or None where it computes otherwise."""
        if "RMSNorm" not in type(module).__name__ or len(signature(module.forward).parameters) != 1:
            return None
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or not isinstance(eps, float):
            return None
        if list(module.state_dict()) != ["weight"] or weight.dim() != 1 or not cpu.available():
            return None
        if not weight.is_cpu or weight.dtype not in cpu.dtypes() or weight.numel() > WIDTH_MAX:
            return None
        found = (cls(weight, eps, lanes) for lanes in LANES)
        return next((one.train(module.training) for one in found if one._repeats(module)), None)

    @torch.no_grad()
    def _repeats(self, module: nn.Module) -> bool:
        """Tell whether drawn numbers get the same bits; in float32, the order of sums shows."""
        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(8, self.weight.numel(), generator=draw)
        rows *= torch.logspace(-4, 3, 8)[:, None]
        for dtype in {torch.float32, self.weight.dtype}:
            drawn = torch.randn(self.weight.shape, generator=draw).to(dtype)
            other, x = copy.deepcopy(module), rows.to(dtype)
            other.weight = nn.Parameter(drawn)
            if not torch.equal(other(x), rms_norm(x, drawn, eps=self.eps, lanes=self.lanes)):
                return False
        return True

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm; x is floating [..., width]."""
        weight = self.weight
        if (
            x.numel() < FEW
            and x.dtype == weight.dtype
            and cpu.available()
            and not torch.compiler.is_compiling()
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and x.is_cpu
            and x.is_contiguous()
        ):
            return rms_norm(x, weight, eps=self.eps, lanes=self.lanes)
        wide = x.to(torch.float32)
        mean = wide.pow(2).mean(-1, keepdim=True)
        return weight * (wide * torch.rsqrt(mean + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """Say how wide it is, and `eps`."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"

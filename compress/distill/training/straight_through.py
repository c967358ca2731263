"""Weights that compute as they will be stored, and learn as if they were not rounded.

Each packed weight of the student gets a shadow in float32. What the layer multiplies with is the
shadow rounded to codes and scales, exactly as it will be packed; the gradient passes the rounding
by, and stops where a weight lies beyond the last code. Scales are learned, or for ternary weights
the mean magnitude of their group. At first the weight may be a mixture of the shadow and the
rounded one, whose share grows to one (`gradual`). What was zero and was said to stay so stays.

Papers: straight-through, arXiv:1308.3432; learned scales and their gradient, LSQ, arXiv:1902.08153,
equations 3 to 5; absmean scales, BitNet b1.58, arXiv:2402.17764, equations 1 to 3.
Differs: scales are rounded to the dtype that they are stored in at every step, and are learned as
factors of what they were, so that one rate suits all sizes.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from unicomp.compress.grid import stored
from unicomp.kernels.packed import PackedTensor, Scheme

Scales = Literal["learned", "absmean"]


class Quantized(nn.Module):
    """A shadow weight [out, in] -> the weight of its codes and scales, as the module holds it."""

    scale: Tensor
    low: Tensor
    high: Tensor
    kept: Tensor
    share: Tensor

    def __init__(
        self,
        start: PackedTensor,
        *,
        codes: tuple[int, int],
        scales: Scales,
        keep_zeros: bool,
        transposed: bool = False,
    ) -> None:
        """Begin with the codes and scales of a packed weight.

        codes       the least and the greatest code; ternary weights use fewer than their bits
        keep_zeros  weights that are zero now stay so
        transposed  the module holds its weight [in, out]
        """
        super().__init__()
        self.scheme, self.scales, self.transposed = start.scheme, scales, transposed
        self.dtype = start.scale.dtype
        zero = 0 if start.zero_point is None else start.zero_point.float()
        shape = start.scale.shape
        self.zero_point = start.zero_point
        self.register_buffer("scale", start.scale.float().clone(), persistent=False)
        self.register_buffer("low", (codes[0] - zero) * torch.ones(shape), persistent=False)
        self.register_buffer("high", (codes[1] - zero) * torch.ones(shape), persistent=False)
        kept = start.dequantize() != 0 if keep_zeros else torch.ones(0, dtype=torch.bool)
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("share", torch.ones(()), persistent=False)
        self.factor = nn.Parameter(torch.zeros(shape), requires_grad=scales == "learned")

    def forward(self, shadow: Tensor) -> Tensor:
        """Return the rounded weight, or for a share below one its mixture with the shadow.

        shadow  float32 [out, in]
        """
        weight = shadow * self.kept if self.kept.numel() else shadow
        codes, scale, _ = self._rounded(weight)
        found = _ungrouped(codes * scale[..., None], weight.shape[1])
        if float(self.share) < 1:
            found = weight + self.share * (found - weight)
        return found.T if self.transposed else found

    @torch.no_grad()
    def packed(self, shadow: Tensor) -> PackedTensor:
        """Return the codes and scales that `forward` computes with, the share being one."""
        weight = shadow * self.kept if self.kept.numel() else shadow
        codes, scale, _ = self._rounded(weight)
        if self.zero_point is not None:
            codes = codes + self.zero_point.float()[..., None]
        flat = _ungrouped(codes, weight.shape[1]).round().to(torch.int8)
        return PackedTensor(flat.contiguous(), scale.to(self.dtype), self.zero_point, self.scheme)

    def _rounded(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes less their zero points [out, groups, size], scales, and the groups."""
        groups = _grouped(weight, self.scheme)
        if self.scales == "absmean":
            size = groups.ne(0).sum(-1) if self.kept.numel() else groups.shape[-1]
            raw = groups.detach().abs().sum(-1) / torch.as_tensor(size).clamp_min(1)
            raw = torch.where(raw > 0, raw, self.scale)
        else:
            raw = self.scale * torch.exp(self.factor)
        scale = raw + (stored(raw.detach(), self.dtype) - raw).detach()
        within = (groups / scale[..., None]).clamp(self.low[..., None], self.high[..., None])
        return within + (within.round() - within).detach(), scale, groups


def _grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the weight as [out, groups, size]; a shorter last group is filled up with zeros."""
    columns = weight.shape[1]
    size = columns if scheme.group_size == -1 else scheme.group_size
    short = -columns % size
    if short:
        weight = nn.functional.pad(weight, (0, short))
    found: Tensor = weight.unflatten(1, (-1, size))
    return found


def _ungrouped(groups: Tensor, columns: int) -> Tensor:
    return groups.flatten(1)[:, :columns]


def attach(module: nn.Module, quantized: Quantized, shadow: Tensor) -> None:
    """Let a linear compute with a rounded weight from now on.

    shadow  float32 [out, in]
    """
    module.weight = nn.Parameter(shadow.clone())
    parametrize.register_parametrization(module, "weight", quantized, unsafe=True)


def quantizers(model: nn.Module) -> dict[str, tuple[Quantized, nn.Parameter]]:
    """Return the path of each such linear -> what rounds it, and its shadow."""
    found: dict[str, tuple[Quantized, nn.Parameter]] = {}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            held = module.parametrizations["weight"]
            if isinstance(held[0], Quantized):
                found[path] = (held[0], held.original)
    return found


def set_share(model: nn.Module, share: float) -> None:
    """Say how much of each weight is rounded, 0 to 1."""
    for quantized, _ in quantizers(model).values():
        quantized.share.fill_(share)

"""One weight's share of a delta: sign planes with scales, and two factors of low rank.

A fine-tune is its base plus a delta; the delta of a weight [out, in] is kept as

    delta = sum over planes of scale * sign  +  u v

with any part absent. In `delta.safetensors`, for a weight `<m>.weight` (or `<m>`, experts):

    <m>.delta_sign    uint8 [out, ceil(in/8)]; bit k of byte j is the sign of column 8j+k, 1: plus;
                      what a zero counted as stands in the header (`zero`); bits of no column are 0
    <m>.delta_scale   float32 [1] or [out, 1]
    <m>.delta_u       float16 or int8 [out, rank]
    <m>.delta_v       float16 or int8 [rank, in]
    <m>.delta_u_scale, <m>.delta_v_scale    float32 [rank], with int8 factors only

A second plane is `<m>.delta_sign_2` and `<m>.delta_scale_2`, and so on. Of 3-D experts each tensor
has one dimension more, in front: [1] becomes [experts, 1], [rank] becomes [experts, rank].

`PackedDelta.decode` is the definition of the values: what restoring adds, and kernels approximate.

Papers: D-QRELO, arXiv:2604.16940; BitDelta, arXiv:2402.10193 (one plane).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unicomp.later import torch
from unicomp.writer import Meta

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 18  # elements whose signs are unpacked at once: they stay in the cache


@dataclass(frozen=True, slots=True)
class Layout:
    """What is kept of the delta of a weight, before any value is known.

    planes   how many sign planes
    by_row   a plane has a scale per output row, instead of one
    rank     of the factors; 0: there are none
    int8     factors are int8 with a scale per rank, instead of float16
    """

    planes: int
    by_row: bool
    rank: int
    int8: bool

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes that this takes of a weight [out, in]."""
        return self.planes * self.plane_bytes(shape) + self.rank * self.rank_bytes(shape)

    def plane_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of one plane with its scales."""
        return shape[0] * -(-shape[1] // 8) + 4 * (shape[0] if self.by_row else 1)

    def rank_bytes(self, shape: tuple[int, int]) -> int:
        """Return the bytes of one rank of the factors."""
        return sum(shape) + 8 if self.int8 else 2 * sum(shape)

    def metas(self, module: str, shape: tuple[int, ...]) -> list[Meta]:
        """Return the tensors of a weight [out, in], or of experts [experts, out, in]."""
        *front, out, columns = shape
        found = []
        for plane in range(self.planes):
            scale = (out, 1) if self.by_row else (1,)
            sign = (*front, out, -(-columns // 8))
            found.append(Meta(sign_name(module, plane), "U8", sign))
            found.append(Meta(scale_name(module, plane), "F32", (*front, *scale)))
        if self.rank:
            kind = "I8" if self.int8 else "F16"
            found.append(Meta(f"{module}.delta_u", kind, (*front, out, self.rank)))
            found.append(Meta(f"{module}.delta_v", kind, (*front, self.rank, columns)))
            if self.int8:
                names = (f"{module}.delta_u_scale", f"{module}.delta_v_scale")
                found += [Meta(name, "F32", (*front, self.rank)) for name in names]
        return found


@dataclass(frozen=True, slots=True)
class Plane:
    """Signs and what they are multiplied by.

    sign   uint8 [out, ceil(in/8)]
    scale  float32 [1] or [out, 1]
    """

    sign: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Factors:
    """Two factors of low rank.

    u, v              float16 or int8, [out, rank] and [rank, in]
    u_scale, v_scale  float32 [rank] with int8, else None
    """

    u: Tensor
    v: Tensor
    u_scale: Tensor | None
    v_scale: Tensor | None

    def wide(self) -> tuple[Tensor, Tensor]:
        """Return both as float32, scales multiplied in."""
        u, v = self.u.float(), self.v.float()
        if self.u_scale is not None and self.v_scale is not None:
            u *= self.u_scale
            v *= self.v_scale[:, None]
        return u, v


@dataclass(frozen=True, slots=True)
class PackedDelta:
    """The delta of one weight [out, in]."""

    shape: tuple[int, int]
    planes: tuple[Plane, ...]
    factors: Factors | None

    @property
    def layout(self) -> Layout:
        """What is kept."""
        factors = self.factors
        return Layout(
            planes=len(self.planes),
            by_row=bool(self.planes) and self.planes[0].scale.ndim == 2,
            rank=0 if factors is None else factors.u.shape[1],
            int8=factors is not None and factors.u_scale is not None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return self.layout.nbytes(self.shape)

    def decode(self) -> Tensor:
        """Return the delta, float32 [out, in]: the planes in their order, then the product."""
        total = torch.zeros(self.shape)
        for plane in self.planes:
            add_plane(total, plane.sign, plane.scale)
        if self.factors is not None:
            u, v = self.factors.wide()
            total.addmm_(u, v)
        return total

    def tensors(self, module: str) -> dict[str, Tensor]:
        """Return the tensors to store, as `Layout.metas` has them for a 2-D weight."""
        found = {}
        for index, plane in enumerate(self.planes):
            found[sign_name(module, index)] = plane.sign
            found[scale_name(module, index)] = plane.scale
        if self.factors is not None:
            factors = self.factors
            found |= {f"{module}.delta_u": factors.u, f"{module}.delta_v": factors.v}
            if factors.u_scale is not None and factors.v_scale is not None:
                found[f"{module}.delta_u_scale"] = factors.u_scale
                found[f"{module}.delta_v_scale"] = factors.v_scale
        return found


def round_factors(u: Tensor, v: Tensor, *, int8: bool) -> Factors:
    """Round two factors [out, rank], [rank, in]: to float16, or to int8 with a scale per rank."""
    if not int8:
        limit = torch.finfo(torch.float16).max
        return Factors(
            u.clamp(-limit, limit).half().contiguous(),
            v.clamp(-limit, limit).half().contiguous(),
            None,
            None,
        )
    u_scale = u.abs().amax(0).clamp_min(torch.finfo(torch.float32).tiny) / 127
    v_scale = v.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    return Factors(
        (u / u_scale).round().clamp(-127, 127).to(torch.int8).contiguous(),
        (v / v_scale[:, None]).round().clamp(-127, 127).to(torch.int8).contiguous(),
        u_scale,
        v_scale,
    )


def collect(
    module: str, shape: tuple[int, int], layout: Layout, read: Callable[[str], Tensor]
) -> PackedDelta:
    """Return the delta of a weight [out, in] from its tensors; `read` fetches one by its name."""
    planes = tuple(
        Plane(read(sign_name(module, index)), read(scale_name(module, index)))
        for index in range(layout.planes)
    )
    factors = None
    if layout.rank:
        scales = [
            read(f"{module}.delta_{side}_scale") if layout.int8 else None for side in ("u", "v")
        ]
        factors = Factors(read(f"{module}.delta_u"), read(f"{module}.delta_v"), *scales)
    return PackedDelta(shape, planes, factors)


def sign_name(module: str, plane: int) -> str:
    """Return the name of a plane's signs; planes count from 0."""
    return f"{module}.delta_sign" + (f"_{plane + 1}" if plane else "")


def scale_name(module: str, plane: int) -> str:
    """Return the name of a plane's scales."""
    return f"{module}.delta_scale" + (f"_{plane + 1}" if plane else "")


def module_of(name: str) -> str:
    """Return the `<m>` that the delta of the weight of this name is stored under."""
    return name.removesuffix(".weight")


def pack_signs(positive: Tensor) -> Tensor:
    """Pack signs, eight to a byte.

    positive  bool [out, in]; not modified
    returns   uint8 [out, ceil(in/8)]
    """
    rows, columns = positive.shape
    width = -(-columns // 8)
    if columns % 8:
        positive = torch.nn.functional.pad(positive, (0, 8 * width - columns))
    eights = positive.contiguous().view(torch.uint8).view(torch.int64)
    # Byte k of a word holds 0 or 1; the product brings it to bit 56 + k. No two terms meet.
    words = eights * sum(1 << (56 - 7 * k) for k in range(8))
    return words.view(torch.uint8).view(rows, width, 8)[..., 7].contiguous()


def unpack_signs(sign: Tensor, columns: int) -> Tensor:
    """Return the signs that `pack_signs` packed.

    sign     uint8 [out, ceil(in/8)]; not modified
    returns  bool [out, in]
    """
    lanes = torch.tensor([1 << k for k in range(8)], dtype=torch.uint8, device=sign.device)
    bits = (sign[..., None] & lanes).ne(0)
    return bits.view(sign.shape[0], -1)[:, :columns]


def add_plane(total: Tensor, sign: Tensor, scale: Tensor, *, times: float = 1.0) -> None:
    """Add `times * scale * sign` to a float32 [out, in], a few rows at a time.

    sign   uint8 [out, ceil(in/8)]
    scale  float32 [1] or [out, 1]
    """
    rows, columns = total.shape
    step = max(1, PIECE // max(columns, 1))
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        own = scale[part] if scale.ndim == 2 else scale
        signs = unpack_signs(sign[part], columns).float().mul_(2).sub_(1)
        total[part] += signs.mul_(own * times)

"""The delta of one weight, ready to multiply: `y = sum of a (sign x) + u (v x)`.

With the C extension each part is in panels (`kernels/blocked.py`): a plane is `bit1`, the signs
with a scale per row; factors of int8 are `int8`, the scales of `u` multiplied into `v x`, since
they belong to its columns. What is rounded, and only with `compute="int8"`: activations per token
and span, and factors of float16 to int8. `exact` rounds nothing, and keeps float16 as it is.

Without the extension signs are unpacked a few rows at a time and multiplied by torch, exactly; so
also where an embedding's rows are all that is wanted.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from unicomp.kernels import backend as backends
from unicomp.kernels.blocked import ROWS, Blocked, Compute, unblock
from unicomp.kernels.delta import Factors, PackedDelta, Plane, round_factors, unpack_signs
from unicomp.kernels.packed import PackedTensor, Scheme

PIECE = 1 << 20  # signs unpacked at once: 4 MB, which stay in the cache
SIGNS = Scheme(2, -1)
BYTES = Scheme(8, -1)
FEW = 16  # ranks below which factors stay as stored: panels would be padding, and gain no time


class DeltaProduct(nn.Module):
    """The delta of one weight [out, in] in the layout that its backend multiplies with.

    shape    (out, in)
    planes   panels, or buffers `sign0`, `scale0`, ... as stored, where `panels` is empty
    factors  likewise

    Nothing here is in `state_dict`: the delta's folder has it.
    """

    def __init__(
        self, packed: PackedDelta, *, backend: str = "torch", compute: Compute = "exact"
    ) -> None:
        super().__init__()
        self.shape = packed.shape
        self.backend, self.compute = backend, compute
        self.panels: tuple[Blocked, ...] = ()
        self.sides: tuple[Blocked, Blocked] | None = None
        factors = packed.factors
        if factors is not None and backend == "cpu" and compute == "int8":
            factors = _bytes_of(factors)
        if backend == "cpu":
            self.panels = tuple(_signs(plane, packed.shape) for plane in packed.planes)
            if factors is not None and factors.v_scale is not None and len(factors.v) >= FEW:
                one = torch.ones(len(factors.u), 1, dtype=torch.float16)
                self.sides = (
                    _side(factors.u, one),
                    _side(factors.v, factors.v_scale[:, None]),
                )
        self.count = 0 if self.panels else len(packed.planes)
        for index, plane in enumerate(packed.planes[: self.count]):
            self.register_buffer(f"sign{index}", plane.sign, persistent=False)
            self.register_buffer(f"scale{index}", plane.scale, persistent=False)
        self.rank = 0 if factors is None else factors.u.shape[1]
        if factors is not None:
            sides = ("u", "v") if self.sides is None else ()
            for name in (*sides, "u_scale", "v_scale"):
                self.register_buffer(name, getattr(factors, name), persistent=False)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        held = [own.data for own in (*self.panels, *(self.sides or ()))]
        return sum(own.numel() * own.element_size() for own in (*held, *self.buffers()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, float32 [..., out], of floating [..., in]."""
        x = x.float()
        parts = [self._multiply(x, own) for own in self.panels]
        if self.count:
            parts.append(self._by_torch(x))
        if self.sides is not None:
            inner = self._multiply(x, self.sides[1]) * self._buffer("u_scale")
            parts.append(self._multiply(inner, self.sides[0]))
        elif self.rank:
            parts.append((x @ self._wide("v").T) @ self._wide("u").T)
        if not parts:
            return x.new_zeros(*x.shape[:-1], self.shape[0])
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def rows(self, index: Tensor) -> Tensor:
        """Return rows of the delta, float32 [..., in], for int64 [...]: what an embedding adds."""
        total = torch.zeros(*index.shape, self.shape[1], device=index.device)
        for panels in self.panels:
            total += _rows(panels, index)
        for plane in range(self.count):
            sign, scale = self._buffer(f"sign{plane}"), self._buffer(f"scale{plane}")
            own = unpack_signs(sign[index.reshape(-1)], self.shape[1]).float().mul_(2).sub_(1)
            by_row = scale[index] if scale.ndim == 2 else scale
            total += own.view(total.shape) * by_row
        if self.sides is not None:
            u = _rows(self.sides[0], index) * self._buffer("u_scale")
            total += u @ unblock(self.sides[1]).dequantize()
        elif self.rank:
            total += self._wide("u")[index] @ self._wide("v")
        return total

    def _multiply(self, x: Tensor, weight: Blocked) -> Tensor:
        return backends.multiply(x, weight, None, compute=self.compute, backend=self.backend)

    def _by_torch(self, x: Tensor) -> Tensor:
        """Return what the planes give, their signs unpacked a few rows at a time."""
        step = max(1, PIECE // max(self.shape[1], 1))
        found = []
        for start in range(0, self.shape[0], step):
            part = slice(start, start + step)
            total: Tensor | None = None
            for index in range(self.count):
                sign, scale = self._buffer(f"sign{index}"), self._buffer(f"scale{index}")
                own = unpack_signs(sign[part], self.shape[1]).to(x.dtype).mul_(2).sub_(1)
                by_row = scale[part, 0] if scale.ndim == 2 else scale
                product = (x @ own.T) * by_row
                total = product if total is None else total + product
            if total is not None:
                found.append(total)
        return torch.cat(found, -1)

    def _buffer(self, name: str) -> Tensor:
        found: Tensor = getattr(self, name)
        return found

    def _wide(self, name: str) -> Tensor:
        values = self._buffer(name).float()
        scale: Tensor | None = getattr(self, f"{name}_scale")
        if scale is None:
            return values
        return values * (scale if name == "u" else scale[:, None])


def _signs(plane: Plane, shape: tuple[int, int]) -> Blocked:
    """Return the panels of one plane."""
    codes = torch.empty(shape, dtype=torch.int8)
    step = max(1, PIECE // max(shape[1], 1))
    for start in range(0, shape[0], step):
        part = slice(start, start + step)
        codes[part] = unpack_signs(plane.sign[part], shape[1])
    codes.mul_(2).sub_(1)
    scale = plane.scale.reshape(-1, 1).expand(shape[0], 1)
    return backends.block(PackedTensor(codes, scale, None, SIGNS), "bit1")


def _side(codes: Tensor, scale: Tensor) -> Blocked:
    """Return the panels of a factor of int8 with one scale a row."""
    return backends.block(PackedTensor(codes, scale, None, BYTES), "int8")


def _bytes_of(factors: Factors) -> Factors:
    """Return the factors in int8, rounded where they are not."""
    if factors.u_scale is not None:
        return factors
    return round_factors(factors.u.float(), factors.v.float(), int8=True)


def _rows(weight: Blocked, index: Tensor) -> Tensor:
    """Return rows of a weight in panels, float32 [..., in], for int64 [...].

    Panels are unpacked whole, each once, a few at a time.
    """
    columns = weight.shape[1]
    table = weight.data.view(-1, weight.panel_bytes)
    panels, where = (index.reshape(-1) // ROWS).unique(return_inverse=True)
    found = torch.empty(index.numel(), columns)
    step = max(1, PIECE // (ROWS * columns))
    for start in range(0, len(panels), step):
        some = panels[start : start + step]
        part = replace(weight, data=table[some].view(-1), shape=(ROWS * len(some), columns))
        here = ((where >= start) & (where < start + step)).nonzero()[:, 0]
        row = (where[here] - start) * ROWS + index.reshape(-1)[here] % ROWS
        found[here] = unblock(part).dequantize()[row]
    return found.view(*index.shape, columns)

"""The layout that kernels multiply with: a quantized weight in panels of 16 output rows.

On disk a weight is rows of codes (`packed.py`); a kernel wants 16 rows side by side, one in each
32-bit lane of a 64-byte line, and four consecutive columns in a lane, since that is what one
instruction multiplies and sums (x86 VNNI and AMX tiles, Arm's dot product). So a panel is

    lines    64 bytes each. Byte 4r+j of a line holds, for row r, the columns k+j, k+4+j, k+8+j ...:
             as many as digits fit in a byte. Then the next line; each group starts a new one.
    scales   [groups][16] in the dtype of the file
    offsets  [groups][16] uint8, asymmetric weights only
    zeros    up to a multiple of 64 bytes

and a weight is its panels one after the other: each thread reads one stream of memory, in order.
Digits are unsigned: a code plus half the range; what that adds is taken back through the sum of the
activations. Rows that pad a panel have scale 0, columns that pad a group meet activations of 0.

    kind   digits a byte   a byte is
    int8   1               u
    int4   2               u0 | u1 << 4
    int2   4               u0 | u1 << 2 | u2 << 4 | u3 << 6
    trit5  5               q = ceil(v * 256 / 243), v = 81 u0 + 27 u1 + 9 u2 + 3 u3 + u4

With `q' = 3 q mod 256` the digit of a trit5 byte is `(3 q - q') / 256`, and `q'` holds the rest: a
dot product needs no digit, only the sums of the successive `q` (`kernels/csrc/panel.h`).

`linear` here is the definition of what kernels compute, in torch, and what runs where no kernel
does. Activations are rounded to int8 per token and span, a span being a weight's group, or `SPAN`
columns where a row has one scale; `compute="exact"` leaves them as they are.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unicomp.kernels.packed import PackedTensor, Scheme

Kind = Literal["int8", "int4", "int2", "trit5"]
Compute = Literal["int8", "exact"]

ROWS = 16  # output rows of a panel
LANE = 4  # columns of a lane
LINE = 64  # bytes of a line, and what panels are a multiple of
DIGITS: dict[Kind, int] = {"int8": 1, "int4": 2, "int2": 4, "trit5": 5}
RADIX: dict[Kind, int] = {"int8": 256, "int4": 16, "int2": 4, "trit5": 3}
SPAN = 320  # columns whose activations share a scale where weights have one a row: 16 x 20 columns


@dataclass(frozen=True, slots=True)
class Blocked:
    """One quantized weight in panels.

    data        uint8 [panels * panel_bytes], contiguous, on 64 bytes
    kind        how digits are packed in bytes
    shape       (out, in)
    scheme      bits, group size and symmetry of the codes, for the way back
    scale_dtype float32, float16 or bfloat16
    """

    data: Tensor
    kind: Kind
    shape: tuple[int, int]
    scheme: Scheme
    scale_dtype: torch.dtype

    @property
    def span(self) -> int:
        """Columns whose activations share a scale."""
        return SPAN if self.scheme.group_size == -1 else self.scheme.group_size

    @property
    def panel_bytes(self) -> int:
        """Bytes of a panel."""
        return panel_bytes(self.kind, self.shape[1], self.scheme, self.scale_dtype)


def kind_of(scheme: Scheme, *, ternary: bool = False) -> Kind:
    """Return the densest kind that holds a scheme's codes.

    ternary  all codes are -1, 0 or 1: then five fit in a byte
    """
    if ternary:
        return "trit5"
    return "int2" if scheme.bits == 2 else "int4" if scheme.bits <= 4 else "int8"


def columns_of_line(kind: Kind) -> int:
    """Return how many columns a line covers."""
    return LANE * DIGITS[kind]


def group_columns(columns: int, scheme: Scheme) -> list[int]:
    """Return the columns of each group, the last of which may be shorter."""
    size = columns if scheme.group_size == -1 else scheme.group_size
    return [min(size, columns - at) for at in range(0, columns, size)]


def panel_lines(kind: Kind, columns: int, scheme: Scheme) -> int:
    """Return the lines of a panel: each group is padded to whole ones."""
    return sum(-(-own // columns_of_line(kind)) for own in group_columns(columns, scheme))


def panel_bytes(kind: Kind, columns: int, scheme: Scheme, scale_dtype: torch.dtype) -> int:
    """Return the bytes of a panel."""
    groups = scheme.groups(columns)
    size = LINE * panel_lines(kind, columns, scheme) + groups * ROWS * scale_dtype.itemsize
    size += 0 if scheme.symmetric else groups * ROWS
    return -(-size // LINE) * LINE


def blocked_bytes(
    kind: Kind, shape: tuple[int, int], scheme: Scheme, scale_dtype: torch.dtype
) -> int:
    """Return the bytes of a weight [out, in] in panels."""
    return -(-shape[0] // ROWS) * panel_bytes(kind, shape[1], scheme, scale_dtype)


def offset_of(kind: Kind) -> int:
    """Return what is added to a code to make its digit, where weights are symmetric."""
    return RADIX[kind] // 2


def block(tensor: PackedTensor, kind: Kind, out: Tensor | None = None) -> Blocked:
    """Lay a quantized weight out in panels.

    out  where to, uint8 of the right size; default: new memory

    Raises ValueError where the codes do not fit the kind.
    """
    rows, columns = tensor.codes.shape
    scheme, offset = tensor.scheme, offset_of(kind)
    low, high = int(tensor.codes.min()), int(tensor.codes.max())
    if low < -offset or high >= RADIX[kind] - offset:
        raise ValueError(f"codes {low}..{high} do not fit `{kind}`")
    panels = -(-rows // ROWS)
    size = panel_bytes(kind, columns, scheme, tensor.scale.dtype)
    data = torch.empty(panels * size, dtype=torch.uint8) if out is None else out
    table = data.view(panels, size)
    table.zero_()
    digits = (tensor.codes.to(torch.int16) + offset).to(torch.uint8)
    at, start = 0, 0
    for own in group_columns(columns, scheme):
        lines = -(-own // columns_of_line(kind))
        padded = torch.zeros(panels * ROWS, lines * columns_of_line(kind), dtype=torch.uint8)
        padded[:rows, :own] = digits[:, start : start + own]
        cube = padded.view(panels, ROWS, lines, DIGITS[kind], LANE)
        packed = _pack_digits(cube, kind).permute(0, 2, 1, 3)
        table[:, at : at + lines * LINE] = packed.reshape(panels, lines * LINE)
        at, start = at + lines * LINE, start + own
    groups = scheme.groups(columns)
    scale = torch.zeros(panels * ROWS, groups, dtype=tensor.scale.dtype)
    scale[:rows] = tensor.scale
    wide = scale.view(panels, ROWS, groups).permute(0, 2, 1).reshape(panels, -1).view(torch.uint8)
    table[:, at : at + wide.shape[1]] = wide
    if tensor.zero_point is not None:
        at += wide.shape[1]
        zero = torch.zeros(panels * ROWS, groups, dtype=torch.uint8)
        zero[:rows] = (tensor.zero_point.to(torch.int16) + offset).to(torch.uint8)
        offsets = zero.view(panels, ROWS, groups).permute(0, 2, 1).reshape(panels, -1)
        table[:, at : at + offsets.shape[1]] = offsets
    return Blocked(data, kind, (rows, columns), scheme, tensor.scale.dtype)


def unblock(weight: Blocked) -> PackedTensor:
    """Return the codes, scales and zero points of a weight in panels."""
    rows, columns = weight.shape
    kind, scheme, offset = weight.kind, weight.scheme, offset_of(weight.kind)
    panels, groups = -(-rows // ROWS), scheme.groups(columns)
    table = weight.data.view(panels, weight.panel_bytes)
    parts, at = [], 0
    for own in group_columns(columns, scheme):
        lines = -(-own // columns_of_line(kind))
        packed = table[:, at : at + lines * LINE].reshape(panels, lines, ROWS, LANE)
        digits = _unpack_digits(packed.permute(0, 2, 1, 3), kind)
        parts.append(digits.reshape(panels * ROWS, -1)[:rows, :own])
        at += lines * LINE
    codes = (torch.cat(parts, 1).to(torch.int16) - offset).to(torch.int8)
    wide = groups * ROWS * weight.scale_dtype.itemsize
    scale = table[:, at : at + wide].contiguous().view(weight.scale_dtype)
    scale = scale.view(panels, groups, ROWS).permute(0, 2, 1).reshape(panels * ROWS, groups)
    zero = None
    if not scheme.symmetric:
        at += wide
        found = table[:, at : at + groups * ROWS].reshape(panels, groups, ROWS).permute(0, 2, 1)
        zero = (found.reshape(panels * ROWS, groups)[:rows].to(torch.int16) - offset).to(torch.int8)
    return PackedTensor(codes, scale[:rows].contiguous(), zero, scheme)


def quantize_activations(x: Tensor, weight: Blocked) -> tuple[Tensor, Tensor]:
    """Round activations to int8 per token and span, as every kernel does.

    x        [tokens, in]
    returns  int8 [tokens, in] in -127..127; float32 scales [tokens, spans]

    `scale = max|x| / 127`, codes are `x * (127 / max|x|)` to the nearest even; zeros have scale 0.
    Values that are not finite give scales that are not, so that the outputs show it.
    """
    tokens, columns = x.shape
    span = weight.span
    spans = -(-columns // span)
    padded = torch.zeros(tokens, spans * span)
    padded[:, :columns] = x.float()
    cube = padded.view(tokens, spans, span)
    most = cube.abs().amax(2)  # NaN where there is one
    # `127 / most` would be `most.reciprocal() * 127`, rounded twice
    inverse = torch.where(most > 0, torch.tensor(127.0) / most, torch.zeros_like(most))
    codes = (cube * inverse[:, :, None]).nan_to_num(0, 0, 0).round().clamp(-127, 127)
    return codes.view(tokens, -1)[:, :columns].to(torch.int8), most / 127


def linear(x: Tensor, weight: Blocked, *, compute: Compute = "int8") -> Tensor:
    """Multiply activations with a weight in panels: the definition, in torch.

    x        floating [..., in]
    returns  [..., out] in the dtype of x

    With `int8`, integer dot products per span are exact; each is scaled in float32, and spans are
    summed in float32. With `exact`, products are float32.
    """
    columns = weight.shape[1]
    flat = x.reshape(-1, columns)
    packed = unblock(weight)
    if compute == "exact":
        result = flat.float() @ packed.dequantize().T
        return result.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
    codes, scales = quantize_activations(flat, weight)
    zero = None if packed.zero_point is None else packed.zero_point.double()
    total = torch.zeros(len(flat), weight.shape[0])
    for index, start in enumerate(range(0, columns, weight.span)):
        some = slice(start, start + weight.span)
        group = 0 if weight.scheme.group_size == -1 else index
        digits = packed.codes[:, some].double()  # exact for any sum that int32 holds
        if zero is not None:
            digits -= zero[:, group, None]
        dots = codes[:, some].double() @ digits.T
        total += dots.float() * scales[:, index, None] * packed.scale[:, group].float()
    return total.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _pack_digits(cube: Tensor, kind: Kind) -> Tensor:
    """Pack uint8 [panels, 16, lines, digits, 4] along its digits."""
    if kind == "trit5":
        value = torch.zeros_like(cube[..., 0, :], dtype=torch.int16)
        for digit in range(5):
            value = value * 3 + cube[..., digit, :]
        return ((value.int() * 256 + 242) // 243).to(torch.uint8)
    bits = 8 // DIGITS[kind]
    total = cube[..., 0, :].clone()
    for digit in range(1, DIGITS[kind]):
        total |= cube[..., digit, :] << (bits * digit)
    return total


def _unpack_digits(packed: Tensor, kind: Kind) -> Tensor:
    """Return uint8 [..., digits, 4] of bytes [..., 4]."""
    found = []
    if kind == "trit5":
        rest = packed.to(torch.int16)
        for _ in range(5):
            rest = rest * 3
            found.append((rest >> 8).to(torch.uint8))
            rest &= 255
        return torch.stack(found, -2)
    bits = 8 // DIGITS[kind]
    for digit in range(DIGITS[kind]):
        found.append((packed >> (bits * digit)) & ((1 << bits) - 1))
    return torch.stack(found, -2)

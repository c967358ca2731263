"""The layout that kernels multiply with: a quantized weight in panels of 16 output rows.

On disk a weight is rows of codes (`packed.py`); a kernel wants 16 rows side by side, one in each
32-bit lane of a 64-byte line, and four consecutive columns in a lane, since that is what one
instruction multiplies and sums (x86 VNNI and AMX tiles, Arm's dot product). So a panel is a row of
stretches of up to `STRETCH` groups, and a stretch is

    scales   [groups][16] in the dtype of the file
    offsets  [groups][16] uint8, asymmetric weights only
    zeros    up to a multiple of 64 bytes
    lines    64 bytes each. Byte 4r+j of a line holds, for row r, the columns k+j, k+4+j, k+8+j ...:
             as many as digits fit in a byte. Then the next line; each group starts a new one.

and a weight is its panels one after the other: each thread reads one stream of memory, byte after
byte, with the scales where it comes by.
Digits are unsigned: a code plus half the range; what that adds is taken back through the sum of the
activations. Rows that pad a panel have scale 0, columns that pad a group meet activations of 0.

    kind   digits a byte   a byte is
    int8   1               u
    int4   2               u0 | u1 << 4
    int2   4               u0 | u1 << 2 | u2 << 4 | u3 << 6
    trit5  5               (7p + q) | r << 6, p = 3 u0 + u1, 4q + r = 9 u2 + 3 u3 + u4
    bit1   8               b0 | b1 << 1 | ... | b7 << 7, u = 2b: codes are -1 and 1

28p + 4q + r numbers the trits of a byte: 28 is a multiple of 4 where 27 is not, so the low 6
bits alone give u0, u1 and q, by a table of 64 entries, and q and r the rest, by one of 32.

`linear` here is the definition of what kernels compute, in torch, and what runs where no kernel
does. Activations are rounded to int8 per token and span, a span being a weight's group, or `SPAN`
columns where a row has one scale; `compute="exact"` leaves them as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["int8", "int4", "int2", "trit5", "bit1"]
Compute = Literal["int8", "exact"]

ROWS = 16  # output rows of a panel
LANE = 4  # columns of a lane
LINE = 64  # bytes of a line, and what panels are a multiple of
STRETCH = 4  # groups whose scales lie together, before their lines
DIGITS: dict[Kind, int] = {"int8": 1, "int4": 2, "int2": 4, "trit5": 5, "bit1": 8}
RADIX: dict[Kind, int] = {"int8": 256, "int4": 16, "int2": 4, "trit5": 3, "bit1": 3}
# The greatest activation, by kind: plus or minus a digit it still is a byte
# (csrc/tiles_avx512vnni.c).
GREATEST: dict[Kind, int] = {"int8": 127, "int4": 120, "int2": 126, "trit5": 126, "bit1": 126}
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


def header_bytes(groups: int, scheme: Scheme, scale_dtype: torch.dtype) -> int:
    """Return the bytes before the lines of a stretch of `groups` groups."""
    size = groups * ROWS * (scale_dtype.itemsize + (not scheme.symmetric))
    return -(-size // LINE) * LINE


def stretches(columns: int, scheme: Scheme) -> list[list[int]]:
    """Return the columns of each group, stretch by stretch."""
    groups = group_columns(columns, scheme)
    return [groups[at : at + STRETCH] for at in range(0, len(groups), STRETCH)]


def panel_bytes(kind: Kind, columns: int, scheme: Scheme, scale_dtype: torch.dtype) -> int:
    """Return the bytes of a panel."""
    headers = (header_bytes(len(s), scheme, scale_dtype) for s in stretches(columns, scheme))
    return LINE * panel_lines(kind, columns, scheme) + sum(headers)


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
    if kind == "bit1" and bool((tensor.codes == 0).any()):
        raise ValueError("codes of 0 do not fit `bit1`")
    panels, groups = -(-rows // ROWS), scheme.groups(columns)
    size = panel_bytes(kind, columns, scheme, tensor.scale.dtype)
    data = torch.empty(panels * size, dtype=torch.uint8) if out is None else out
    table = data.view(panels, size)
    table.zero_()
    digits = (tensor.codes.to(torch.int16) + offset).to(torch.uint8)
    scale = torch.zeros(panels * ROWS, groups, dtype=tensor.scale.dtype)
    scale[:rows] = tensor.scale
    zero = torch.zeros(panels * ROWS, groups, dtype=torch.uint8)
    if tensor.zero_point is not None:
        zero[:rows] = (tensor.zero_point.to(torch.int16) + offset).to(torch.uint8)
    at, start, group = 0, 0, 0
    for stretch in stretches(columns, scheme):
        some = slice(group, group + len(stretch))
        wide = scale[:, some].reshape(panels, ROWS, -1).permute(0, 2, 1).reshape(panels, -1)
        header = wide.contiguous().view(torch.uint8)
        if tensor.zero_point is not None:
            offsets = zero[:, some].reshape(panels, ROWS, -1).permute(0, 2, 1)
            header = torch.cat((header, offsets.reshape(panels, -1)), 1)
        table[:, at : at + header.shape[1]] = header
        at += header_bytes(len(stretch), scheme, tensor.scale.dtype)
        for own in stretch:
            lines = -(-own // columns_of_line(kind))
            padded = torch.zeros(panels * ROWS, lines * columns_of_line(kind), dtype=torch.uint8)
            padded[:rows, :own] = digits[:, start : start + own]
            cube = padded.view(panels, ROWS, lines, DIGITS[kind], LANE)
            packed = _pack_digits(cube, kind).permute(0, 2, 1, 3)
            table[:, at : at + lines * LINE] = packed.reshape(panels, lines * LINE)
            at, start = at + lines * LINE, start + own
        group += len(stretch)
    return Blocked(data, kind, (rows, columns), scheme, tensor.scale.dtype)


def unblock(weight: Blocked) -> PackedTensor:
    """Return the codes, scales and zero points of a weight in panels."""
    rows, columns = weight.shape
    kind, scheme, offset = weight.kind, weight.scheme, offset_of(weight.kind)
    panels, width = -(-rows // ROWS), weight.scale_dtype.itemsize
    table = weight.data.view(panels, weight.panel_bytes)
    parts, scales, zeros, at = [], [], [], 0
    for stretch in stretches(columns, scheme):
        count = len(stretch)
        wide = table[:, at : at + count * ROWS * width].contiguous().view(weight.scale_dtype)
        scales.append(wide.view(panels, count, ROWS))
        if not scheme.symmetric:
            behind = at + count * ROWS * width
            zeros.append(table[:, behind : behind + count * ROWS].reshape(panels, count, ROWS))
        at += header_bytes(count, scheme, weight.scale_dtype)
        for own in stretch:
            lines = -(-own // columns_of_line(kind))
            packed = table[:, at : at + lines * LINE].reshape(panels, lines, ROWS, LANE)
            digits = _unpack_digits(packed.permute(0, 2, 1, 3), kind)
            parts.append(digits.reshape(panels * ROWS, -1)[:rows, :own])
            at += lines * LINE
    codes = (torch.cat(parts, 1).to(torch.int16) - offset).to(torch.int8)
    scale = _rows_first(scales, rows)
    zero = None
    if not scheme.symmetric:
        zero = (_rows_first(zeros, rows).to(torch.int16) - offset).to(torch.int8)
    return PackedTensor(codes, scale, zero, scheme)


def quantize_activations(x: Tensor, weight: Blocked) -> tuple[Tensor, Tensor]:
    """Round activations to int8 per token and span, as every kernel does.

    x        [tokens, in]
    returns  int8 [tokens, in] in -g..g, g being `GREATEST` of the kind; float32 scales
             [tokens, spans]

    `scale = max|x| / g`, codes are `x * (g / max|x|)` to the nearest even; zeros have scale 0.
    Values that are not finite give scales that are not, so that the outputs show it.
    """
    tokens, columns = x.shape
    span = weight.span
    spans = -(-columns // span)
    padded = torch.zeros(tokens, spans * span)
    padded[:, :columns] = x.float()
    cube = padded.view(tokens, spans, span)
    most = cube.abs().amax(2)  # NaN where there is one
    # `120 / most` would be `most.reciprocal() * 120`, rounded twice
    greatest = GREATEST[weight.kind]
    inverse = torch.where(most > 0, torch.tensor(float(greatest)) / most, torch.zeros_like(most))
    codes = (cube * inverse[:, :, None]).nan_to_num(0, 0, 0).round().clamp(-greatest, greatest)
    return codes.view(tokens, -1)[:, :columns].to(torch.int8), most / greatest


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


def _rows_first(parts: list[Tensor], rows: int) -> Tensor:
    """Join [panels, groups, 16] along groups into [rows, groups]."""
    whole = torch.cat(parts, 1)
    return whole.permute(0, 2, 1).reshape(-1, whole.shape[1])[:rows].contiguous()


def _pack_digits(cube: Tensor, kind: Kind) -> Tensor:
    """Pack uint8 [panels, 16, lines, digits, 4] along its digits."""
    digits = cube.unbind(-2)
    if kind == "trit5":
        rest = 9 * digits[2] + 3 * digits[3] + digits[4]
        return 7 * (3 * digits[0] + digits[1]) + (rest >> 2) + ((rest & 3) << 6)
    bits = 8 // DIGITS[kind]
    total = torch.zeros_like(digits[0])
    for place, digit in enumerate(digits):
        total |= (digit >> 1 if kind == "bit1" else digit) << (bits * place)
    return total


def _unpack_digits(packed: Tensor, kind: Kind) -> Tensor:
    """Return uint8 [..., digits, 4] of bytes [..., 4]."""
    if kind == "trit5":
        value = (packed & 63).to(torch.int16) * 4 + (packed >> 6)
        pair, rest = value // 28, value % 28
        trits = [pair // 3, pair % 3, rest // 9, rest // 3 % 3, rest % 3]
        return torch.stack(trits, -2).to(torch.uint8)
    bits = 8 // DIGITS[kind]
    mask, up = (1 << bits) - 1, int(kind == "bit1")
    found = [((packed >> (bits * digit)) & mask) << up for digit in range(DIGITS[kind])]
    return torch.stack(found, -2)

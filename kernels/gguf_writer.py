"""A checkpoint's tensors -> one GGUF file, one tensor in memory at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from unicomp import blocks
from unicomp.checkpoint import check_finite
from unicomp.errors import UnsupportedError
from unicomp.kernels.packed import PackedTensor

FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "TQ1_0": 36, "TQ2_0": 37}
"""`general.file_type` of a file most of whose tensors are of a type."""

Source = Callable[[], PackedTensor | torch.Tensor]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the file.

    kind    its GGUF type
    shape   rows and columns, experts before them; a vector has one size
    parts   what is read for it, one for each expert, else one
    order   for each row of the file, its row in the parts; None: they stay
    shift   what is added to its values
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parts: Sequence[Source]
    order: Sequence[int] | None = None
    shift: float = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes that its data takes."""
        if self.kind in blocks.SIZES:
            size, nbytes = blocks.SIZES[self.kind]
            return prod(self.shape) // size * nbytes
        return prod(self.shape) * (2 if self.kind == "F16" else 4)


def write(
    path: Path,
    architecture: str,
    fields: Mapping[str, Any],
    pieces: Sequence[Piece],
    progress: Callable[[str, int, int], None],
) -> int:
    """Write the file and return how many values were changed by rounding to float16.

    fields    metadata; int becomes uint32, float float32, lists arrays of their first's type
    progress  called with (name, bytes done, bytes in all) after each tensor

    Raises UnsupportedError where a value has no place in float16, or without the `gguf` package.
    """
    gguf = need()
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        _add(gguf, writer, key, value)
    for piece in pieces:
        writer.add_tensor_info(
            piece.name,
            piece.shape,
            np.dtype(np.float32),
            piece.nbytes,
            raw_dtype=gguf.GGMLQuantizationType[piece.kind],
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, changed, total = 0, 0, sum(piece.nbytes for piece in pieces)
        for piece in pieces:
            data, rounded = _data(piece)
            writer.write_tensor_data(data)
            changed += rounded
            done += piece.nbytes
            progress(piece.name, done, total)
    finally:
        writer.close()
    return changed


def need() -> Any:
    """Return the `gguf` package; UnsupportedError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            "GGUF needs the package `gguf`", hint="`pip install 'unicomp[gguf]'`"
        ) from error
    return gguf


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    if key == "general.architecture":
        return  # the writer's own
    if isinstance(value, bool):
        writer.add_key_value(key, value, kinds.BOOL)
    elif isinstance(value, int):
        writer.add_key_value(key, value, kinds.UINT32)
    elif isinstance(value, float):
        writer.add_key_value(key, value, kinds.FLOAT32)
    elif isinstance(value, str):
        writer.add_key_value(key, value, kinds.STRING)
    elif value:
        first = {str: kinds.STRING, int: kinds.INT32, float: kinds.FLOAT32}[type(value[0])]
        writer.add_key_value(key, value, kinds.ARRAY, sub_type=first)


def _data(piece: Piece) -> tuple[NDArray[Any], int]:
    """Return the bytes of one tensor and how many values float16 rounded."""
    found, changed = [], 0
    for part in piece.parts:
        read = part()
        if isinstance(read, PackedTensor) and piece.kind in blocks.SIZES:
            found.append(_codes(piece, read))
            continue
        weight = read.dequantize() if isinstance(read, PackedTensor) else read
        check_finite(piece.name, weight)
        weight = _ordered(weight, piece.order)
        if piece.shift:
            weight = weight.float() + piece.shift
        if piece.kind in blocks.SIZES:
            plain = weight.float().numpy()
            found.append(blocks.pack(piece.kind, *blocks.nearest(piece.kind, plain)))
        elif piece.kind == "F16":
            half = weight.half()
            if not bool(half.isfinite().all()):
                raise UnsupportedError(
                    f"`{piece.name}` holds {float(weight.abs().max()):g}, beyond float16",
                    hint="this model needs bfloat16: use `--format compressed-tensors`",
                )
            changed += int((half.to(weight.dtype) != weight).sum())
            found.append(half.numpy())
        else:
            found.append(weight.float().numpy())
    data = np.stack(found) if len(found) > 1 else found[0]
    return np.ascontiguousarray(data), changed


def _codes(piece: Piece, packed: PackedTensor) -> blocks.Bytes:
    codes, scale = packed.codes, packed.scale
    size = blocks.SIZES[piece.kind][0]
    count = codes.shape[1] // size
    if scale.shape[1] == 1 or bool((scale == scale.flatten()[0]).all()):
        scale = scale[:, :1].expand(-1, count)
    else:
        scale = scale.repeat_interleave(packed.scheme.group_size // size, dim=1)[:, :count]
    codes, scale = _ordered(codes, piece.order), _ordered(scale, piece.order)
    return blocks.pack(piece.kind, codes.contiguous().numpy(), scale.half().contiguous().numpy())


def _ordered(rows: torch.Tensor, order: Sequence[int] | None) -> torch.Tensor:
    return rows if order is None else rows[list(order)]

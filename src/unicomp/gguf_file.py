"""A `.gguf` file that anyone wrote, as a checkpoint folder: so that MODEL may be one.

Q4_0, Q8_0, TQ1_0 and TQ2_0 become codes and scales of compressed-tensors, the same values in
another order, and run on our kernels; every other type is multiplied out to float16. The folder
lies in the cache, under the hash of the file, and is made once. Rows go back to the order of
transformers, GPT-2's Conv1D is turned, stacks of experts come apart, the tokenizer is rebuilt from
its tokens.

The file is read through the `gguf` package; nothing in it is executed.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unicomp import blocks, gguf_model, gguf_tokenizer, hashing
from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.models import ARCHITECTURES
from unicomp.writer import Meta, Writer, publish, write_file

BITS = {"Q4_0": 4, "Q8_0": 8, "TQ1_0": 2, "TQ2_0": 2}
"""Types that stay packed -> bits of a code in the folder."""

LINEAR = re.compile(r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps)?)\.weight")
"""Tensors of a file that are linears of a layer."""

VERSION = "0.20.0"  # of compressed-tensors, whose layout the folder has


def folder_of(path: Path) -> Path:
    """Return the folder, in Hugging Face layout, that holds what a GGUF file holds.

    Made in `$XDG_CACHE_HOME/unicomp/gguf` (default `~/.cache`) unless it is there.

    Raises CheckpointError for a file that is damaged, UnsupportedError for a model, tokenizer or
    tensor that cannot be read, or without the `gguf` package.
    """
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise CheckpointError(
                f"`{path}` is not a GGUF file", hint="download it again, or give a folder"
            )
    digest = hashing.of_file(path).sha256
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "unicomp" / "gguf" / digest[:32]
    if (folder / "config.json").is_file():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _convert(path, partial)
    publish(partial, folder, overwrite=False)
    return folder


def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedError(
            "GGUF needs the package `gguf`", hint="`pip install 'unicomp[gguf]'`"
        ) from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CheckpointError(
            f"`{path}` cannot be read as GGUF: {error}", hint="download it again"
        ) from error


def _convert(path: Path, folder: Path) -> None:
    reader = _reader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    freqs = tensors.pop("rope_freqs.weight", None)
    factors = None if freqs is None else [float(value) for value in freqs.data]
    config = gguf_model.config(fields, "output.weight" not in tensors, factors)
    gguf_tokenizer.rebuild(fields, folder)
    pieces = [piece for tensor in tensors.values() for piece in _pieces(path, tensor, config)]
    writer = Writer(folder, [meta for piece in pieces for meta in piece.metas()])
    packed: dict[str, int] = {}
    dense: list[str] = []
    for piece in pieces:
        for name, value in piece.read().items():
            writer.write(name, value)
        module = piece.name.removesuffix(".weight")
        if piece.bits:
            packed[module] = piece.bits
        elif piece.linear:
            dense.append(module)
    writer.finish()
    if packed:
        conv1d = ARCHITECTURES[str(config["model_type"])].conv1d
        config["quantization_config"] = _quantization(packed, dense, conv1d)
    write_file(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


class _Piece:
    """One tensor of the folder: a whole one of the file, or one expert of a stack.

    shape   in the file
    place   where it stands there
    turned  it is a Conv1D, which transformers holds [in, out]
    """

    def __init__(
        self,
        name: str,
        kind: str,
        shape: tuple[int, ...],
        data: NDArray[Any],
        place: gguf_model.Place,
        conv1d: bool,
    ) -> None:
        self.name, self.kind, self.shape, self.data = name, kind, shape, data
        self.place = place
        self.linear = len(shape) == 2 and LINEAR.fullmatch(place.name) is not None
        self.turned = conv1d and self.linear
        self.bits = BITS.get(kind, 0) if self.linear else 0
        if self.turned and shape[0] * self.bits % 32:
            self.bits = 0  # its rows there would end within a word

    def metas(self) -> list[Meta]:
        """Return what `read` will give."""
        turn = -1 if self.turned else 1
        if not self.bits:
            kind = "F32" if len(self.shape) == 1 else "F16"
            return [Meta(self.name, kind, self.shape[::turn])]
        module = self.name.removesuffix(".weight")
        rows, columns = self.shape[::turn]
        size = blocks.SIZES[self.kind][0]
        grid = (self.shape[0], self.shape[1] // size)
        return [
            Meta(f"{module}.weight_packed", "I32", (rows, columns * self.bits // 32)),
            Meta(f"{module}.weight_scale", "F16", grid[::turn]),
            Meta(f"{module}.weight_shape", "I64", (2,)),
        ]

    def read(self) -> dict[str, Tensor]:
        """Return the tensors to store, rows in the order of transformers."""
        if not self.bits:
            return {self.name: self._plain()}
        module = self.name.removesuffix(".weight")
        codes, scale = blocks.unpack(self.kind, self.data, self.shape[1])
        codes, scale = self._ordered(codes), self._ordered(scale)
        return {
            f"{module}.weight_packed": torch.from_numpy(_words(codes, self.bits)),
            f"{module}.weight_scale": torch.from_numpy(scale.copy()),
            f"{module}.weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
        }

    def _plain(self) -> Tensor:
        import gguf

        try:
            values = gguf.dequantize(self.data, gguf.GGMLQuantizationType[self.kind])
        except NotImplementedError as error:
            raise UnsupportedError(
                f"gguf: `{self.name}` has type {self.kind}, which cannot be read",
                hint="use the safetensors checkpoint that the file was made from",
            ) from error
        shifted = values.reshape(self.shape) - np.float32(self.place.shift)
        plain = np.ascontiguousarray(self._ordered(shifted))
        kind = np.float32 if len(self.shape) == 1 else np.float16
        with np.errstate(over="ignore"):
            found = plain.astype(kind)
        if not np.isfinite(found).all():
            raise UnsupportedError(
                f"gguf: `{self.name}` holds values that float16 does not",
                hint="use the safetensors checkpoint that the file was made from",
            )
        return torch.from_numpy(found)

    def _ordered(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Return the rows in the order of transformers, turned where it holds them turned."""
        order = self.place.order(len(rows))
        found = rows if order is None else rows[np.argsort(order)]
        return found.T if self.turned else found


def _pieces(path: Path, tensor: Any, config: Mapping[str, Any]) -> Iterator[_Piece]:
    name, stacked = gguf_model.original(tensor.name, str(config["model_type"]))
    shape = tuple(int(size) for size in reversed(tensor.shape))
    kind, data = tensor.tensor_type.name, tensor.data
    place = gguf_model.place(name.format(0), config)
    conv1d = ARCHITECTURES[str(config["model_type"])].conv1d
    if not stacked:
        yield _Piece(name, kind, shape, data, place, conv1d)
        return
    if len(shape) != 3:
        raise CheckpointError(
            f"`{path}`: `{tensor.name}` has shape {list(shape)}, not one matrix for each expert",
            hint="the file is damaged, or older than stacked experts: make it again",
        )
    for expert in range(shape[0]):
        yield _Piece(name.format(expert), kind, shape[1:], data[expert], place, conv1d)


def _words(codes: blocks.Codes, bits: int) -> NDArray[np.int32]:
    """Return rows of 32-bit words of signed codes, as compressed-tensors packs 2, 4 and 8 bits."""
    rows, columns = codes.shape
    per = 8 // bits
    raised = (codes.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)
    parts = raised.reshape(rows, columns // per, per)
    found = np.zeros(parts.shape[:2], np.uint8)
    for place in range(per):
        found |= parts[:, :, place] << (place * bits)
    return np.ascontiguousarray(found).view(np.int32)


def _quantization(packed: Mapping[str, int], dense: list[str], conv1d: bool) -> dict[str, Any]:
    """Return the `quantization_config`: modules by name, a group for each way of packing.

    conv1d  weights are turned, so that their groups are blocks down the rows
    """
    sizes = {8: 32, 4: 32, 2: 256}
    groups: dict[str, Any] = {}
    for bits in sorted(set(packed.values())):
        groups[f"group_{len(groups)}"] = {
            "format": "pack-quantized",
            "targets": [module for module, own in packed.items() if own == bits],
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": True,
                "dynamic": False,
                **(
                    {"strategy": "block", "block_structure": [sizes[bits], 1]}
                    if conv1d
                    else {"strategy": "group", "group_size": sizes[bits]}
                ),
            },
            "input_activations": None,
            "output_activations": None,
        }
    found = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": VERSION,
        "config_groups": groups,
        "ignore": [*dense, "lm_head"],
        "kv_cache_scheme": None,
    }
    return found | ({"dequantize": True} if conv1d else {})

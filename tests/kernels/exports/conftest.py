"""Models whose linears have codes of any scheme, made without a quantizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unicomp.checkpoint import DTYPES, Checkpoint
from unicomp.kernels import format as formats
from unicomp.kernels.format import Wish
from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.models import describe
from unicomp.writer import Meta, Writer

WIDE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="session")
def coded_model(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """A factory of float16 models of widths 256 and 512 with random codes in all their linears.

    `coded_model(arch, bits=4, group_size=128, symmetric=True, ternary=False, one_scale=False,
    dtype=torch.float16, format="compressed-tensors", **overrides)` returns the folder.
    """
    made: dict[str, Path] = {}

    def make(
        arch: str,
        *,
        bits: int = 4,
        group_size: int = 128,
        symmetric: bool = True,
        ternary: bool = False,
        one_scale: bool = False,
        dtype: torch.dtype = torch.float16,
        format: str = "compressed-tensors",
        **overrides: Any,
    ) -> Path:
        words = (bits, group_size, symmetric, ternary, one_scale, dtype, format)
        key = repr((arch, words, sorted(overrides.items())))
        if key in made:
            return made[key]
        source = tiny_model(arch, dtype=dtype, **WIDE | overrides)
        checkpoint = Checkpoint.open(source)
        model = describe(checkpoint.config, checkpoint.tensors)
        scheme = Scheme(bits, group_size, symmetric)
        wishes = [
            Wish(one.module, one.shape, scheme, one.transposed, one.expert is not None)
            for one in model.linears()
        ]
        settled = formats.find(format).settle(wishes, ["transformers"])
        linears = {linear.part.tensor: linear for linear in model.linears()}
        named = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
        metas: list[Meta] = []
        packed: dict[str, torch.Tensor] = {}
        schemes = {}
        for index, (name, info) in enumerate(checkpoint.tensors.items()):
            own = settled.schemes[linears[name].module] if name in linears else None
            if own is None:
                metas.append(Meta(name, info.dtype, info.shape))
                packed[name] = checkpoint.read(name)
                continue
            linear = linears[name]
            schemes[linear.module] = own
            kind = DTYPES[settled.format.scale_dtype(named)]
            codes = _codes(linear.shape, own, kind, index, ternary, one_scale)
            metas += settled.format.layout(linear.module, linear.shape, own, named)
            packed |= settled.format.pack(linear.module, codes)
        folder = tmp_path_factory.mktemp(f"{arch}-coded")
        writer = Writer(folder, metas)
        for name, tensor in packed.items():
            writer.write(name, tensor)
        writer.finish()
        for file in source.iterdir():
            if file.suffix != ".safetensors" and "index" not in file.name:
                shutil.copy(file, folder)
        dense = [linear.module for linear in linears.values() if linear.module not in schemes]
        config = checkpoint.config | {
            "quantization_config": settled.format.config(schemes, [*dense, "lm_head"])
        }
        (folder / "config.json").write_text(json.dumps(config))
        made[key] = folder
        return folder

    return make


def _codes(
    shape: tuple[int, int],
    scheme: Scheme,
    dtype: torch.dtype,
    seed: int,
    ternary: bool,
    one_scale: bool,
) -> PackedTensor:
    draw = torch.Generator().manual_seed(seed)
    low, high = (-1, 1) if ternary else scheme.code_range
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=draw)
    grid = (shape[0], scheme.groups(shape[1]))
    wide = 0.3 / (high - low) * (0.5 + torch.rand(grid, generator=draw))
    scale = wide.to(torch.float16).to(dtype)
    if one_scale:
        scale = scale[:1, :1].expand(grid).contiguous()
    zero = torch.randint(-1, 2, grid, dtype=torch.int8, generator=draw)
    return PackedTensor(codes, scale, None if scheme.symmetric else zero, scheme)

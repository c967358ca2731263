"""Every tensor's axes are found, and sizes give parameters, bytes and config to the unit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unicomp.checkpoint import Checkpoint
from unicomp.compress.axes import FUSED_HEADS, Axes
from unicomp.compress.widths import multiple
from unicomp.errors import UnsupportedError
from unicomp.kernels.dense import open_dense
from unicomp.models import ARCHITECTURES, describe


def axes_of(folder: Path) -> Axes:
    dense = open_dense(Checkpoint.open(folder))
    return Axes(dense.config, describe(dense.config, dense.tensors), dense.tensors)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_parameters_are_those_of_a_model_made_by_the_config(
    arch: str, fused: bool, tiny_model: Callable[..., Path]
) -> None:
    """Smaller in every way that the type allows; stock transformers makes the same count."""
    folder = tiny_model(arch, fused_experts=fused)
    axes = axes_of(folder)
    sizes = axes.sizes
    assert axes.params(sizes) == sum(
        torch.Size(info.shape).numel() for info in Checkpoint.open(folder).tensors.values()
    )
    kv_heads = max(1, sizes.kv_heads // 2)
    smaller = replace(
        sizes,
        layers=sizes.layers - 1,
        ffn=min(sizes.ffn, 24),
        expert_ffn=min(sizes.expert_ffn, 16),
        experts=min(sizes.experts, 3),
        kv_heads=kv_heads,
        heads=kv_heads * (sizes.heads // sizes.kv_heads),
        hidden=kv_heads * sizes.head_dim if arch in FUSED_HEADS else sizes.hidden - 8,
    )
    config = axes.rewritten(smaller, axes.some(smaller.layers))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
        )
    assert sum(p.numel() for p in model.parameters()) == axes.params(smaller)
    assert sum(torch.Size(m.shape).numel() for m in axes.metas(smaller)) == axes.params(smaller)
    assert axes.params(smaller) != axes.params(replace(smaller, layers=sizes.layers))


def test_bytes_that_a_token_reads(tiny_model: Callable[..., Path]) -> None:
    """Not the embedding where the head is another table; of experts those that are chosen."""
    llama = axes_of(tiny_model("llama"))
    assert llama.read_bytes(llama.sizes) == llama.nbytes(llama.sizes) - 128 * 64 * 4
    qwen = axes_of(tiny_model("qwen2"))
    assert qwen.read_bytes(qwen.sizes) == qwen.nbytes(qwen.sizes)
    mixtral = axes_of(tiny_model("mixtral"))
    idle = 2 * 2 * 3 * 44 * 64 * 4  # layers, experts, linears
    whole = mixtral.nbytes(mixtral.sizes) - 128 * 64 * 4
    assert mixtral.read_bytes(mixtral.sizes) == whole - idle


def test_layers_scaled_by_their_number_stay(tiny_model: Callable[..., Path]) -> None:
    axes = axes_of(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(UnsupportedError, match="scaled by the layer's number"):
        axes.rewritten(replace(axes.sizes, layers=1), (1,))


@pytest.mark.parametrize(
    ("width", "wanted"), [(44, 8), (128, 8), (512, 32), (4096, 256), (14336, 256)]
)
def test_multiples_grow_with_the_width(width: int, wanted: int) -> None:
    assert multiple(width, None) == wanted
    assert multiple(width, 12) == 12

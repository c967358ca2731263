"""A cut source reads as if the smaller model were stored: names, shapes, rows and values."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from unicomp.compress.axes import FUSED_HEADS, Axes
from unicomp.compress.cuts import Cut, CutSource, LayerCut, best
from unicomp.kernels.dense import DenseSource
from unicomp.models import ARCHITECTURES

Opened = Callable[[Path], tuple[Axes, DenseSource]]


def test_of_equal_scores_the_first_stays() -> None:
    assert best(torch.tensor([1.0, 3.0, 1.0, 2.0]), 3).tolist() == [0, 1, 3]
    assert best(torch.zeros(4), 2).tolist() == [0, 1]


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_a_cut_of_nothing_is_the_source(
    arch: str, tiny_model: Callable[..., Path], opened: Opened
) -> None:
    axes, dense = opened(tiny_model(arch))
    source = CutSource(axes, Cut(tuple(range(axes.sizes.layers))), axes.sizes, dense)
    assert list(source.tensors) == list(dense.tensors)
    assert source.tensors.keys() == axes.places.keys()
    for name, meta in source.tensors.items():
        assert torch.equal(source.read(name), dense.read(name))
        assert tuple(meta.shape) == tuple(dense.tensors[name].shape)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_tensor_has_its_shape_and_its_rows(
    arch: str, fused: bool, tiny_model: Callable[..., Path], opened: Opened
) -> None:
    """Cut along every axis at once; some rows of a tensor are those of the whole."""
    axes, dense = opened(tiny_model(arch, fused_experts=fused))
    old = axes.sizes
    sizes = replace(
        old,
        layers=old.layers - 1,
        hidden=old.hidden if arch in FUSED_HEADS else old.hidden - 8,
        ffn=min(old.ffn, 20),
        experts=min(old.experts, 3),
        expert_ffn=min(old.expert_ffn, 12),
    )
    gone = axes.loose[0]
    draw = torch.Generator().manual_seed(0)

    def some(have: int, keep: int) -> torch.Tensor:
        return torch.randperm(have, generator=draw)[:keep].sort().values

    layers = {}
    for layer in axes.model.layers:
        routed = layer.steps[-1][0][0].expert is not None
        have, keep = (old.expert_ffn, sizes.expert_ffn) if routed else (old.ffn, sizes.ffn)
        layers[layer.index] = LayerCut(
            ffn=tuple(some(have, keep) for _ in range(old.experts if routed else 1)),
            experts=some(old.experts, sizes.experts) if routed else None,
        )
    hidden = some(old.hidden, sizes.hidden) if sizes.hidden < old.hidden else None
    kept = tuple(index for index in range(old.layers) if index != gone)
    source = CutSource(axes, Cut(kept, hidden, layers), sizes, dense)
    assert sum(torch.Size(m.shape).numel() for m in source.tensors.values()) == axes.params(sizes)
    for name, meta in source.tensors.items():
        whole = source.read(name)
        assert tuple(whole.shape) == tuple(meta.shape), name
        part = slice(1, min(4, len(whole)))
        assert torch.equal(source.read(name, part), whole[part]), name
        assert len(source.read(name, slice(0, 0))) == 0


def test_which_rows_stay(tiny_model: Callable[..., Path], opened: Opened) -> None:
    """Rows of a query projection are heads of 16; columns of the output projection are too."""
    axes, dense = opened(tiny_model("llama"))
    sizes = replace(axes.sizes, heads=2, kv_heads=1, layers=2)
    one = LayerCut(heads=torch.tensor([2, 3]), kv_heads=torch.tensor([1]))
    source = CutSource(axes, Cut((0, 2), None, {0: one, 2: one}), sizes, dense)
    assert source.config["num_attention_heads"] == 2
    assert source.config["num_hidden_layers"] == 2
    for new, old in ((0, 0), (1, 2)):
        name = "model.layers.{}.self_attn.{}.weight".format
        for what, rows in (("q_proj", slice(32, 64)), ("k_proj", slice(16, 32))):
            weight = dense.read(name(old, what))
            assert torch.equal(source.read(name(new, what)), weight[rows])
            assert not torch.equal(source.read(name(new, what)), weight[: rows.stop - rows.start])
        out = dense.read(name(old, "o_proj"))
        assert torch.equal(source.read(name(new, "o_proj")), out[:, 32:64])

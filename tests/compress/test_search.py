"""Losses without sets of layers, in one walk, are those of stock models without these layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from unicomp.compress import search
from unicomp.compress.axes import Axes
from unicomp.compress.calibrate import Decoder
from unicomp.compress.readout import Readout
from unicomp.kernels.dense import DenseSource
from unicomp.models import ARCHITECTURES

Opened = Callable[[Path], tuple[Axes, DenseSource]]
SETS: list[tuple[int, ...]] = [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2)]


def losses(folder: Path, opened: Opened, ids: Tensor, sets: list[tuple[int, ...]]) -> list[float]:
    axes, dense = opened(folder)
    decoder = Decoder(axes.model, dense.config, dense, batch=2, scratch=None)
    steps: list[int] = []
    readout = Readout(axes.model, dense.config, dense)
    found = search.losses(decoder, readout, ids, sets, steps.append)
    assert steps == list(range(axes.sizes.layers))
    return found


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_each_set_is_left_out(
    arch: str,
    tiny_model: Callable[..., Path],
    opened: Opened,
    stock_loss: Callable[[Any, Tensor], Tensor],
) -> None:
    folder = tiny_model(arch, **{"n_layer" if arch == "gpt2" else "num_hidden_layers": 3})
    ids = torch.randint(4, 128, (5, 32), generator=torch.Generator().manual_seed(0))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    parent, _, leaf = ARCHITECTURES[arch].layers.rpartition(".")
    layers = list(model.get_submodule(ARCHITECTURES[arch].layers))
    wanted = []
    for gone in SETS:
        kept = [layer for index, layer in enumerate(layers) if index not in gone]
        setattr(model.get_submodule(parent), leaf, nn.ModuleList(kept))
        model.config.num_hidden_layers = len(kept)
        wanted.append(float(stock_loss(model, ids).mean()))
    found = losses(folder, opened, ids, SETS)
    assert found == pytest.approx(wanted, rel=1e-4)
    assert len({round(loss, 3) for loss in wanted}) == len(SETS)  # no two sets can be mistaken


def test_only_so_many_tokens_are_measured(
    tiny_model: Callable[..., Path], opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first windows that make `LOST_TOKENS`, and one where that is less than a window."""
    ids = torch.randint(4, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    folder = tiny_model("llama")
    for tokens, windows in ((64, 2), (10, 1)):
        monkeypatch.setattr(search, "LOST_TOKENS", tokens)
        few = losses(folder, opened, ids, [()])
        monkeypatch.setattr(search, "LOST_TOKENS", 1 << 20)
        assert few == losses(folder, opened, ids[:windows], [()])
        assert few != losses(folder, opened, ids, [()])

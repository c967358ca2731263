"""The norm and the head apart from the model give stock transformers' losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from unicomp.compress.axes import Axes
from unicomp.compress.readout import Readout
from unicomp.kernels.dense import DenseSource

Opened = Callable[[Path], tuple[Axes, DenseSource]]
NORMS = {
    "llama": "model.norm",
    "gemma2": "model.norm",
    "gemma3_text": "model.norm",
    "gpt2": "transformer.ln_f",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "mixtral": "model.norm",
}


@pytest.mark.parametrize("piece", [1 << 24, 700])
@pytest.mark.parametrize("arch", sorted(NORMS))
def test_losses_are_those_of_the_whole_model(
    arch: str,
    piece: int,
    tiny_model: Callable[..., Path],
    opened: Opened,
    stock_loss: Callable[[Any, Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However the vocabulary is read; softcaps, tied and untied heads among them."""
    monkeypatch.setattr("unicomp.compress.readout.PIECE", piece)
    folder = tiny_model(arch)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(4, 128, (3, 40), generator=torch.Generator().manual_seed(0))
    states: list[Tensor] = []
    norm = model.get_submodule(NORMS[arch])
    norm.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    wanted = stock_loss(model, ids)
    axes, dense = opened(folder)
    readout = Readout(axes.model, dense.config, dense)
    assert readout.vocab == 128
    got = readout.loss(states[0], ids)
    assert got.shape == (3, 39)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)
    other = readout.loss(states[0], ids.roll(1, 1))
    assert not torch.allclose(other.double(), wanted, rtol=1e-2)  # the comparer sees other words
    torch.testing.assert_close(readout.norm(states[0]), norm(states[0]).detach())

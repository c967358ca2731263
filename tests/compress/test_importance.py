"""What layers are worth equals what stock transformers' hidden states and a brute force say."""

from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from unicomp.checkpoint import Checkpoint
from unicomp.compress.calibrate import Decoder
from unicomp.compress.importance import LayerScores, observe, removal_order
from unicomp.compress.readout import Readout
from unicomp.compress.search import losses
from unicomp.compress.states import HiddenStates
from unicomp.kernels.dense import open_dense
from unicomp.models import ARCHITECTURES, describe


def draw_ids() -> Tensor:
    return torch.randint(4, 128, (6, 40), generator=torch.Generator().manual_seed(0))


def opened(folder: Path) -> tuple[Any, Decoder]:
    dense = open_dense(Checkpoint.open(folder))
    model = describe(dense.config, dense.tensors)
    config = {**dense.config, "attn_implementation": "eager"}
    return dense, Decoder(model, config, dense, batch=4, scratch=None)


def watched(folder: Path, tmp_path: Path, heads: int, kv_heads: int) -> Iterator[LayerScores]:
    _, decoder = opened(folder)
    ids = draw_ids()
    first = next(iter(decoder.embed(ids[:4]))).shape[-1]
    states = HiddenStates(tmp_path / "0", (*ids.shape, first))
    states.write(decoder.embed(ids))
    for layer in decoder.model.layers:
        after = HiddenStates(tmp_path / f"{layer.index + 1}", states.shape)
        module = decoder.load(layer)
        found, _ = observe(
            decoder, layer, module, states, after, heads=heads, kv_heads=kv_heads, sink=True,
            second_order=False, damp=0.01,
        )  # fmt: skip
        decoder.release(layer)
        states = after
        yield found


@torch.no_grad()
def test_scores_are_those_of_stock_transformers(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, ids = tiny_model("llama"), draw_ids()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    seen: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith(("proj", "norm")):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0].double())
            )
    out = model(input_ids=ids, output_attentions=True)
    for index, scores in enumerate(watched(folder, tmp_path, 4, 2)):
        root = f"model.layers.{index}"
        after = f"model.layers.{index + 1}.input_layernorm" if index < 2 else "model.norm"
        pair = seen[f"{root}.input_layernorm"], seen[after]
        cosine = torch.nn.functional.cosine_similarity(*pair, dim=-1).mean()
        assert scores.influence == pytest.approx(1 - float(cosine), abs=1e-5)
        layer = model.model.layers[index]
        norms = layer.mlp.down_proj.weight.double().norm(dim=0)
        ffn = seen[f"{root}.mlp.down_proj"].square().mean((0, 1)).sqrt() * norms
        torch.testing.assert_close(scores.ffn[0], ffn, rtol=1e-4, atol=1e-6)
        x = seen[f"{root}.self_attn.o_proj"].reshape(-1, 4, 16)
        weight = layer.self_attn.o_proj.weight.double().reshape(64, 4, 16)
        added = torch.einsum("thd,ohd->tho", x, weight).square().sum(-1).mean(0).sqrt()
        torch.testing.assert_close(scores.heads, added, rtol=1e-4, atol=1e-6)
        sink = out.attentions[index][:, :, 1:, 0].double().mean((0, 2))
        torch.testing.assert_close(scores.sink, sink, rtol=1e-4, atol=1e-6)
        assert LayerScores.from_json(scores.to_json()).to_json() == scores.to_json()


@torch.no_grad()
def test_experts_are_worth_the_routers_probability(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder, ids = tiny_model("mixtral"), draw_ids()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = model(input_ids=ids, output_router_logits=True).router_logits
    for scores, logits in zip(watched(folder, tmp_path, 4, 2), found, strict=True):
        wanted = logits.double().softmax(-1).reshape(-1, 4).mean(0)
        torch.testing.assert_close(scores.experts, wanted, rtol=1e-4, atol=1e-6)
        assert len(scores.ffn) == 4


def test_removal_order_is_that_of_trying_all() -> None:
    """The unit that goes first, and the pair, are those whose least-squares loss is least."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    weight = torch.randn(5, 12, generator=generator)
    hessian = x.T @ x / len(x)

    def loss(gone: tuple[int, ...]) -> float:
        stays = [c for c in range(12) if c // 2 not in gone]
        fit = torch.linalg.lstsq(x[:, stays].double(), (x @ weight.T).double()).solution
        return float((x[:, stays].double() @ fit - (x @ weight.T).double()).square().sum())

    order = removal_order(hessian, weight, 2, 1e-7)
    assert sorted(order.tolist()) == list(range(6))
    first = min(combinations(range(6), 1), key=loss)
    assert (int(order.argmin()),) == first
    second = min(({first[0], i} for i in range(6) if i != first[0]), key=lambda s: loss(tuple(s)))
    assert set(order.argsort()[:2].tolist()) == second


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "opt", "mixtral"])
@torch.no_grad()
def test_losses_are_those_of_stock_transformers(arch: str, tiny_model: Callable[..., Path]) -> None:
    """Of the whole model, and without its last layer."""
    folder, ids = tiny_model(arch), draw_ids()
    dense, decoder = opened(folder)
    readout = Readout(decoder.model, dense.config, dense)
    last = len(decoder.model.layers) - 1
    found = losses(decoder, readout, ids, [(), (last,)])
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    assert found[0] == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-4)
    del model.get_submodule(ARCHITECTURES[arch].layers)[last]
    model.config.num_hidden_layers = last
    wanted = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    assert found[1] == pytest.approx(wanted, rel=1e-4)
    assert found[0] != pytest.approx(found[1], rel=2e-4)

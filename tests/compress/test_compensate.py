"""Refitting equals damped least squares worked out in float64 from stock transformers' inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from unicomp import text
from unicomp.checkpoint import Checkpoint
from unicomp.hub import Source
from unicomp.kernels.dense import open_dense
from unicomp.recipes.cut.plan import plan_cut
from unicomp.recipes.cut.run import run_cut
from unicomp.recipes.load import from_options

DAMP = 0.02


def cut(model: Path, data: Path, out: Path, method: str, **options: Any) -> Any:
    recipe = from_options(
        "prune",
        method,
        {"damp": DAMP, **options},
        calibration={"data": str(data), "samples": 8, "seq_len": 64},
    )
    checkpoint = Checkpoint.open(model)
    source = Source(model, model.name, None)
    run_cut(plan_cut(recipe, None, source, checkpoint, open_dense(checkpoint), None), out)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def windows(model: Path, data: Path) -> Tensor:
    tokenizer = text.tokenizer(model)
    ids = text.encode(tokenizer, text.read(str(data)), vocab=128)
    return text.windows(ids, seq_len=64, samples=8, seed=0, bos=text.bos_token(tokenizer))


@torch.no_grad()
def inputs(model: Any, module: Any, ids: Tensor) -> Tensor:
    """Return what a module of a stock model reads, float64 [tokens, in]."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(input_ids=ids)
    handle.remove()
    return seen[0].flatten(0, 1).double()


def least_squares(x: Tensor, wanted: Tensor, start: Tensor) -> Tensor:
    """Return the weight nearest to `wanted` = W x, pulled to `start` by the damping."""
    second = x.T @ x / len(x)
    damped = second + DAMP * second.diagonal().mean() * torch.eye(len(second)).double()
    error = wanted - x @ start.T
    return start + (error.T @ x / len(x)) @ torch.linalg.inv(damped)


def near(got: Tensor, wanted: Tensor) -> bool:
    return bool((got.double() - wanted).abs().max() <= 1e-3 * wanted.abs().max())


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_the_first_layers_ffn(
    arch: str, tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """In the first layer nothing before the cut changed; the last linear makes up for it."""
    folder = tiny_model(arch)
    small = cut(folder, tiny_text, tmp_path / "refitted", "width", ffn=24)
    plain = cut(folder, tiny_text, tmp_path / "plain", "width", ffn=24, compensate=False)
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), windows(folder, tiny_text)
    if arch == "llama":
        old, cut_, new = (m.model.layers[0].mlp.down_proj for m in (model, plain, small))
    else:
        old, cut_, new = (m.transformer.h[0].mlp.c_proj for m in (model, plain, small))

    def weight(module: Any) -> Tensor:
        found: Tensor = module.weight.detach().double()
        return found.T if arch == "gpt2" else found

    wanted = inputs(model, old, ids) @ weight(old).T
    found = least_squares(inputs(plain, cut_, ids), wanted, weight(cut_))
    assert near(weight(new), found)
    assert not near(weight(cut_), found)


def test_what_reads_fewer_hidden_channels(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """q, k and v of the first layer are refitted for fewer channels under another norm."""
    folder = tiny_model("llama")
    small = cut(folder, tiny_text, tmp_path / "refitted", "width", hidden=48)
    plain = cut(folder, tiny_text, tmp_path / "plain", "width", hidden=48, compensate=False)
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), windows(folder, tiny_text)
    for leaf in ("q_proj", "k_proj", "v_proj"):
        old, cut_, new = (getattr(m.model.layers[0].self_attn, leaf) for m in (model, plain, small))
        wanted = inputs(model, old, ids) @ old.weight.detach().double().T
        start = cut_.weight.detach().double()
        found = least_squares(inputs(plain, cut_, ids), wanted, start)
        assert near(new.weight.detach(), found)
        assert not near(start, found)


def test_the_layer_before_a_gap_and_the_head(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Its last linear aims at the states after the layers that went, the head at the logits."""
    folder = tiny_model("llama")
    options = {"layers": 1, "criterion": "influence", "contiguous": True}
    small = cut(folder, tiny_text, tmp_path / "refitted", "depth", **options)
    plain = cut(folder, tiny_text, tmp_path / "plain", "depth", compensate=False, **options)
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), windows(folder, tiny_text)
    kept = next(
        i
        for i, layer in enumerate(model.model.layers)
        if torch.equal(layer.mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    )
    with torch.no_grad():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    if kept == 0:
        down = plain.model.layers[0].mlp.down_proj
        start = down.weight.detach().double()
        x = inputs(plain, down, ids)
        last = inputs(model, model.model.norm, ids)
        now = inputs(plain, plain.model.norm, ids)
        found = least_squares(x, last - now + x @ start.T, start)
        assert near(small.model.layers[0].mlp.down_proj.weight.detach(), found)
    assert len(states) == 4
    wanted = inputs(model, model.lm_head, ids) @ model.lm_head.weight.detach().double().T
    start = plain.lm_head.weight.detach().double()
    found = least_squares(inputs(small, small.lm_head, ids), wanted, start)
    assert near(small.lm_head.weight.detach(), found)
    assert not near(start, found)

"""What is counted of one layer of each kind is what is counted of all layers."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import pytest

from unicomp.checkpoint import Checkpoint
from unicomp.compress.counted import Alike, alike
from unicomp.models import Layer, describe
from unicomp.recipes.layers import forecast, timing
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.load import from_options
from unicomp.recipes.stage import throughput

LAYERS = 4
MIXED = {"num_hidden_layers": LAYERS, "mlp_only_layers": [1]}
"""A layer of experts, a dense one, then two more of experts."""


def each(layers: Sequence[Layer], targets: Collection[str]) -> Alike:
    return [(layer, 1) for layer in layers]


def test_layers_are_sorted_by_shapes_experts_and_targets(tiny_model: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(tiny_model("qwen3_moe", **MIXED))
    layers = describe(checkpoint.config, checkpoint.tensors).layers
    every = {one.module for layer in layers for one in layer.linears()}
    assert [(layer.index, count) for layer, count in alike(layers, every)] == [(0, 3), (1, 1)]
    fewer = every - {"model.layers.2.self_attn.v_proj"}
    assert [(layer.index, count) for layer, count in alike(layers, fewer)] == [
        (0, 2),
        (1, 1),
        (2, 1),
    ]


@pytest.mark.parametrize("verb", ["quantize: gptq", "quantize: rtn", "prune: wanda"])
def test_forecasts_are_those_of_each_layer_by_itself(
    verb: str, tiny_model: Callable[..., Path], tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = throughput.rates()
    monkeypatch.setattr(throughput, "rates", lambda: measured)
    kind, method = verb.split(": ")
    recipe = from_options(
        kind,
        method,
        {"ignore": ["re:.*layers.2.*v_proj"]},
        calibration={"data": str(tiny_text), "samples": 2, "seq_len": 64},
    )
    model = str(tiny_model("qwen3_moe", **MIXED))
    found = plan(recipe, model=model)
    for module in (forecast, timing):
        monkeypatch.setattr(module, "alike", each)
    wanted = plan(recipe, model=model)
    assert found.memory == wanted.memory
    assert found.times == pytest.approx(wanted.times, rel=1e-9)
    for module in (forecast, timing):
        monkeypatch.setattr(module, "alike", lambda *of: each(*of)[:1])
    assert plan(recipe, model=model).times["solving"] < 0.9 * wanted.times["solving"]

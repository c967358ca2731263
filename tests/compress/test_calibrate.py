"""Layer by layer must compute what the whole model computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from unicomp import machine
from unicomp.compress.calibrate import Decoder
from unicomp.compress.states import HiddenStates
from unicomp.errors import CheckpointError
from unicomp.models import ARCHITECTURES, Model, describe

AFTER = "post_attention_layernorm"


class Files:
    """Reads one safetensors file with the reference library."""

    def __init__(self, folder: Path) -> None:
        self.file = safe_open(folder / "model.safetensors", "pt")
        self.tensors = {name: self.file.get_slice(name) for name in self.file.keys()}  # noqa: SIM118

    def shapes(self) -> dict[str, Any]:
        """Return something with a shape for every name."""
        return {
            name: torch.empty(part.get_shape(), device="meta")
            for name, part in self.tensors.items()
        }

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """Return a tensor or some of its rows."""
        return self.tensors[name][:] if rows is None else self.tensors[name][rows]


def opened(folder: Path, batch: int = 2, held: bool = False) -> tuple[Model, Decoder]:
    """Return the description and the decoder of a checkpoint in one file."""
    files = Files(folder)
    config = json.loads((folder / "config.json").read_text())
    model = describe(config, files.shapes())
    return model, Decoder(model, config, files, batch=batch, scratch=None if held else folder)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_layer_by_layer_equals_the_whole_model(
    arch: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Embedding, masks, positions, experts and order of layers are the model's own."""
    folder = tiny_model(arch)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(4, 60, (5, 24), generator=torch.Generator().manual_seed(3))
    seen: list[torch.Tensor] = []
    stack = whole.get_submodule(ARCHITECTURES[arch].layers)
    stack[len(stack) - 1].register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        whole(input_ids=ids, use_cache=False)
    model, decoder = opened(folder)
    width = whole.get_input_embeddings().weight.shape[1]
    states = HiddenStates(tmp_path / "0", (5, 24, width))
    states.write(decoder.embed(ids))
    for layer in model.layers:
        module = decoder.load(layer)
        after = HiddenStates(tmp_path / str(layer.index + 1), states.shape)
        crc = after.write(decoder.forward(module, layer, b) for b in states.batches(2))
        assert after.crc32() == crc
        decoder.release(layer)
        assert all(p.is_meta for p in module.parameters())
        states = after
    got = torch.cat(list(states.batches(5)))
    assert torch.allclose(got, seen[0], rtol=1e-4, atol=1e-4 * seen[0].abs().max().item())
    assert not torch.allclose(got[:, 1:], seen[0][:, :-1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("between", "times"), [(0, 2), (1 << 40, 0), (None, 0)])
def test_freed_memory_is_returned_where_more_may_not_be_resident(
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    between: int | None,
    times: int,
) -> None:
    """Before and after a pass over a layer."""
    model, decoder = opened(tiny_model("llama"))
    decoder.between = between
    ids = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(3))
    states = HiddenStates(tmp_path / "0", (2, 8, 64))
    states.write(decoder.embed(ids))
    layer = model.layers[0]
    module = decoder.load(layer)
    returned: list[int] = []
    monkeypatch.setattr(machine, "resident_bytes", lambda: 1 << 30)
    monkeypatch.setattr(machine, "return_freed_memory", lambda: returned.append(1))
    decoder.statistics(layer, module, layer.steps[0], states)
    assert len(returned) == times


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_statistics_are_the_second_moments_of_the_inputs(
    arch: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Hooks on the stock model see the same inputs."""
    folder = tiny_model(arch)
    ids = torch.randint(4, 60, (5, 24), generator=torch.Generator().manual_seed(3))
    model, decoder = opened(folder)
    layer = model.layers[0]
    module = decoder.load(layer)
    width = layer.steps[0][0][0].shape[1]
    states = HiddenStates(tmp_path / "0", (5, 24, width))
    states.write(decoder.embed(ids))
    for step in layer.steps:
        seen: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(step))}
        handles = [
            module.get_submodule(linears[-1].inner).register_forward_pre_hook(
                lambda m, a, kept=seen[i]: kept.append(a[0].reshape(-1, a[0].shape[-1]).double())
            )
            for i, linears in enumerate(step)
        ]
        for batch in states.batches(2):
            decoder.forward(module, layer, batch)
        for handle in handles:
            handle.remove()
        for index, stats in enumerate(decoder.statistics(layer, module, step, states)):
            inputs = torch.cat(seen[index])
            assert stats.tokens == len(inputs)
            assert stats.hessian is not None
            expected = inputs.T @ inputs / len(inputs)
            assert torch.allclose(stats.hessian.double(), expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(2 * stats.hessian.double(), expected, rtol=1e-2)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_what_was_kept_stands_for_what_was_computed(
    arch: str, held: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """After each step is changed, statistics and outputs are those of a plain forward pass."""
    folder = tiny_model(arch)
    ids = torch.randint(4, 60, (5, 24), generator=torch.Generator().manual_seed(3))
    model, decoder = opened(folder, held=held)
    layer = model.layers[-1]
    module = decoder.load(layer)
    states = HiddenStates(tmp_path / "0", (5, 24, layer.steps[0][0][0].shape[1]))
    states.write(decoder.embed(ids))
    for step in layer.steps:
        played = decoder.statistics(layer, module, step, states)
        played_from = decoder._kept, decoder._answers
        decoder._kept, decoder._answers = {}, {}
        plain = decoder.statistics(layer, module, step, states)
        decoder._kept, decoder._answers = played_from
        for one, other in zip(played, plain, strict=True):
            assert one.tokens == other.tokens
            assert one.hessian is not None
            assert other.hessian is not None
            assert torch.allclose(one.hessian, other.hessian, rtol=1e-4, atol=1e-6)
        for shared in step:
            for linear in shared:
                weight = decoder.weight(linear)
                decoder.replace(module, linear, weight + 0.05 * torch.randn_like(weight))
    after = HiddenStates(tmp_path / "1", states.shape)
    decoder.outputs(layer, module, states, after)
    assert decoder._kept or decoder._answers
    for batch, got in zip(states.batches(2), after.batches(2), strict=True):
        wanted = decoder.forward(module, layer, batch)
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    decoder.release(layer)


def test_a_norm_that_nobody_reads_is_not_computed(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a layer's two norms is asked for by the two passes that its linears are in."""
    model, decoder = opened(tiny_model("llama"))
    layer = model.layers[0]
    module = decoder.load(layer)
    states = HiddenStates(tmp_path / "0", (2, 24, layer.steps[0][0][0].shape[1]))
    states.write(decoder.embed(torch.randint(4, 60, (2, 24))))
    norms = {module.get_submodule(name): name for name in ("input_layernorm", AFTER)}
    kind, calls = type(module.get_submodule(AFTER)), list[str]()
    plain = kind.forward

    def counted(norm: torch.nn.Module, given: torch.Tensor) -> Any:
        calls.append(norms[norm])
        return plain(norm, given)

    monkeypatch.setattr(kind, "forward", counted)
    for step in layer.steps:
        decoder.statistics(layer, module, step, states)
    decoder.outputs(layer, module, states, HiddenStates(tmp_path / "1", states.shape))
    assert calls == 2 * ["input_layernorm"] + 2 * [AFTER]


def test_cross_statistic_is_zero_for_equal_models_and_not_for_others(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The cross moment compares what a linear reads here and in the uncompressed layer."""
    folder = tiny_model("llama")
    ids = torch.randint(4, 60, (5, 16), generator=torch.Generator().manual_seed(3))
    model, decoder = opened(folder)
    layer = model.layers[0]
    (down,) = layer.steps[-1][0]
    module = decoder.load(layer)
    states = HiddenStates(tmp_path / "0", (5, 16, layer.steps[0][0][0].shape[1]))
    states.write(decoder.embed(ids))
    after = HiddenStates(tmp_path / "1", states.shape)
    kept = HiddenStates(tmp_path / "down", (5, 16, down.shape[1]))
    assert decoder.record(layer, module, states, after, {down.inner: kept}) == after.crc32()
    (same,) = decoder.statistics(layer, module, layer.steps[-1], states, kept)
    assert same.cross is not None
    assert same.cross.abs().max() == 0
    up = layer.steps[2][0][0]
    decoder.replace(module, up, decoder.weight(up) * 1.5)
    (moved,) = decoder.statistics(layer, module, layer.steps[-1], states, kept)
    seen: list[torch.Tensor] = []
    module.get_submodule(down.inner).register_forward_pre_hook(
        lambda m, args: seen.append(args[0].reshape(-1, down.shape[1]).double())
    )
    for batch in states.batches(2):
        decoder.forward(module, layer, batch)
    inputs = torch.cat(seen)
    before = torch.cat(list(kept.batches(5))).reshape(inputs.shape).double()
    expected = (before - inputs).T @ inputs / len(inputs)
    assert moved.cross is not None
    assert torch.allclose(moved.cross.double(), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 1e-3


def test_not_finite_weights_are_named(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    """NaN in one linear is found when its layer is loaded."""
    folder = tiny_model("llama")
    model, decoder = opened(folder)
    read = decoder.weights.read

    def poisoned(name: str, rows: slice | None = None) -> torch.Tensor:
        value = read(name, rows).clone()
        if name.endswith("layers.1.mlp.up_proj.weight"):
            value[2, 1] = float("nan")
        return value

    decoder.weights.read = poisoned  # type: ignore[method-assign]
    decoder.load(model.layers[0])
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*\[2, 1\]"):
        decoder.load(model.layers[1])

"""One base with many deltas gives what each restored checkpoint gives."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unicomp import load_deltas
from unicomp.compress import methods
from unicomp.errors import CheckpointError, UnicompError, UnsupportedError
from unicomp.kernels.delta_folder import open_delta
from unicomp.kernels.delta_product import DeltaProduct
from unicomp.kernels.deltas import choose
from unicomp.kernels.load import load
from unicomp.recipes.delta.plan import plan_delta
from unicomp.recipes.delta.restore import restore
from unicomp.recipes.delta.run import compress
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options

Fleet = tuple[Path, list[Path], list[Path]]


def tuned_of(base: Path, out: Path, seed: int) -> Path:
    shutil.copytree(base, out)
    draw = torch.Generator().manual_seed(seed)
    tensors = load_file(base / "model.safetensors")
    for name in sorted(tensors):
        noise = torch.randn(tensors[name].shape, generator=draw)
        tensors[name] = tensors[name] + (0.05 * noise).to(tensors[name].dtype)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def fleet_of(base: Path, folder: Path, names: tuple[str, ...]) -> Fleet:
    deltas, restored = [], []
    for seed, name in enumerate(names):
        tuned = tuned_of(base, folder / f"tuned{seed}", seed)
        options = {"base": str(base), "ratio": 0.25}
        method = methods.find("delta", name).model_validate(options)
        delta, again = folder / f"delta{seed}", folder / f"restored{seed}"
        compress(plan_delta(str(tuned), name, method), delta)  # type: ignore[arg-type]
        restore(delta, str(base), again)
        deltas.append(delta)
        restored.append(again)
    return base, deltas, restored


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "gemma3_text"])
def fleet(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Fleet:
    """A base and three deltas over it, with what they restore to; tied heads, biases, norms."""
    base = tiny_model(request.param)
    return fleet_of(base, tmp_path_factory.mktemp("fleet"), ("dqrelo-plus", "dqrelo", "bitdelta"))


def ids() -> Tensor:
    return torch.randint(4, 128, (4, 24), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_every_row_is_its_restored_checkpoint(fleet: Fleet) -> None:
    base, deltas, restored = fleet
    model = load_deltas(base, deltas, compute="exact")
    wanted = [load(folder)(ids()).logits for folder in [*restored, base]]
    for index, logits in zip([0, 1, 2, -1], wanted, strict=True):
        choose(model, index)
        torch.testing.assert_close(model(ids()).logits, logits, atol=1e-3, rtol=1e-4)
    rows = [2, -1, 0, 2]
    choose(model, rows)
    found = model(ids()).logits
    for row, index in enumerate(rows):
        torch.testing.assert_close(found[row], wanted[index][row], atol=1e-3, rtol=1e-4)
    # The comparison would see another delta than the one chosen.
    assert float((found[0] - wanted[0][0]).abs().max()) > 1e-2


@torch.no_grad()
def test_generation_goes_on_with_the_chosen_delta(fleet: Fleet) -> None:
    base, deltas, restored = fleet
    model = load_deltas(base, deltas[:1], compute="exact")
    prompt = ids()[:1]
    words = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    found, wanted = model.generate(prompt, **words), load(restored[0]).generate(prompt, **words)
    assert torch.equal(found, wanted)


def test_what_is_wrong_is_refused(
    fleet: Fleet, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base, deltas, restored = fleet
    with pytest.raises(CheckpointError, match="not the base of this delta"):
        load_deltas(restored[0], deltas)
    with pytest.raises(CheckpointError, match="is no delta"):
        load_deltas(base, [base])
    model = load_deltas(base, deltas[:2])
    with pytest.raises(UnicompError, match="no delta 2: 2 are loaded"):
        choose(model, [0, 2])
    choose(model, [0, 1])
    with pytest.raises(UnicompError, match="2 rows were chosen for, the batch has 4"):
        model(ids())
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        model.save_pretrained(tmp_path)


def test_experts_are_refused_by_name(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base, deltas, _ = fleet_of(tiny_model("mixtral"), tmp_path, ("dqrelo",))
    with pytest.raises(UnsupportedError, match="is of experts"):
        load_deltas(base, deltas)


@pytest.mark.slow
def test_deltas_take_an_eighth_of_the_base(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model("llama", hidden_size=768, intermediate_size=1024, vocab_size=1024)
    _, deltas, _ = fleet_of(base, tmp_path, ("dqrelo-plus",))
    model = load_deltas(base, deltas)
    held = {own for own in model.modules() if isinstance(own, DeltaProduct)}
    sixteen = 2 * sum(own.numel() for own in load_file(base / "model.safetensors").values())
    assert sum(own.nbytes for own in held) <= 0.25 * sixteen * 1.05


@torch.no_grad()
def test_a_base_that_was_quantized_from_the_deltas_base_serves(tmp_path: Path) -> None:
    world, pirate = "builtin:tinyworld", "builtin:tinyworld-pirate"
    method = methods.find("delta", "dqrelo").model_validate({"base": world})
    compress(plan_delta(pirate, "dqrelo", method), tmp_path / "d")  # type: ignore[arg-type]
    recipe = from_options("quantize", "rtn", {"bits": 4, "group_size": 32}, model=world)
    run(plan(recipe), tmp_path / "w4")
    model = load_deltas(tmp_path / "w4", [tmp_path / "d"], compute="exact", dtype=torch.float32)
    by_hand = load(tmp_path / "w4")
    delta = open_delta(tmp_path / "d")
    for name, own in delta.manifest.tensors.items():
        parameter = by_hand.get_parameter(name)
        if own.kind == "delta":
            parameter += delta.deltas(name)[0].decode()
        elif own.kind == "exact":
            parameter.copy_(delta.read(name))
    found, wanted = model(ids()).logits, by_hand(ids()).logits
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    shard = tmp_path / "w4/model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CheckpointError, match="not the base of this delta"):
        load_deltas(tmp_path / "w4", [tmp_path / "d"])

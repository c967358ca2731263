"""Delta folders: what goes in comes out, what does not belong is refused by the tensor's name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unicomp.compress import methods
from unicomp.compress.method import DeltaMethod
from unicomp.errors import CheckpointError, UnicompError
from unicomp.kernels.delta_folder import DeltaFolder, DeltaManifest, open_delta
from unicomp.recipes.delta.plan import plan_delta
from unicomp.recipes.delta.restore import restore
from unicomp.recipes.delta.run import compress

METHODS = methods.methods("delta")
PIRATE, WORLD = "builtin:tinyworld-pirate", "builtin:tinyworld"
SIZE = 64


def method_of(name: str, base: Path | str, **options: Any) -> DeltaMethod:
    kind = methods.find("delta", name)
    assert issubclass(kind, DeltaMethod)
    return kind.model_validate({"base": str(base)} | options)


def made(
    tuned: Path | str, base: Path | str, out: Path, name: str = "dqrelo-plus", **options: Any
) -> DeltaManifest:
    return compress(plan_delta(str(tuned), name, method_of(name, base, **options)), out)


def tuned_of(base: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Copy a checkpoint of one file, its tensors changed."""
    shutil.copytree(base, out)
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def drift(tensors: dict[str, torch.Tensor]) -> None:
    draw = torch.Generator().manual_seed(9)
    for name in sorted(tensors):
        own = tensors[name]
        tensors[name] = own + (0.01 * torch.randn(own.shape, generator=draw)).to(own.dtype)


@pytest.fixture(scope="module")
def pair(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A mixture with 3-D experts in bfloat16, and its fine-tune."""
    base = tiny_model(
        "mixtral",
        dtype=torch.bfloat16,
        fused_experts=True,
        hidden_size=SIZE,
        intermediate_size=SIZE,
    )
    return [base, tuned_of(base, tmp_path_factory.mktemp("moe") / "tuned", drift)]


@pytest.fixture(scope="module")
def delta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("delta") / "pirate"
    made(PIRATE, WORLD, out, "dqrelo")
    return out


def restored_by_hand(opened: DeltaFolder, base: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    own = opened.manifest.tensors[name]
    if own.kind == "exact":
        return opened.read(name)
    if own.kind == "same":
        return base[name]
    parts = [part.decode() for part in opened.deltas(name)]
    decoded = parts[0] if base[name].ndim == 2 else torch.stack(parts)
    return (base[name].float() + decoded).to(base[name].dtype)


@pytest.mark.parametrize("name", METHODS)
def test_restored_is_base_plus_decoded_bit_for_bit(
    name: str, pair: list[Path], tmp_path: Path
) -> None:
    base, tuned = pair
    found = made(tuned, base, tmp_path / "d", name, ratio=0.2)
    assert found.totals.payload <= 0.2 * found.totals.matrix_bytes_16 * 1.01
    restore(tmp_path / "d", str(base), tmp_path / "r")
    opened = open_delta(tmp_path / "d")
    before, after = (load_file(own / "model.safetensors") for own in (base, tmp_path / "r"))
    wanted = load_file(tuned / "model.safetensors")
    assert after.keys() == wanted.keys()
    for key, tensor in after.items():
        assert torch.equal(tensor, restored_by_hand(opened, before, key)), key
        if tensor.ndim == 1:
            assert torch.equal(tensor, wanted[key]), key
    assert any(len(own.shape) == 3 and own.kind == "delta" for own in found.tensors.values())
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "r" / file).read_bytes() == (tuned / file).read_bytes()


@pytest.mark.parametrize("name", METHODS)
def test_twice_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    for out in ("one", "other"):
        made(PIRATE, WORLD, tmp_path / out, name)
    one, other = ((tmp_path / out / "delta.safetensors").read_bytes() for out in ("one", "other"))
    assert one == other


@pytest.mark.parametrize("ratio", [1 / 16, 1 / 8, 1 / 4])
def test_bytes_keep_the_ratio_and_errors_fall(ratio: float, tmp_path: Path) -> None:
    errors = {}
    for name in METHODS:
        found = made(PIRATE, WORLD, tmp_path / name, name, ratio=ratio).totals
        assert found.payload <= ratio * found.matrix_bytes_16 * 1.01
        stored = load_file(tmp_path / name / "delta.safetensors")
        assert sum(t.numel() * t.element_size() for t in stored.values()) == (
            found.payload + found.other
        )
        assert found.error is not None
        errors[name] = found.error
    assert errors["dqrelo-plus"] <= errors["dqrelo"] <= min(errors["svd"], errors["bitdelta"])


def test_a_ratio_out_of_reach_is_declined_with_the_least(tmp_path: Path) -> None:
    with pytest.raises(UnicompError, match=r"least that it could is 0\.06") as caught:
        made(PIRATE, WORLD, tmp_path / "d", "dqrelo", ratio=0.05)
    assert caught.value.hint is not None
    assert "--ratio 0.062" in caught.value.hint
    made(PIRATE, WORLD, tmp_path / "d", "dqrelo", ratio=0.062)
    with pytest.raises(UnicompError, match="least"):
        made(PIRATE, WORLD, tmp_path / "e", "dqrelo", ignore=["embed_tokens"])


def test_a_resized_vocabulary_keeps_the_new_rows_and_says_so(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("llama")

    def grow(tensors: dict[str, torch.Tensor]) -> None:
        drift(tensors)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            rows = torch.randn(5, tensors[name].shape[1])
            tensors[name] = torch.cat([tensors[name], rows])

    tuned = tuned_of(base, tmp_path / "tuned", grow)
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps(config | {"vocab_size": 133}))
    found = made(tuned, base, tmp_path / "d")
    assert any("5 rows are stored exactly" in note for note in found.notes)
    restore(tmp_path / "d", str(base), tmp_path / "r")
    after, wanted = (load_file(own / "model.safetensors") for own in (tmp_path / "r", tuned))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][128:], wanted[name][128:])
        assert after[name].shape == wanted[name].shape


def test_what_was_not_trained_takes_no_bytes(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("qwen2")  # tied

    def one(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] += 0.01

    tuned = tuned_of(base, tmp_path / "tuned", one)
    found = made(tuned, base, tmp_path / "d")
    kinds = {name: own.kind for name, own in found.tensors.items() if own.kind != "same"}
    assert kinds == {"model.layers.0.mlp.up_proj.weight": "delta"}
    restore(tmp_path / "d", str(base), tmp_path / "r")
    after, before = (load_file(own / "model.safetensors") for own in (tmp_path / "r", base))
    assert all(torch.equal(after[key], before[key]) for key in before if key not in kinds)
    with pytest.raises(UnicompError, match="there is no delta"):
        made(base, base, tmp_path / "e")


def test_another_base_is_refused_by_the_tensor(
    delta: Path, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(CheckpointError, match=r"not the base .*`model\.embed_tokens\.weight`"):
        restore(delta, PIRATE, tmp_path / "r")
    with pytest.raises(CheckpointError, match="not the base of this delta"):
        restore(delta, str(tiny_model("llama")), tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert not (tmp_path / "r.partial").exists()


def test_what_is_no_pair_is_refused_by_the_tensor(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model("llama")
    with pytest.raises(CheckpointError, match=r"`llama`, .* `mixtral`: no pair"):
        made(base, tiny_model("mixtral"), tmp_path / "d")
    with pytest.raises(
        CheckpointError, match=r"`model\.layers\.0\.mlp\.down_proj\.weight` has shape"
    ):
        made(base, tiny_model("llama", intermediate_size=52), tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"`lm_head\.weight` .* is not in"):
        made(base, tiny_model("llama", tie_word_embeddings=True), tmp_path / "d")


def test_a_nan_is_refused_by_the_tensor(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_model("llama")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan

    tuned = tuned_of(base, tmp_path / "tuned", spoil)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.* NaN"):
        made(tuned, base, tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_every_flipped_bit_is_found_by_the_tensor(delta: Path, tmp_path: Path) -> None:
    whole = (delta / "delta.safetensors").read_bytes()
    infos = open_delta(delta).tensors
    for name, info in list(infos.items())[::7]:
        spoilt = tmp_path / "spoilt"
        shutil.rmtree(spoilt, ignore_errors=True)
        shutil.copytree(delta, spoilt)
        at = info.offset + info.nbytes // 2
        flipped = bytes([whole[at] ^ 1])
        (spoilt / "delta.safetensors").write_bytes(whole[:at] + flipped + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=f"`{name}` is not as"):
            restore(spoilt, WORLD, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("cut", [1, 100, 250_000])
def test_a_truncated_file_is_found(cut: int, delta: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(delta, spoilt)
    whole = (spoilt / "delta.safetensors").read_bytes()
    (spoilt / "delta.safetensors").write_bytes(whole[:-cut])
    with pytest.raises(CheckpointError, match=r"delta\.safetensors"):
        restore(spoilt, WORLD, tmp_path / "r")


@pytest.mark.parametrize("harm", ["zero", "shape", "schema", "tokenizer", "absent", "json"])
def test_a_manifest_that_is_another_is_refused(harm: str, delta: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(delta, spoilt)
    path = spoilt / "unicomp.json"
    value = json.loads(path.read_text())
    if harm == "zero":
        value["zero"] = "plus"
    elif harm == "shape":
        value["tensors"]["model.embed_tokens.weight"]["rank"] += 1
    elif harm == "schema":
        value["schema"] = "unicomp.manifest/1"
    elif harm == "tokenizer":
        (spoilt / "tokenizer.json").write_text("{}")
    path.write_text("{" if harm == "json" else json.dumps(value))
    if harm == "absent":
        (spoilt / "delta.safetensors").unlink()
    with pytest.raises(CheckpointError):
        open_delta(spoilt)

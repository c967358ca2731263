"""Stock transformers with compressed-tensors loads what we write, and so does our own loader.

The reference is independent: numpy rounds the weights, and a second, dense checkpoint holds what
the codes stand for; stock transformers loads both.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unicomp.checkpoint import Checkpoint
from unicomp.errors import CheckpointError
from unicomp.kernels import format as formats
from unicomp.kernels.format import Settled, Wish
from unicomp.kernels.load import load
from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.models import Linear, describe

pytest.importorskip("compressed_tensors")

Choice = Callable[[str], Scheme | None]
NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
TOLERANCE = 1e-4


@dataclass
class Stored:
    """A quantized checkpoint, and the dense one that it stands for."""

    packed: Path
    dense: Path
    settled: Settled


def rounded(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[PackedTensor, Tensor]:
    """Round to nearest in numpy: the packed weight, and what it stands for in `dtype`."""
    values = weight.double().numpy()
    out, columns = values.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    low, high = -(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1) - 1
    codes = np.zeros((out, columns))
    dense = np.zeros((out, columns))
    scales, zeros = [], []
    for start in range(0, columns, size):
        part = values[:, start : start + size]
        if scheme.symmetric:
            scale = np.abs(part).max(1) / ((high - low) / 2) + 1e-6
        else:
            scale = (np.maximum(part.max(1), 0) - np.minimum(part.min(1), 0)) / (high - low) + 1e-6
        kept = torch.from_numpy(scale).to(dtype)
        scale = kept.double().numpy()
        zero = np.zeros(out)
        if not scheme.symmetric:
            zero = np.clip(np.round(low - np.minimum(part.min(1), 0) / scale), low, high)
        own = np.clip(np.round(part / scale[:, None]) + zero[:, None], low, high)
        codes[:, start : start + size] = own
        dense[:, start : start + size] = (own - zero[:, None]) * scale[:, None]
        scales.append(kept)
        zeros.append(torch.from_numpy(zero).to(torch.int8))
    packed = PackedTensor(
        torch.from_numpy(codes).to(torch.int8),
        torch.stack(scales, 1),
        None if scheme.symmetric else torch.stack(zeros, 1),
        scheme,
    )
    return packed, torch.from_numpy(dense).to(dtype)


def store(source: Path, folder: Path, choose: Choice, loaders: Sequence[str] = ()) -> Stored:
    """Quantize a checkpoint and write it twice under `folder`, packed and dense."""
    checkpoint = Checkpoint.open(source)
    model = describe(checkpoint.config, checkpoint.tensors)
    linears = list(model.linears())
    wishes = [
        Wish(one.module, one.shape, choose(one.module), one.transposed, one.expert is not None)
        for one in linears
    ]
    settled = formats.find("compressed-tensors").settle(wishes, loaders)
    tensors: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        tensors |= load_file(source / shard)
    dense, packed = dict(tensors), dict(tensors)
    for linear in linears:
        scheme = settled.schemes[linear.module]
        if scheme is not None:
            name = linear.part.tensor
            weight = tensors[name].T if linear.transposed else tensors[name]
            codes, dense_weight = rounded(weight, scheme, weight.dtype)
            dense[name] = (dense_weight.T if linear.transposed else dense_weight).contiguous()
            del packed[name]
            stored = settled.format.pack(linear.module, codes)
            metas = settled.format.layout(linear.module, linear.shape, scheme, NAMES[weight.dtype])
            assert {meta.name: meta.shape for meta in metas} == {
                key: tuple(value.shape) for key, value in stored.items()
            }
            assert sum(meta.nbytes for meta in metas) == sum(t.nbytes for t in stored.values())
            packed |= stored
    for path in settled.stacked:
        packed = stack(packed, path, [one for one in linears if one.module.startswith(path + ".")])
    schemes = {module: scheme for module, scheme in settled.schemes.items() if scheme is not None}
    others = [module for module, scheme in settled.schemes.items() if scheme is None]
    routers = [name.removesuffix(".weight") for name in tensors if name.endswith("gate.weight")]
    config = settled.format.config(schemes, [*others, *routers, "lm_head"])
    found = Stored(folder / "packed", folder / "dense", settled)
    write(found.packed, packed, checkpoint.config | {"quantization_config": config})
    write(found.dense, dense, checkpoint.config)
    return found


def stack(tensors: dict[str, Tensor], path: str, linears: list[Linear]) -> dict[str, Tensor]:
    """Replace a layer's dense experts by the two 3-D tensors of the transformers model."""
    parts: dict[str, list[Tensor]] = {}
    for linear in linears:
        parts.setdefault(linear.module.rpartition(".")[2], []).append(
            tensors.pop(linear.module + ".weight")
        )
    gate, up, down = (
        torch.stack(parts[name])
        for name in (("w1", "w3", "w2") if "w1" in parts else ("gate_proj", "up_proj", "down_proj"))
    )
    inside = path.replace("block_sparse_moe", "mlp")
    return tensors | {
        f"{inside}.gate_up_proj": torch.cat((gate, up), 1),
        f"{inside}.down_proj": down,
    }


def write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, object]) -> None:
    """Save one checkpoint."""
    folder.mkdir(parents=True)
    copies = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def stock(folder: Path, dtype: torch.dtype | None = None) -> Tensor:
    """Return the logits of the stock loader, with not one key missing or left over."""
    from transformers import AutoModelForCausalLM

    kind = {} if dtype is None else {"dtype": dtype}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kind)
    assert not any(info.values()), info
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    """Return float32 logits of 32 tokens."""
    found: Tensor = model(torch.arange(4, 36)[None]).logits.float()
    return found


def check(stored: Stored, source: Path) -> None:
    """Hold stock loader, our loader and the dense reference to one another, and to a difference."""
    reference, packed = stock(stored.dense), stock(stored.packed)
    assert torch.allclose(packed, reference, atol=TOLERANCE, rtol=0)
    assert torch.allclose(logits(load(stored.packed)), packed, atol=TOLERANCE, rtol=0)
    assert not torch.allclose(stock(source), reference, atol=10 * TOLERANCE, rtol=0)


def always(scheme: Scheme) -> Choice:
    """Choose one scheme for all."""
    return lambda module: scheme


ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox",
    "opt", "olmo2", "mixtral", "qwen3_moe",
)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_loads_whole(
    arch: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model(arch)
    stored = store(source, tmp_path, always(Scheme(4, 32)))
    assert all(stored.settled.schemes.values())
    check(stored, source)


@pytest.mark.parametrize("bits", range(2, 9))
def test_every_width_of_code(bits: int, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    check(store(source, tmp_path, always(Scheme(bits, 16))), source)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(("bits", "size"), [(4, 32), (3, -1), (8, 4), (2, 16)])
def test_zero_points(
    arch: str, bits: int, size: int, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model(arch)
    check(store(source, tmp_path, always(Scheme(bits, size, False))), source)


@pytest.mark.parametrize("symmetric", [True, False])
def test_schemes_mix(symmetric: bool, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("llama")

    def choose(module: str) -> Scheme | None:
        if "o_proj" in module:
            return None
        if "down_proj" in module:
            return Scheme(8, -1, symmetric)
        if ".1." in module:
            return Scheme(3, 16, symmetric)
        return Scheme(4, 32, True) if "k_proj" in module else Scheme(4, 32, symmetric)

    stored = store(source, tmp_path, choose)
    config = json.loads((stored.packed / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) >= 3
    assert "dequantize" not in config
    check(stored, source)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_half_precision(
    dtype: torch.dtype, symmetric: bool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model("llama", dtype=dtype)
    stored = store(source, tmp_path, always(Scheme(4, 32, symmetric)))
    assert torch.equal(stock(stored.packed), stock(stored.dense))
    for kind in (dtype, torch.float32):
        assert torch.equal(logits(load(stored.packed, dtype=kind)), stock(stored.packed, kind))


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_experts(arch: str, bits: int, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model(arch)

    def choose(module: str) -> Scheme:
        return (
            Scheme(bits, 4) if "experts" in module else Scheme(4, 32 if "q_proj" in module else -1)
        )

    stored = store(source, tmp_path, choose)
    assert stored.settled.stacked == ()
    check(stored, source)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("case", ["all", "layer", "one", "zero points"])
def test_dense_experts_beside_packed_attention(
    arch: str, case: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model(arch)

    def choose(module: str) -> Scheme | None:
        ignored = {
            "all": r"experts",
            "layer": r"layers\.1.*experts",
            "one": r"1.*experts\.2\.(w2|down)",
        }
        if re.search(ignored.get(case, "never"), module):
            return None
        return Scheme(4, 4, symmetric="experts" not in module or case != "zero points")

    stored = store(source, tmp_path, choose)
    layers = 2 if case in ("all", "zero points") else 1
    assert len(stored.settled.stacked) == layers
    check(stored, source)


def test_experts_share_one_scheme(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("mixtral")
    stored = store(source, tmp_path, lambda module: Scheme(8 if ".0." in module[:16] else 4, 4))
    assert [path.count("layers.0") for path in stored.settled.stacked] in ([0], [1])
    assert any("one scheme" in reason for reason in stored.settled.why.values())
    check(stored, source)


def test_conv1d_takes_one_scheme(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("gpt2")
    stored = store(source, tmp_path, lambda m: Scheme(8 if "attn.c_proj" in m else 4, 32))
    dense = [module for module, scheme in stored.settled.schemes.items() if scheme is None]
    assert len(dense) == 2
    assert all(module.endswith("attn.c_proj") for module in dense)
    check(stored, source)


def test_conv1d_without_prefix(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "short"
    shutil.copytree(tiny_model("gpt2"), source)
    tensors = load_file(source / "model.safetensors")
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(short, source / "model.safetensors", metadata={"format": "pt"})
    check(store(source, tmp_path, always(Scheme(4, 16))), source)


def test_a_dropped_tensor_is_seen(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    stored = store(source, tmp_path, always(Scheme(4, 32)))
    tensors = load_file(stored.packed / "model.safetensors")
    name = "model.layers.2.self_attn.k_proj.weight_scale"
    save_file(
        tensors | {name: tensors[name] * 1.01},
        stored.packed / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert not torch.allclose(stock(stored.packed), stock(stored.dense), atol=TOLERANCE, rtol=0)
    del tensors[name]
    save_file(tensors, stored.packed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssertionError):
        stock(stored.packed)
    with pytest.raises(CheckpointError, match="weight_scale"):
        load(stored.packed)

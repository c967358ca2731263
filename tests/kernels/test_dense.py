"""What others quantized reads as the weights that the codes stand for, or is refused by name."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unicomp.checkpoint import Checkpoint
from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.kernels.formats.gptq import Gptq
from unicomp.kernels.packed import PackedTensor, Scheme

NORM = {"model.norm.weight": torch.ones(4)}
M = "model.layers.0.mlp.fc"


def save(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Checkpoint:
    """Write a checkpoint that holds a norm and these tensors."""
    folder.mkdir(exist_ok=True)
    kept = {name: tensor.contiguous().clone() for name, tensor in (NORM | dict(tensors)).items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    return Checkpoint.open(folder)


def check(source: DenseSource, expected: Tensor, name: str = f"{M}.weight") -> None:
    """Compare a weight and its parts; nothing of how it is stored may show."""
    assert set(source.tensors) == {name, "model.norm.weight"}
    assert source.tensors[name].shape == tuple(expected.shape)
    assert "quantization_config" not in source.config
    weight = source.read(name)
    assert weight.shape == expected.shape
    assert torch.equal(weight, expected.to(weight.dtype))
    height = len(expected)
    for rows in (slice(0, 1), slice(1, height), slice(height // 2, height // 2), slice(2, None)):
        assert torch.equal(source.read(name, rows), weight[rows])
    assert torch.equal(source.read("model.norm.weight", slice(1, 3)), torch.ones(2))
    (note,) = source.notes
    assert "already quantized" in note


def compressed(weights: Mapping[str, Any], form: str, **more: Any) -> dict[str, Any]:
    """Return a quantization_config with one group."""
    full = {"type": "int", "symmetric": True, "dynamic": False, **weights}
    group = {"targets": ["Linear"], "weights": full, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "version": "0.20.0",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **more,
    }


def test_a_plain_checkpoint_is_itself(tmp_path: Path) -> None:
    source = open_dense(save(tmp_path, {f"{M}.weight": torch.ones(2, 3)}))
    assert source.notes == ()
    assert source.tensors[f"{M}.weight"].dtype == "F32"
    assert torch.equal(source.read(f"{M}.weight"), torch.ones(2, 3))


CT_CASES = [
    ({"num_bits": 4, "strategy": "group", "group_size": 16}, "pack-quantized"),
    ({"num_bits": 4, "strategy": "group", "group_size": 16, "symmetric": False}, "pack-quantized"),
    ({"num_bits": 3, "strategy": "channel"}, "pack-quantized"),
    ({"num_bits": 8, "strategy": "channel", "symmetric": False}, "pack-quantized"),
    ({"num_bits": 5, "strategy": "tensor"}, "pack-quantized"),
    ({"num_bits": 4, "strategy": "block", "block_structure": [1, 24]}, "pack-quantized"),
    ({"num_bits": 8, "strategy": "channel"}, "int-quantized"),
    ({"num_bits": 8, "strategy": "tensor"}, "int-quantized"),
    ({"num_bits": 8, "strategy": "channel", "symmetric": False}, "int-quantized"),
    ({"num_bits": 8, "type": "float", "strategy": "channel"}, "float-quantized"),
    ({"num_bits": 8, "type": "float", "strategy": "tensor"}, "naive-quantized"),
    ({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [8, 16]},
     "float-quantized"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "form"), CT_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compressed_tensors_own_files(
    weights: dict[str, Any], form: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    config = compressed(weights, form)
    group = config["config_groups"]["group_0"]
    scheme = quantization.QuantizationScheme.model_validate(group)
    weight = torch.randn(20, 48).to(dtype)
    down, along = {"channel": (1, 48), "tensor": (20, 48), "group": (1, 16)}.get(
        weights["strategy"], weights.get("block_structure")
    )
    grid = (-(-20 // down), -(-48 // along))
    state = {"weight": weight, "weight_scale": (torch.rand(grid) * 0.05 + 0.05).to(dtype)}
    if weights["strategy"] == "tensor":
        state["weight_scale"] = state["weight_scale"].reshape(1)
    if not weights.get("symmetric", True):
        state["weight_zero_point"] = torch.randint(-4, 4, grid, dtype=torch.int8)
    compressor = base.BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(stored, scheme)["weight"]
    tensors = {f"{M}.{name}": tensor for name, tensor in stored.items()}
    name = str(dtype).removeprefix("torch.")
    checkpoint = save(tmp_path, tensors, quantization_config=config, dtype=name)
    check(open_dense(checkpoint), expected)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_words_of_before_018_hold_whole_codes(bits: int, tmp_path: Path) -> None:
    low, high = Scheme(bits, -1).code_range
    codes = np.random.default_rng(0).integers(low, high + 1, (12, 64))
    zero = np.random.default_rng(1).integers(low, high + 1, (12, 1))
    scale = torch.rand(12, 1)

    def old(values: np.ndarray[Any, Any]) -> Tensor:
        per = 32 // bits
        padded = np.pad(values - low, ((0, 0), (0, -values.shape[1] % per)))
        fields = padded.reshape(len(values), -1, per) << (np.arange(per) * bits)
        return torch.from_numpy(fields.sum(-1).astype(np.uint32).view(np.int32))

    tensors = {
        f"{M}.weight_packed": old(codes),
        f"{M}.weight_scale": scale,
        f"{M}.weight_shape": torch.tensor([12, 64]),
        f"{M}.weight_zero_point": old(zero.T).T,
    }
    weights = {"num_bits": bits, "strategy": "channel", "symmetric": False}
    config = compressed(weights, "pack-quantized", version="0.12.2")
    checkpoint = save(tmp_path, tensors, quantization_config=config, dtype="float32")
    expected = torch.from_numpy((codes - zero).astype(np.float32)) * scale
    check(open_dense(checkpoint), expected)
    config["version"] = "0.18.0"
    with pytest.raises(CheckpointError, match="does not hold"):
        open_dense(save(tmp_path, tensors, quantization_config=config))


def test_groups_in_another_order(tmp_path: Path) -> None:
    codes = torch.randint(-8, 8, (6, 32), dtype=torch.int8)
    order = torch.randperm(32) // 8
    scale = torch.rand(6, 4)
    packed = PackedTensor(codes, scale, None, Scheme(4, 8))
    from unicomp.kernels.formats.compressed_tensors import CompressedTensors

    tensors = CompressedTensors().pack(M, packed) | {f"{M}.weight_g_idx": order.int()}
    config = compressed({"num_bits": 4, "strategy": "group", "group_size": 8}, "pack-quantized")
    checkpoint = save(tmp_path, tensors, quantization_config=config, dtype="float32")
    check(open_dense(checkpoint), codes.float() * scale[:, order])
    unset = {f"{M}.weight_g_idx": torch.full((32,), -1, dtype=torch.int32)}
    checkpoint = save(tmp_path, tensors | unset, quantization_config=config, dtype="float32")
    check(open_dense(checkpoint), packed.dequantize())


def test_only_what_inference_needs_is_hidden(tmp_path: Path) -> None:
    weights = {"num_bits": 8, "strategy": "channel"}
    tensors = {
        f"{M}.weight": torch.ones(4, 4, dtype=torch.int8),
        f"{M}.weight_scale": torch.ones(4, 1),
        f"{M}.input_scale": torch.ones(1),
        f"{M}.bias": torch.ones(4),
        "model.layers.0.self_attn.k_scale": torch.ones(1),
    }
    config = compressed(weights, "int-quantized")
    source = open_dense(save(tmp_path, tensors, quantization_config=config))
    assert set(source.tensors) == {f"{M}.weight", f"{M}.bias", "model.norm.weight"}
    assert source.tensors[f"{M}.weight"].dtype == "BF16"
    source = open_dense(save(tmp_path, tensors, quantization_config=config), dtype="F32")
    assert source.read(f"{M}.weight").dtype == torch.float32
    assert source.tensors[f"{M}.weight"].dtype == "F32"


def gptq_config(scheme: Scheme, **more: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        **more,
    }


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("order", [True, False])
def test_gptq(bits: int, symmetric: bool, version: str, order: bool, tmp_path: Path) -> None:
    scheme = Scheme(bits, 16, symmetric)
    low, high = scheme.code_range
    codes = torch.randint(low, high + 1, (32, 64), dtype=torch.int8)
    zero = torch.randint(low, high + 1, (32, 4), dtype=torch.int8)
    packed = PackedTensor(codes, torch.rand(32, 4).half(), None if symmetric else zero, scheme)
    tensors = Gptq(v2=True).pack(M, packed)
    group = torch.arange(64) // 16
    if order:
        group = group[torch.randperm(64)]
        tensors[f"{M}.g_idx"] = group.int()
    if version == "gptq":  # every field less one, modulo its range
        signed = (packed.zero_point if packed.zero_point is not None else zero * 0).T
        less = torch.where(signed == low, high, signed - 1).to(torch.int8)
        tensors[f"{M}.qzeros"] = Gptq(v2=True).pack(
            M, PackedTensor(codes, packed.scale, less.T, Scheme(bits, 16, False))
        )[f"{M}.qzeros"]
    config = gptq_config(scheme, checkpoint_format=version, desc_act=order)
    checkpoint = save(tmp_path, tensors, quantization_config=config, dtype="float16")
    if bits == 3 and version == "gptq" and not symmetric:
        with pytest.raises(UnsupportedError, match="3-bit gptq of version 1"):
            open_dense(checkpoint)
        return
    shift = 0 if symmetric else zero.float()[:, group]
    expected = (codes.float() - shift) * packed.scale.float()[:, group]
    check(open_dense(checkpoint), expected.half())
    if not order:
        del tensors[f"{M}.g_idx"]
        checkpoint = save(tmp_path, tensors, quantization_config=config, dtype="float16")
        check(open_dense(checkpoint), expected.half())


def test_gptq_of_conv1d_lies_as_the_model_holds_it(tmp_path: Path) -> None:
    scheme = Scheme(4, 16)
    codes = torch.randint(-8, 8, (32, 64), dtype=torch.int8)
    packed = PackedTensor(codes, torch.rand(32, 4).half(), None, scheme)
    checkpoint = save(
        tmp_path,
        Gptq().pack(M, packed),
        quantization_config=gptq_config(scheme),
        model_type="gpt2",
        dtype="float16",
    )
    check(open_dense(checkpoint), packed.dequantize(torch.float16).T)


def test_gptq_dynamic_widths(tmp_path: Path) -> None:
    eight = Scheme(8, 16)
    codes = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    packed = PackedTensor(codes, torch.rand(32, 4).half(), None, eight)
    dynamic = {r"+:.*layers\.0\.": {"bits": 8}}
    config = gptq_config(Scheme(4, 16), dynamic=dynamic)
    checkpoint = save(tmp_path, Gptq().pack(M, packed), quantization_config=config, dtype="float16")
    check(open_dense(checkpoint), packed.dequantize(torch.float16))
    config["dynamic"] = {}
    with pytest.raises(CheckpointError, match="qweight"):
        open_dense(save(tmp_path, Gptq().pack(M, packed), quantization_config=config))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(32, 48), (20, 40)])
def test_fp8_blocks(kind: torch.dtype, shape: tuple[int, int], tmp_path: Path) -> None:
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    grid = (-(-shape[0] // 16), -(-shape[1] // 16))
    scales = torch.randint(120, 134, grid, dtype=torch.uint8)
    factors = 2.0 ** (scales.double() - 127)
    if kind != torch.uint8:
        scales = (torch.rand(grid) + 0.1).to(kind)
        factors = scales.double()
    expected = np.zeros(shape)
    for row in range(shape[0]):
        for column in range(shape[1]):
            factor = float(factors[row // 16, column // 16])
            expected[row, column] = float(weight[row, column]) * factor
    tensors = {f"{M}.weight": weight, f"{M}.weight_scale_inv": scales}
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    checkpoint = save(tmp_path, tensors, quantization_config=config, dtype="bfloat16")
    check(open_dense(checkpoint), torch.from_numpy(expected).to(torch.bfloat16))
    if shape == (32, 48):
        fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
        theirs = fp8.Fp8Dequantize(None)._dequantize_one(weight, scales, torch.bfloat16)
        assert torch.equal(open_dense(checkpoint).read(f"{M}.weight"), theirs)


def test_fp8_with_one_scale_and_without_any(tmp_path: Path) -> None:
    weight = torch.randn(6, 5).to(torch.float8_e4m3fn)
    config = {"quant_method": "fp8", "weight_block_size": None}
    tensors = {f"{M}.weight": weight, f"{M}.weight_scale_inv": torch.tensor(0.5)}
    checkpoint = save(tmp_path, tensors, quantization_config=config, dtype="float32")
    check(open_dense(checkpoint), weight.float() * 0.5)
    with pytest.raises(CheckpointError, match="without a `_scale_inv`"):
        open_dense(save(tmp_path, {f"{M}.weight": weight}, quantization_config=config))


def test_mxfp4_experts(tmp_path: Path) -> None:
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (3, 8, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 8, 2), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    config = {"quant_method": "mxfp4"}
    checkpoint = save(tmp_path, tensors, quantization_config=config, model_type="gpt_oss")
    expected = theirs.convert_moe_packed_tensors(blocks, scales)
    check(open_dense(checkpoint), expected, name)
    assert expected.shape == (3, 64, 8)


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "bitnet", "hqq", "quanto", None])
def test_other_methods_are_refused_by_name(method: str | None, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, {}, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedError, match=f"`{method}`") as caught:
        open_dense(checkpoint)
    assert str(tmp_path / "config.json") in caught.value.message
    assert caught.value.hint is not None


FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
PACKED = {
    f"{M}.weight_packed": torch.zeros(4, 2, dtype=torch.int32),
    f"{M}.weight_scale": torch.ones(4, 1),
    f"{M}.weight_shape": torch.tensor([4, 16]),
}
CHANNEL = {"num_bits": 4, "strategy": "channel"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (compressed(FP4, "nvfp4-pack-quantized"), "nvfp4-pack-quantized"),
        (compressed(CHANNEL, "marlin-24"), "marlin-24"),
        (compressed(CHANNEL, "pack-quantized", sparsity_config={"format": "x"}), "sparsity_config"),
        (compressed(CHANNEL, "pack-quantized", transform_config={"config_groups": {"a": 1}}),
         "transform_config"),
        (gptq_config(Scheme(4, 16), checkpoint_format="marlin"), "marlin"),
        (gptq_config(Scheme(4, 16), pack_dtype="int8"), "int8"),
    ],
)  # fmt: skip
def test_unread_parts_of_read_methods(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=says):
        open_dense(save(tmp_path, PACKED, quantization_config=config))


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (PACKED | {f"{M}.weight_shape": torch.tensor([4, 17])}, CHANNEL),
        (PACKED | {f"{M}.weight_shape": torch.tensor([5, 16])}, CHANNEL),
        (PACKED | {f"{M}.weight_shape": torch.tensor([-4, -16])}, CHANNEL),
        (PACKED | {f"{M}.weight_scale": torch.ones(4, 2)}, CHANNEL),
        (PACKED, {"num_bits": 4, "strategy": "group", "group_size": 8}),
        (PACKED, {"num_bits": 8, "strategy": "channel"}),
        (PACKED, {"num_bits": 4, "strategy": "channel", "symmetric": False}),
        ({name: PACKED[name] for name in list(PACKED)[:2]}, CHANNEL),
    ],
)
def test_tensors_that_do_not_fit_the_config(
    tensors: dict[str, Tensor], config: dict[str, Any], tmp_path: Path
) -> None:
    quantization = compressed(config, "pack-quantized")
    with pytest.raises(CheckpointError, match=r"mlp\.fc"):
        open_dense(save(tmp_path, tensors, quantization_config=quantization))


@pytest.mark.parametrize(
    "broken",
    [
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"targets": ["Linear"]}}},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "compressed-tensors", "config_groups": {"a": 7}},
        {"quant_method": "compressed-tensors", "config_groups": [1]},
        {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {}}}},
    ],
)
def test_a_malformed_config_is_the_checkpoints_fault(broken: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        open_dense(save(tmp_path, PACKED, quantization_config=broken))


def test_modules_that_no_group_names(tmp_path: Path) -> None:
    config = compressed(CHANNEL, "pack-quantized")
    config["config_groups"]["group_1"] = {"targets": ["re:never"], "weights": {"num_bits": 8}}
    config["config_groups"]["group_0"]["targets"] = ["re:elsewhere"]
    with pytest.raises(CheckpointError, match="no entry"):
        open_dense(save(tmp_path, PACKED, quantization_config=config))

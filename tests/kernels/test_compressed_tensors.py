"""Bytes and config of `pack-quantized` are compressed-tensors' own, and loaders' rules hold."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
import torch

from unicomp.errors import UnsupportedError
from unicomp.kernels import format as formats
from unicomp.kernels.format import Settled, Wish
from unicomp.kernels.formats.compressed_tensors import CompressedTensors, find_group
from unicomp.kernels.packed import PackedTensor, Scheme

PLAIN = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
W4 = Scheme(4, 32)
A4 = Scheme(4, 32, symmetric=False)


def linears(
    scheme: Scheme | None, columns: int = 64, layers: int = 3, **named: Scheme | None
) -> list[Wish]:
    """Wish one scheme for a small llama, or another by the last part of a name."""
    return [
        Wish(
            f"model.layers.{layer}.{part}",
            (64, columns),
            named.get(part.rpartition(".")[2], scheme),
        )
        for layer in range(layers)
        for part in PLAIN
    ]


def settle(wishes: Iterable[Wish], *loaders: str) -> Settled:
    return formats.find("compressed-tensors").settle(list(wishes), loaders)


def config(settled: Settled, dense: Iterable[str] = ()) -> dict[str, Any]:
    kept = {module: scheme for module, scheme in settled.schemes.items() if scheme is not None}
    left = [module for module, scheme in settled.schemes.items() if scheme is None]
    return settled.format.config(kept, [*left, *dense])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("size", [-1, 8, 43])
@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes_are_those_of_compressed_tensors(bits: int, size: int, symmetric: bool) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
    schemes = pytest.importorskip("compressed_tensors.quantization")
    scheme = Scheme(bits, size, symmetric)
    low, high = scheme.code_range
    shape = (20, 172 if size == 43 else 176)
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8)
    grid = (20, scheme.groups(shape[1]))
    zero = None if symmetric else torch.randint(low, high + 1, grid, dtype=torch.int8)
    packed = PackedTensor(codes, torch.rand(grid) + 0.5, zero, scheme)
    layout = CompressedTensors()
    tensors = layout.pack("m", packed)
    weights = layout.config({"m": scheme}, [])["config_groups"]["group_0"]["weights"]
    theirs = schemes.QuantizationScheme(
        targets=["Linear"], weights=schemes.QuantizationArgs.model_validate(weights)
    )
    state = {"weight": packed.dequantize(), "weight_scale": packed.scale}
    if zero is not None:
        state["weight_zero_point"] = zero
    expected = base.PackedQuantizationCompressor.compress(state, theirs)
    assert {name.removeprefix("m.") for name in tensors} == set(expected)
    for name, tensor in expected.items():
        assert tensors[f"m.{name}"].dtype == tensor.dtype
        assert torch.equal(tensors[f"m.{name}"], tensor), name
    back = base.PackedQuantizationCompressor.decompress(
        {name.removeprefix("m."): tensor for name, tensor in tensors.items()}, theirs
    )
    assert torch.equal(back["weight"], packed.dequantize())


def test_one_scheme_is_the_config_that_every_loader_knows() -> None:
    found = config(settle(linears(W4)), ["lm_head"])
    assert found == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": "0.20.0",
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 32,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "wishes",
    [
        linears(W4),
        linears(W4, down_proj=Scheme(8, -1)),
        linears(W4, down_proj=None),
        linears(W4, columns=44),
        linears(A4),
        linears(A4, down_proj=Scheme(8, -1)),
    ],
)
def test_compressed_tensors_reads_the_config_as_we_do(wishes: list[Wish]) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    settled = settle(wishes)
    found = config(settled, ["lm_head"])
    quantization.QuantizationConfig.model_validate(found)
    from compressed_tensors.utils.match import is_match, match_targets

    for module, scheme in settled.schemes.items():
        linear = torch.nn.Linear(2, 2)
        ignored = is_match(module, linear, found["ignore"])
        assert ignored == (scheme is None)
        groups = [
            group
            for group in found["config_groups"].values()
            if match_targets(module, linear, group["targets"])
        ]
        assert len(groups) == 1
        if scheme is not None:
            assert groups[0]["weights"]["num_bits"] == scheme.bits
            assert find_group(found, module) == groups[0]
    assert is_match("lm_head", torch.nn.Linear(2, 2), found["ignore"])


def test_a_head_is_ignored_even_if_nobody_says_so() -> None:
    assert config(settle(linears(W4)))["ignore"] == ["lm_head"]


def test_several_schemes_never_target_a_class() -> None:
    found = config(settle(linears(W4, down_proj=Scheme(8, -1))))
    targets = [entry for group in found["config_groups"].values() for entry in group["targets"]]
    assert len(targets) == 4
    assert all(entry.startswith("re:") and entry.endswith("$") for entry in targets)


@pytest.mark.parametrize("loaders", [[], ["transformers"], ["vllm"], ["vllm", "transformers"]])
def test_an_even_model_is_stored_as_asked(loaders: list[str]) -> None:
    settled = settle(linears(W4), *loaders)
    assert set(settled.schemes.values()) == {W4}
    assert not settled.why
    assert settled.format == CompressedTensors()


@pytest.mark.parametrize(
    ("columns", "bits", "loaders", "size"),
    [
        (48, 4, [], -1),  # rows end with a word: per channel, which vLLM takes too
        (172, 4, [], 32),  # they do not, so vLLM is lost anyway: a shorter last group
        (172, 8, [], -1),
        (176, 4, ["vllm"], -1),
        (172, 4, ["transformers"], 32),
    ],
)
def test_a_group_that_does_not_divide(
    columns: int, bits: int, loaders: list[str], size: int
) -> None:
    settled = settle(linears(Scheme(bits, 32), columns), *loaders)
    assert set(settled.schemes.values()) == {Scheme(bits, size)}
    assert all(f"in_features {columns}" in reason for reason in settled.why.values())
    assert len(settled.why) == len(settled.schemes)
    block = find_group(config(settled), "model.layers.0.mlp.down_proj")
    assert block is not None
    strategy = block["weights"]["strategy"]
    assert strategy == ("channel" if size == -1 else "block")


def test_what_vllm_takes_in_no_writing_stays_dense() -> None:
    settled = settle(linears(W4, columns=172), "vllm")
    assert set(settled.schemes.values()) == {None}
    assert all("32-bit words" in reason for reason in settled.why.values())
    assert settled.why.keys() == settled.schemes.keys()
    settled = settle(linears(A4, down_proj=Scheme(8, 32, False)), "vllm")
    dense = {name for name, scheme in settled.schemes.items() if scheme is None}
    assert dense == {name for name in settled.schemes if name.endswith("down_proj")}
    assert "4 bits only" in settled.why["model.layers.0.mlp.down_proj"]


def test_zero_points_of_one_scheme_are_packed_and_flagged() -> None:
    settled = settle(linears(A4))
    found = config(settled)
    assert found["dequantize"] is True
    assert found["config_groups"]["group_0"]["weights"]["strategy"] == "group"
    metas = settled.format.layout("model.layers.0.mlp.down_proj", (64, 64), A4, "F32")
    assert (metas[-1].dtype, metas[-1].shape) == ("I32", (8, 2))
    assert "dequantize" not in config(settle(linears(W4)))


def test_zero_points_of_several_schemes_are_raw_in_blocks() -> None:
    settled = settle(linears(A4, down_proj=Scheme(8, -1, False), q_proj=Scheme(8, -1)))
    found = config(settled)
    assert "dequantize" not in found
    assert settled.schemes["model.layers.0.mlp.down_proj"] == Scheme(8, 64, False)
    metas = settled.format.layout("model.layers.0.self_attn.k_proj", (64, 64), A4, "F32")
    assert (metas[-1].dtype, metas[-1].shape) == ("I8", (64, 2))


def test_both_loaders_and_several_asymmetric_schemes_leave_some_dense() -> None:
    settled = settle(linears(A4, down_proj=Scheme(4, 64, False)), "vllm", "transformers")
    assert settled.schemes["model.layers.0.mlp.down_proj"] is None
    assert settled.schemes["model.layers.0.self_attn.q_proj"] == A4
    assert "one scheme" in settled.why["model.layers.0.mlp.down_proj"]


def test_vllm_fuses_q_k_and_v() -> None:
    fine = Scheme(8, -1)
    settled = settle(linears(W4, q_proj=fine), "vllm")
    assert settled.schemes["model.layers.1.self_attn.v_proj"] == fine
    assert settled.schemes["model.layers.1.mlp.down_proj"] == W4
    assert "model.layers.1.self_attn.q_proj" not in settled.why
    ignored = settle(linears(W4, q_proj=None), "vllm")
    assert ignored.schemes["model.layers.1.self_attn.v_proj"] is None
    assert settle(linears(W4, q_proj=fine)).schemes["model.layers.1.self_attn.v_proj"] == W4


def experts(scheme: Scheme | None = W4, **named: Scheme | None) -> list[Wish]:
    """Wish for the experts of two layers; `named`: by `e<index>` or by projection."""
    return [
        Wish(
            f"model.layers.{layer}.mlp.experts.{index}.{name}",
            (32, 64),
            named.get(f"e{index}" if layer == 1 else "", named.get(name, scheme)),
            expert=True,
        )
        for layer in range(2)
        for index in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]


def test_experts_of_one_scheme_are_packed() -> None:
    settled = settle([*linears(Scheme(8, -1)), *experts()])
    assert all(settled.schemes.values())
    assert settled.stacked == ()
    found = config(settled)["config_groups"]
    speaking = [g for g in found.values() if any("experts" in entry for entry in g["targets"])]
    assert len(speaking) == 1


def test_a_layer_with_one_dense_expert_is_stacked() -> None:
    settled = settle([*linears(W4), *experts(e1=None)])
    assert settled.stacked == ("model.layers.1.mlp.experts",)
    assert settled.schemes["model.layers.1.mlp.experts.0.up_proj"] is None
    assert settled.schemes["model.layers.0.mlp.experts.0.up_proj"] == W4
    assert settle([*linears(W4), *experts(e1=None)], "vllm").stacked == ()


def test_experts_of_two_schemes_and_with_zero_points_stay_dense() -> None:
    two = settle([*linears(W4), *experts(down_proj=Scheme(8, -1))])
    assert len(two.stacked) == 2
    shifted = settle([*linears(W4), *experts(A4)])
    assert len(shifted.stacked) == 2
    assert all("zero points" in reason for reason in shifted.why.values())


def test_a_model_of_which_nothing_is_packed_is_not_stacked() -> None:
    assert settle([*linears(None), *experts(None)]).stacked == ()


def conv1d(scheme: Scheme, **named: Scheme) -> list[Wish]:
    return [
        Wish(f"transformer.h.{layer}.{name}", shape, named.get(name, scheme), transposed=True)
        for layer in range(2)
        for name, shape in (("c_attn", (144, 48)), ("c_fc", (52, 48)), ("c_proj", (48, 52)))
    ]


def test_conv1d_is_stored_as_the_model_holds_it() -> None:
    settled = settle(conv1d(Scheme(4, 32)))
    found = config(settled)
    assert found["dequantize"] is True
    weights = found["config_groups"]["group_0"]["weights"]
    assert weights["block_structure"] == [32, 1]
    metas = settled.format.layout("transformer.h.0.c_proj", (48, 52), Scheme(4, 32), "F32")
    assert [meta.shape for meta in metas] == [(52, 6), (2, 48), (2,)]
    channel = config(settle(conv1d(Scheme(4, -1))))["config_groups"]["group_0"]["weights"]
    assert channel["block_structure"] == [52, 1]
    assert not any(settle(conv1d(W4), "vllm").schemes.values())


def test_scales_have_the_models_dtype() -> None:
    layout = CompressedTensors()
    kinds = [layout.scale_dtype(name) for name in ("F32", "F16", "BF16", "F8_E4M3")]
    assert kinds == ["F32", "F16", "BF16", "BF16"]


def test_names_go_before_patterns_before_classes() -> None:
    groups = {
        "a": {"targets": ["Linear"], "weights": {"num_bits": 2}},
        "b": {"targets": ["re:.*fc"], "weights": {"num_bits": 3}},
        "c": {"targets": ["m.fc"], "weights": {"num_bits": 4}},
    }
    layout = CompressedTensors()
    found = {"config_groups": groups, "ignore": ["re:.*head"]}
    bits = [layout.scheme(found, name) for name in ("x", "n.fc", "m.fc", "lm_head")]
    assert bits == [Scheme(2, -1), Scheme(3, -1), Scheme(4, -1), None]
    groups["a"]["weights"] = {"num_bits": 8, "type": "float"}
    with pytest.raises(UnsupportedError, match="float"):
        layout.scheme(found, "x")

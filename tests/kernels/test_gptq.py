"""The gptq layout, against words decoded bit by bit and the loaders' rules."""

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from unicomp.kernels import format as formats
from unicomp.kernels.format import Settled, Wish
from unicomp.kernels.formats.compressed_tensors import CompressedTensors
from unicomp.kernels.formats.gptq import Gptq
from unicomp.kernels.packed import PackedTensor, Scheme


def field(words: NDArray[np.int32], bits: int, index: int) -> int:
    """Return unsigned field `index` of a stream of 32-bit words, low bits first."""
    stream = sum((int(word) & 0xFFFFFFFF) << (32 * place) for place, word in enumerate(words))
    return (stream >> (bits * index)) & ((1 << bits) - 1)


def random(scheme: Scheme, shape: tuple[int, int], seed: int) -> PackedTensor:
    draw = torch.Generator().manual_seed(seed)
    low, high = scheme.code_range
    grid = (shape[0], scheme.groups(shape[1]))
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=draw)
    zero = torch.randint(low, high + 1, grid, dtype=torch.int8, generator=draw)
    scale = (torch.rand(grid, generator=draw) + 0.1).half()
    return PackedTensor(codes, scale, None if scheme.symmetric else zero, scheme)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([-1, 16, 32]), st.booleans(), st.integers(0, 999)
)
def test_the_words_stand_for_the_weight(bits: int, size: int, symmetric: bool, seed: int) -> None:
    scheme = Scheme(bits, size, symmetric)
    shape = (32, 64)
    v2 = bits == 3 or not symmetric
    packed = random(scheme, shape, seed)
    tensors = Gptq(v2=v2).pack("m", packed)
    words = {name.removeprefix("m."): tensor.numpy() for name, tensor in tensors.items()}
    dense = packed.dequantize()
    for row, column in np.random.default_rng(seed).integers(0, shape, (60, 2)).tolist():
        group = int(words["g_idx"][column])
        code = field(words["qweight"][:, row], bits, column)
        zero = field(words["qzeros"][group], bits, row) + (0 if v2 else 1)
        value = float(words["scales"][group, row]) * (code - zero)
        assert value == pytest.approx(float(dense[row, column]), rel=1e-6)
    assert words["scales"].dtype == np.float16
    assert words["g_idx"].dtype == np.int32


@pytest.mark.parametrize(
    ("bits", "v2", "word"),
    [
        (2, True, 0xAAAAAAAA),
        (4, True, 0x88888888),
        (8, True, 0x80808080),
        (3, True, 0x24924924),
        (4, False, 0x77777777),
        (2, False, 0x55555555),
        (8, False, 0x7F7F7F7F),
    ],
)
def test_symmetric_zero_words(bits: int, v2: bool, word: int) -> None:
    packed = random(Scheme(bits, -1), (32, 32), 0)
    zeros = Gptq(v2=v2).pack("m", packed)["m.qzeros"]
    assert int(zeros[0, 0]) & 0xFFFFFFFF == word


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_words_are_those_of_compressed_tensors_transposed(bits: int) -> None:
    packed = random(Scheme(bits, 32), (64, 96), 0)
    gptq = Gptq(v2=True).pack("m", packed)
    other = CompressedTensors().pack("m", packed)
    assert torch.equal(gptq["m.qweight"].T, other["m.weight_packed"])
    assert torch.equal(gptq["m.scales"].T, other["m.weight_scale"])


def test_a_zero_of_version_1_wraps() -> None:
    zeros = Gptq(v2=True).pack("m", random(Scheme(4, 32, False), (8, 64), 0))["m.qzeros"]
    stored = Gptq(v2=True).zero_points(zeros, 4, 8)
    shifted = Gptq().zero_points(zeros, 4, 8)
    assert torch.equal(shifted, torch.where(stored == 7, -8, stored + 1).to(torch.int8))


@pytest.mark.parametrize("scheme", [Scheme(4, 32, False), Scheme(3, 32)])
def test_version_1_never_says_what_tools_disagree_on(scheme: Scheme) -> None:
    with pytest.raises(ValueError, match="version 1"):
        Gptq().pack("m", random(scheme, (32, 64), 0))


def settle(*wishes: tuple[Scheme | None, tuple[int, int]], loaders: list[str]) -> Settled:
    wanted = [
        Wish(f"model.layers.{i}.fc", shape, scheme) for i, (scheme, shape) in enumerate(wishes)
    ]
    return formats.find("gptq").settle(wanted, loaders)


def test_the_safest_file() -> None:
    settled = settle((Scheme(4, 128), (64, 256)), loaders=["vllm"])
    assert settled.format == Gptq(v2=False)
    config = settled.format.config({"model.layers.0.fc": Scheme(4, 128)}, ["lm_head"])
    for key, value in {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
    }.items():
        assert config[key] == value
    assert "dynamic" not in config
    files = settled.format.extra_files(config)
    assert json.loads(files["quantize_config.json"]) == config


def test_zero_points_and_three_bits_make_the_file_version_2() -> None:
    even = (Scheme(4, 32), (64, 64))
    assert settle(even, (Scheme(3, 32), (64, 64)), loaders=[]).format == Gptq(v2=True)
    assert settle(even, (Scheme(4, 32, False), (64, 64)), loaders=[]).format == Gptq(v2=True)
    assert settle(even, even, loaders=[]).format == Gptq(v2=False)


@pytest.mark.parametrize(
    ("scheme", "shape", "loaders", "stored", "reason"),
    [
        (Scheme(4, 128), (64, 192), [], Scheme(4, -1), "not a multiple"),
        (Scheme(4, 43), (64, 344), [], Scheme(4, -1), "group_size 43"),
        (Scheme(5, 32), (64, 64), [], None, "5 bits"),
        (Scheme(4, 32), (64, 172), [], None, "172"),
        (Scheme(4, 32), (30, 64), [], None, "out_features 30"),
        (Scheme(3, 32), (64, 64), ["vllm"], None, "vLLM"),
        (Scheme(4, 32, False), (64, 64), ["vllm"], None, "vLLM"),
        (Scheme(8, 32), (64, 64), ["vllm"], Scheme(8, 32), None),
    ],
)
def test_what_loaders_run(
    scheme: Scheme,
    shape: tuple[int, int],
    loaders: list[str],
    stored: Scheme | None,
    reason: str | None,
) -> None:
    settled = settle((scheme, shape), loaders=loaders)
    assert settled.schemes["model.layers.0.fc"] == stored
    why = settled.why.get("model.layers.0.fc")
    assert (why is None) == (reason is None)
    assert reason is None or (why is not None and reason in why)


def test_dynamic_names_what_differs_and_what_is_dense() -> None:
    schemes = {f"model.layers.{i}.fc": Scheme(8 if i == 1 else 4, 32) for i in range(3)}
    dense = [f"model.layers.{i}.gate" for i in range(3)]
    config = Gptq().config(schemes, [*dense, "lm_head"])
    assert len(config["dynamic"]) == 2
    for module, scheme in schemes.items():
        assert Gptq().scheme(config, module) == scheme
    for module in [*dense, "lm_head"]:
        assert Gptq().scheme(config, module) is None
    for entry in config["dynamic"]:
        assert entry[:2] in ("+:", "-:")
        assert re.compile(entry[2:])

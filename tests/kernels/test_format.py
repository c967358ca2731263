"""The folder of formats is the registry, and every format keeps the promises of `Format`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unicomp.errors import UnsupportedError
from unicomp.kernels import format as formats
from unicomp.kernels.format import Wish
from unicomp.kernels.packed import PackedTensor, Scheme

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = {"I32": torch.int32, "I64": torch.int64, "I8": torch.int8, **DTYPES}


def test_the_folder_is_the_registry() -> None:
    assert formats.formats() == ["compressed-tensors", "gptq"]
    for name in formats.formats():
        assert formats.find(name).name == name


def test_an_unknown_format_gets_a_hint() -> None:
    with pytest.raises(UnsupportedError, match="unknown format `gtpq`") as caught:
        formats.find("gtpq")
    assert caught.value.hint == "did you mean `gptq`?"


def random(shape: tuple[int, int], scheme: Scheme, dtype: torch.dtype, seed: int) -> PackedTensor:
    """Draw codes, scales and zero points, the ends of the range among them."""
    draw = torch.Generator().manual_seed(seed)
    low, high = scheme.code_range
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=draw)
    grid = (shape[0], scheme.groups(shape[1]))
    zero = torch.randint(low, high + 1, grid, dtype=torch.int8, generator=draw)
    codes[0, 0], codes[-1, -1], zero[0, 0], zero[-1, -1] = low, high, low, high
    scale = (torch.rand(grid, generator=draw) + 0.01).to(dtype)
    return PackedTensor(codes, scale, None if scheme.symmetric else zero, scheme)


@st.composite
def wishes(draw: st.DrawFn) -> tuple[str, list[str], list[Wish]]:
    """A few linears of one model with any schemes, for any loaders."""
    transposed = draw(st.booleans())
    found = []
    for index in range(draw(st.integers(1, 4))):
        shape = (draw(st.integers(1, 12)) * 8, draw(st.integers(1, 90)))
        if draw(st.booleans()):
            shape = (shape[0], 32 * draw(st.integers(1, 4)))
        bits, size = draw(st.integers(2, 8)), draw(st.sampled_from([-1, 8, 16, 24, 32, 64, 128]))
        scheme = Scheme(bits, size, draw(st.booleans()))
        wished = None if draw(st.integers(0, 5)) == 0 else scheme
        found.append(Wish(f"model.layers.{index}.mlp.fc", shape, wished, transposed))
    loaders = draw(st.sampled_from([[], ["transformers"], ["vllm"], ["vllm", "transformers"]]))
    return draw(st.sampled_from(formats.formats())), loaders, found


@settings(max_examples=150, deadline=None)
@given(wishes(), st.sampled_from(sorted(DTYPES)), st.integers(0, 2**16))
def test_what_is_settled_is_stored_as_laid_out_and_read_back(
    drawn: tuple[str, list[str], list[Wish]], dtype: str, seed: int
) -> None:
    name, loaders, wanted = drawn
    settled = formats.find(name).settle(wanted, loaders)
    assert list(settled.schemes) == [wish.module for wish in wanted]
    changed = [wish for wish in wanted if settled.schemes[wish.module] != wish.scheme]
    for wish in changed:
        assert wish.scheme is not None
        own = settled.schemes[wish.module]
        assert own is None or (own.bits, own.symmetric) == (wish.scheme.bits, wish.scheme.symmetric)
        whole = own is not None and own.group_size == wish.shape[1] and wish.scheme.group_size == -1
        assert whole or settled.why[wish.module]
    kept = {module: scheme for module, scheme in settled.schemes.items() if scheme is not None}
    dense = [module for module in settled.schemes if module not in kept]
    if not kept:
        return
    config = settled.format.config(kept, [*dense, "lm_head"])
    reading = settled.format.reading(config)
    for wish in wanted:
        scheme = kept.get(wish.module)
        if scheme is None:
            assert settled.format.scheme(config, wish.module) is None
            continue
        packed = random(wish.shape, scheme, DTYPES[settled.format.scale_dtype(dtype)], seed)
        tensors = settled.format.pack(wish.module, packed)
        metas = settled.format.layout(wish.module, wish.shape, scheme, dtype)
        assert [meta.name for meta in metas] == list(tensors)
        for meta in metas:
            tensor = tensors[meta.name]
            assert (tuple(tensor.shape), tensor.dtype) == (meta.shape, STORED[meta.dtype])
            assert tensor.nbytes == meta.nbytes
            assert tensor.is_contiguous()
        read = reading.unpack(wish.module, tensors.__getitem__, wish.shape, scheme)
        assert torch.equal(read.codes, packed.codes)
        assert torch.equal(read.scale, packed.scale)
        assert (read.zero_point is None) == scheme.symmetric
        if read.zero_point is not None and packed.zero_point is not None:
            assert torch.equal(read.zero_point, packed.zero_point)
        described = settled.format.scheme(config, wish.module)
        assert described is not None
        assert (described.bits, described.symmetric) == (scheme.bits, scheme.symmetric)
        assert described.groups(wish.shape[1]) == scheme.groups(wish.shape[1])
    assert settled.format.scheme(config, "lm_head") is None

"""Codes moved between compressed-tensors, GPTQ and BitNet, against the formats' own readers."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from transformers import AutoModelForCausalLM

from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnsupportedError
from unicomp.kernels import load as dense_load
from unicomp.kernels import packed_model
from unicomp.kernels.dense import open_dense
from unicomp.kernels.stored import Stored
from unicomp.manifest import verify
from unicomp.recipes.publish.export import export

IDS = torch.arange(20, 44)[None]


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return dense_load.load(folder)(IDS).logits


@torch.no_grad()
def stock(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits of stock transformers; nothing may be missing or left over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    assert not any(info.values()), info
    return model.eval()(IDS).logits.float()


def same_codes(first: Path, second: Path) -> None:
    one, two = (Stored(open_dense(Checkpoint.open(own))) for own in (first, second))
    assert one.coded == two.coded
    for name in one.coded:
        a, b = one.read(name), two.read(name)
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.scale.float(), b.scale.float())
        assert (a.zero_point is None) == (b.zero_point is None)
        if a.zero_point is not None and b.zero_point is not None:
            assert torch.equal(a.zero_point, b.zero_point)


@pytest.mark.parametrize(
    ("bits", "size", "symmetric", "version"),
    [(4, 128, True, "gptq"), (8, -1, True, "gptq"), (4, 64, False, "gptq_v2"),
     (3, 32, True, "gptq_v2"), (2, 64, True, "gptq")],
)  # fmt: skip
def test_there_and_back_is_the_same(
    bits: int,
    size: int,
    symmetric: bool,
    version: str,
    coded_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = coded_model("llama", bits=bits, group_size=size, symmetric=symmetric)
    there, back = tmp_path / "gptq", tmp_path / "ct"
    done = export(str(folder), "gptq", there)
    assert {own.kind for own in done.verdicts.values()} == {"exact"}
    config = json.loads((there / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == version
    assert json.loads((there / "quantize_config.json").read_text()) == config
    same_codes(folder, there)
    export(str(there), "compressed-tensors", back)
    same_codes(folder, back)
    assert verify(there) == []
    assert verify(back) == []
    if symmetric:  # with zero points transformers dequantizes in float16, and so do we
        assert torch.equal(logits(folder), logits(there))
    shard = "model.safetensors"
    assert (back / shard).read_bytes() == (folder / shard).read_bytes()
    harmed = bytearray((back / "model.safetensors").read_bytes())
    harmed[-1] ^= 1
    (back / "model.safetensors").write_bytes(harmed)
    assert verify(back)


def test_compressed_tensors_reads_what_came_from_gptq(
    coded_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = coded_model("llama", bits=4, group_size=64, format="gptq")
    export(str(folder), "compressed-tensors", tmp_path / "ct")
    checkpoint = Checkpoint.open(tmp_path / "ct")
    stored = Stored(open_dense(Checkpoint.open(folder)))
    for name in stored.coded:
        module = name.removesuffix(".weight")
        words = checkpoint.read(f"{module}.weight_packed")
        shape = torch.Size(checkpoint.read(f"{module}.weight_shape").tolist())
        theirs = unpack_from_int32(words, 4, shape)
        assert torch.equal(theirs, stored.read(name).codes)
        assert not torch.equal(theirs, stored.read(name).codes.flip(0))
    found, meant = stock(tmp_path / "ct"), logits(folder)
    assert float((found - meant).abs().max()) < 1e-4
    assert float((found - meant.roll(1, -1)).abs().max()) > 1


def test_version_1_is_refused_where_it_cannot_say_it(
    coded_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = coded_model("llama", bits=4, group_size=64, symmetric=False)
    with pytest.raises(UnsupportedError, match="version 1 cannot say zero points"):
        export(str(folder), "gptq", tmp_path / "out", kind="v1")
    assert not list(tmp_path.iterdir())
    export(str(coded_model("llama", bits=4, group_size=64)), "gptq", tmp_path / "v2", kind="v2")
    config = json.loads((tmp_path / "v2/config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"


@pytest.mark.parametrize("kind", ["autobitlinear", "bitlinear"])
def test_transformers_runs_bitnet(
    kind: str, coded_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = coded_model("llama", bits=2, group_size=-1, ternary=True, one_scale=True)
    done = export(str(folder), "bitnet", tmp_path / "bitnet", kind=kind)
    assert {own.stored for own in done.verdicts.values()} == {"ternary"}
    exact = {own.kind for own in done.verdicts.values()} == {"exact"}
    assert exact == (kind == "autobitlinear")
    # `autobitlinear` unpacks to the dtype of the file whatever is asked for (5.23).
    dtype = torch.float16 if kind == "autobitlinear" else torch.float32
    found, meant = stock(tmp_path / "bitnet", dtype), logits(tmp_path / "bitnet")
    span = float(meant.max() - meant.min())
    # Its activations are rounded to 8 bits; ours are not, in the dense reference.
    assert float((found - meant).abs().max()) < 0.05 * span
    assert float((found - meant.roll(1, -1)).abs().max()) > 0.2 * span
    if exact:
        assert torch.equal(meant, logits(folder))
    # It runs packed, and goes on to compressed-tensors and GGUF.
    model = packed_model.load(tmp_path / "bitnet", compute="exact", dtype=torch.float32)
    assert packed_model.loaded(model).packed == 14
    with torch.no_grad():
        assert float((model(IDS).logits - meant).abs().max()) < 1e-3
    export(str(tmp_path / "bitnet"), "compressed-tensors", tmp_path / "ct")
    export(str(tmp_path / "bitnet"), "gguf", tmp_path / "model.gguf")
    assert float((logits(tmp_path / "ct") - meant).abs().max()) < (1e-6 if exact else 0.02 * span)


def test_what_bitnet_cannot_say_is_refused(
    coded_model: Callable[..., Path], tmp_path: Path
) -> None:
    several = coded_model("llama", bits=2, group_size=-1, ternary=True)
    with pytest.raises(UnsupportedError, match="one scale for a whole weight"):
        export(str(several), "bitnet", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="codes -1, 0 and 1 only, not 4 bits, group 128"):
        export(str(coded_model("llama")), "bitnet", tmp_path / "out")
    with pytest.raises(UnsupportedError, match="nothing could be stored as gptq") as caught:
        export("builtin:tinyworld", "gptq", tmp_path / "out")
    assert "unicomp quantize" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())


def test_experts_go_over(coded_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = coded_model("mixtral", bits=4, group_size=32)
    export(str(folder), "gptq", tmp_path / "gptq")
    same_codes(folder, tmp_path / "gptq")

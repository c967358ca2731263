"""Every architecture, quantized by the main job, is whole in stock transformers and in ours.

Tiny models with what makes each architecture hard (see `tests/conftest.py`), spread widely enough
that one dropped tensor shows in the logits.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from unicomp import text
from unicomp.kernels.load import load
from unicomp.models import ARCHITECTURES
from unicomp.recipes.layers.plan import Plan, plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options

SEQ_LEN = 64
CALIBRATION, HELD_OUT = 48, 16  # windows


def planned(model: Path, data: Path, method: str, target: list[str], **options: Any) -> Plan:
    """Return the plan of one quantize stage."""
    calibration = {"data": str(data), "samples": CALIBRATION, "seq_len": SEQ_LEN}
    recipe = from_options(
        "quantize",
        method,
        options,
        calibration=None if method == "rtn" else calibration,
        target=target,
    )
    return plan(recipe, model=str(model))


@pytest.fixture(scope="module")
def ids(tiny_tokenizer: Path, tiny_text: Path) -> torch.Tensor:
    """The last windows of the text; few of them can have been drawn for calibration."""
    tokenizer = text.tokenizer(tiny_tokenizer)
    found = text.encode(tokenizer, text.read(str(tiny_text)), vocab=128)
    return text.windows(found, seq_len=SEQ_LEN, samples=None, seed=0, bos=None)[-HELD_OUT:]


@torch.no_grad()
def stock(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits that stock transformers computes; nothing missing, nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=dtype
    )
    assert not any(info.values()), info
    logits: torch.Tensor = model.eval()(input_ids=ids).logits
    return logits.float()


@torch.no_grad()
def ours(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the logits of our dequantized reference."""
    logits: torch.Tensor = load(folder, dtype=dtype)(input_ids=ids).logits
    return logits.float()


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of the next-token distributions, in nats."""
    p, q = wanted.log_softmax(-1), got.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def close(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Tell whether logits are equal to 1e-4 of their range."""
    return bool((got - wanted).abs().max() <= 1e-4 * wanted.abs().max())


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_whole_in_stock_transformers_and_gptq_beats_rounding(
    arch: str, tiny_model: Callable[..., Path], tiny_text: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    """No key missing or unexpected, logits equal the reference, GPTQ nearer the base than RTN."""
    model = tiny_model(arch)
    base = stock(model, ids)
    found = {}
    for method in ("rtn", "gptq"):
        run(planned(model, tiny_text, method, [], bits=4, group_size=-1), tmp_path / method)
        logits = stock(tmp_path / method, ids)
        assert close(logits, ours(tmp_path / method, ids))
        assert not close(logits, base)
        found[method] = distance(logits, base)
    assert 0 < found["gptq"] < found["rtn"]


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_bfloat16_checkpoints_run_through_in_their_own_dtype(
    arch: str, tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Where the processor multiplies bfloat16 the linears do, GPT-2's transposed ones apart."""
    found = planned(tiny_model(arch, dtype=torch.bfloat16), tiny_text, "gptq", [], group_size=-1)
    made = run(found, tmp_path / "out")
    errors = [module.error_after for module in made.stages[0].modules.values() if module.bits]
    assert all(error is not None and error < 0.6 for error in errors), errors


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_other_widths_load_whole(
    arch: str,
    bits: int,
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    """2, 3 and 8 bits, a group that does not divide every width, shards, bfloat16 as float32."""
    # Packed experts stay in the scale's dtype in stock transformers, whatever dtype is asked for.
    dtype = torch.bfloat16 if arch == "mixtral" else torch.float32
    # torch's grouped product wants rows of whole 16 bytes in bfloat16, plain checkpoints included.
    widths = {"intermediate_size": 48} if arch == "mixtral" else {}
    model = tiny_model(arch, shard_size="40KB", dtype=torch.bfloat16, **widths)
    run(planned(model, tiny_text, "rtn", [], bits=bits, group_size=32), tmp_path / "out")
    assert close(stock(tmp_path / "out", ids, dtype), ours(tmp_path / "out", ids, dtype))


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_experts_from_3d_tensors_are_packed_alike(
    arch: str, tiny_model: Callable[..., Path], tiny_text: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    """A file that holds experts as transformers does gives the codes of one that does not."""
    options = {"bits": 4, "group_size": -1}
    logits = []
    for fused in (False, True):
        model = tiny_model(arch, fused_experts=fused)
        run(planned(model, tiny_text, "gptq", [], **options), tmp_path / str(fused))
        logits.append(stock(tmp_path / str(fused), ids))
    assert torch.equal(*logits)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mixtral"])
def test_asymmetric_loads_whole(
    arch: str, tiny_model: Callable[..., Path], tiny_text: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    """Zero points, in whatever legal way stock transformers reads them."""
    model = tiny_model(arch, dtype=torch.bfloat16)
    options = {"bits": 4, "group_size": 32, "symmetric": False}
    run(planned(model, tiny_text, "gptq", [], **options), tmp_path / "out")
    assert close(stock(tmp_path / "out", ids), ours(tmp_path / "out", ids))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_experts_kept_dense_are_not_lost(
    arch: str,
    fused: bool,
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    ids: torch.Tensor,
    tmp_path: Path,
) -> None:
    """Experts that the recipe ignores come through, from 2-D and from 3-D tensors."""
    model = tiny_model(arch, fused_experts=fused)
    options = {"bits": 8, "group_size": -1, "ignore": ["re:.*experts.*", "lm_head"]}
    run(planned(model, tiny_text, "gptq", ["transformers"], **options), tmp_path / "out")
    logits = stock(tmp_path / "out", ids)
    assert close(logits, ours(tmp_path / "out", ids))
    assert distance(logits, stock(model, ids)) < 0.05


def test_the_comparer_rejects_a_dropped_tensor(
    tiny_model: Callable[..., Path], tiny_text: Path, ids: torch.Tensor, tmp_path: Path
) -> None:
    """One linear set to zero shows: the test above could have failed."""
    model = tiny_model("llama")
    run(planned(model, tiny_text, "rtn", [], bits=8, group_size=-1), tmp_path / "out")
    reference = ours(tmp_path / "out", ids)
    broken = load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight.zero_()
        logits = broken(input_ids=ids).logits
    assert not close(logits, reference)
    assert distance(logits, reference) > 0.05

"""The bytes that a plan says are the bytes that a run writes, for every kind of stage."""

from collections.abc import Callable
from pathlib import Path

import pytest

from unicomp.checkpoint import Checkpoint
from unicomp.recipes.load import load
from unicomp.recipes.pipeline.plan import plan
from unicomp.recipes.pipeline.run import run

STEPS = "max_steps: 1, batch: 2, seq_len: 32, measure_every: 1"
KINDS = {
    "gptq": ("llama", "[{quantize: gptq, bits: 3, group_size: 16}]", ""),
    "zero points": ("llama", "[{quantize: rtn, bits: 4, group_size: 16, symmetric: false}]", ""),
    "gptq's format": ("qwen2", "[{quantize: rtn, bits: 8, group_size: -1}]", "format: gptq\n"),
    "ternary": ("llama", "[{quantize: ternary, group_size: -1}]", ""),
    "Conv1D": ("gpt2", "[{quantize: rtn, bits: 4, group_size: 16}]", ""),
    "experts": ("mixtral", "[{quantize: rtn, bits: 4, group_size: 8}]", ""),
    "plain experts": ("mixtral", "[{quantize: rtn, group_size: 8, ignore: ['re:.*w2']}]", ""),
    "zeros": ("qwen3", "[{prune: wanda, sparsity: 0.5}]", ""),
    "zeros of experts": ("qwen3_moe", "[{prune: magnitude, sparsity: '2:4'}]", ""),
    "one pass": (
        "llama",
        "[{prune: magnitude, sparsity: 0.5}, {quantize: gptq, group_size: 16}]",
        "",
    ),
    "width": ("llama", "[{prune: width, ffn: 32}]", ""),
    "trained zeros": (
        "llama",
        f"[{{prune: magnitude, sparsity: 0.5}}, {{distill: logits, {STEPS}}}]",
        "",
    ),
    "trained codes": (
        "llama",
        f"[{{quantize: rtn, bits: 4, group_size: 16}}, {{distill: logits, {STEPS}}}]",
        "",
    ),
    "passes": ("llama", "[{prune: depth, layers: 2}, {quantize: rtn, group_size: -1}]", ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_forecast_is_exact(
    kind: str,
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("unicomp.recipes.pipeline.run.beside", lambda *_, **__: None)
    arch, stages, more = KINDS[kind]
    head = f'version: 1\ncalibration: {{data: "{tiny_text}", samples: 4, seq_len: 32}}\n'
    recipe = load(f"{head}stages: {stages}\n{more}", file="x")
    found = plan(recipe, model=str(tiny_model(arch)))
    made = run(found, tmp_path / "out")
    stored = Checkpoint.open(tmp_path / "out").tensors.values()
    assert found.bytes_out == made.totals.bytes_out == sum(one.nbytes for one in stored)
    assert found.params == made.totals.params
    assert found.bytes_out != found.bytes_in or "zeros" in kind

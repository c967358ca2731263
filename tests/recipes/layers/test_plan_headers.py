"""Plans of checkpoints that are headers only: bytes by hand, and sizes as published."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unicomp.recipes.layers.plan import plan
from unicomp.recipes.load import from_options

MADE = runpy.run_path(str(Path(__file__).resolve().parents[3] / "benchmarks/plan_headers.py"))
SMALL = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 1000, "head_dim": 64} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config(name: str) -> dict[str, Any]:
    own = {"intermediate_size": 512} if name.startswith("llama") else {"num_experts": 4}
    own |= {"moe_intermediate_size": 128, "num_experts_per_tok": 2} if "num_experts" in own else {}
    found: dict[str, Any] = MADE["MODELS"][name] | SMALL | own
    return found


def by_hand(of: dict[str, Any]) -> int:
    """4-bit codes, bfloat16 scales for 128 columns, a shape of 16 bytes; the rest as it is."""
    total = 0
    for name, shape in MADE["tensors"](of):
        if "_proj" in name:
            rows, columns = shape
            total += rows * columns // 2 + 2 * rows * columns // 128 + 16
        else:
            rows, columns = (*shape, 1)[:2]
            total += 2 * rows * columns
    return total


@pytest.mark.parametrize("name", list(MADE["MODELS"]))
def test_output_bytes_are_exact(name: str, tmp_path: Path) -> None:
    of = config(name)
    total = MADE["write"](tmp_path / "model", of, shard=300_000)
    found = plan(
        from_options("quantize", "rtn", {"bits": 4, "group_size": 128}),
        model=str(tmp_path / "model"),
    )
    assert len(found.checkpoint.shards) > 1
    assert found.bytes_in == total
    assert found.bytes_out == by_hand(of)
    assert found.bytes_out != by_hand(of | {"vocab_size": 1001})


@pytest.mark.parametrize(("name", "billions"), [("llama-3-70b", 70.6), ("qwen3-235b-a22b", 235.1)])
def test_shapes_are_those_of_the_published_models(name: str, billions: float) -> None:
    shapes = dict(MADE["tensors"](MADE["MODELS"][name]))
    params = sum(rows * ([*rest, 1][0]) for rows, *rest in shapes.values())
    assert round(params / 1e9, 1) == billions


def test_files_take_no_room(tmp_path: Path) -> None:
    MADE["write"](tmp_path / "model", config("llama-3-70b") | {"vocab_size": 10**6})
    weights = next((tmp_path / "model").glob("*.safetensors")).stat()
    assert weights.st_blocks * 512 < weights.st_size / 100
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] < weights.st_size * 2


def test_planning_imports_nothing_that_runs(tmp_path: Path) -> None:
    """No torch, no modelling code: they take seconds and more memory than all headers."""
    MADE["write"](tmp_path / "model", config("llama-3-70b"))
    recipes = {
        "one": "- {quantize: gptq, bits: 4, group_size: 128}",
        "zeros": "- {prune: sparsegpt, sparsity: '2:4'}",
        "several": "- {prune: width, ffn: 384}\n- {quantize: rtn, bits: 4}",
        "layers": "- {prune: depth, layers: 1}\n- {quantize: rtn, bits: 4}",
    }
    for name, stages in recipes.items():
        text = f"version: 1\ncalibration: {{data: builtin:tinyworld}}\nstages:\n{stages}\n"
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    code = (
        "import sys\n"
        "from unicomp.cli.main import exit_code\n"
        f"for name in {list(recipes)}:\n"
        f"    words = ['plan', rf'{tmp_path}/{{name}}.yaml', r'{tmp_path}/model', '--json']\n"
        "    assert exit_code(words) == 0, name\n"
        "    print(name, *sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    lines = [line.split() for line in done.stderr.splitlines()]
    seen = {name: set(modules) for name, *modules in lines if name in recipes}
    assert seen.keys() == recipes.keys()
    for name in ("one", "zeros", "several"):
        assert not seen[name] & {"torch", "transformers", "accelerate", "scipy"}
    # What is said of each layer is in transformers' configurations, and they import torch.
    assert {"torch", "transformers"} <= seen["layers"]
    assert "transformers.modeling_utils" not in seen["layers"]

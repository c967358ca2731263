"""How long `unicomp plan` takes, and with how much memory, on models of 70 and 235 billion.

    python benchmarks/plan_headers.py --out benchmarks/results/plan_headers.json

Shapes are those of the published config.json of Llama 3 70B and Qwen3-235B-A22B. The checkpoints
have headers only: their data is a hole in a sparse file, which takes no room on disk.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unicomp import machine

UNUSUAL = ("PYTHONDONTWRITEBYTECODE",)
SHARD = 5 * 10**9  # bytes, about what the published shards have

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {"llama-3-70b": LLAMA, "qwen3-235b-a22b": QWEN}


def tensors(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every tensor of a checkpoint with this config."""
    hidden, head = config["hidden_size"], config["head_dim"]
    heads, shared = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    experts = config.get("num_experts", 0)
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for index in range(config["num_hidden_layers"]):
        root = f"model.layers.{index}"
        yield f"{root}.input_layernorm.weight", (hidden,)
        yield f"{root}.post_attention_layernorm.weight", (hidden,)
        yield f"{root}.self_attn.q_proj.weight", (heads, hidden)
        yield f"{root}.self_attn.k_proj.weight", (shared, hidden)
        yield f"{root}.self_attn.v_proj.weight", (shared, hidden)
        yield f"{root}.self_attn.o_proj.weight", (hidden, heads)
        if experts:
            yield f"{root}.self_attn.q_norm.weight", (head,)
            yield f"{root}.self_attn.k_norm.weight", (head,)
            yield f"{root}.mlp.gate.weight", (experts, hidden)
        inner = config["moe_intermediate_size"] if experts else config["intermediate_size"]
        for place in [f"experts.{own}." for own in range(experts)] or [""]:
            yield f"{root}.mlp.{place}gate_proj.weight", (inner, hidden)
            yield f"{root}.mlp.{place}up_proj.weight", (inner, hidden)
            yield f"{root}.mlp.{place}down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


def write(folder: Path, config: dict[str, Any], shard: int = SHARD) -> int:
    """Write a checkpoint in bfloat16 of headers and holes; return the bytes of its tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shards: list[dict[str, Any]] = [{}]
    end = 0
    for name, shape in tensors(config):
        size = 2 * math.prod(shape)
        if end and end + size > shard:
            shards.append({})
            end = 0
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    places: dict[str, str] = {}
    total = 0
    for number, header in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        data = max(entry["data_offsets"][1] for entry in header.values())
        with file.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + data)
        places |= dict.fromkeys(header, file.name)
        total += data
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def measure(folder: Path, recipe: str) -> dict[str, Any]:
    """Plan once in a process of its own: seconds from start to end, its peak, what it said."""
    with tempfile.TemporaryFile() as said:
        start = time.perf_counter()
        words = [sys.executable, "-m", "unicomp", "plan", recipe, str(folder), "--json"]
        # As users have it: Python keeps what it compiled.
        own = {name: value for name, value in os.environ.items() if name not in UNUSUAL}
        process = subprocess.Popen(words, stdout=said, env=own)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"error: `unicomp plan` ended with {process.returncode}")
        said.seek(0)
        plan = json.loads(said.read())
    kept = ("params", "bytes_in", "bytes_out", "bits_per_weight", "peak_host_bytes")
    found = {"seconds": seconds, "peak_rss_bytes": usage.ru_maxrss * 1024}
    return found | {name: plan[name] for name in kept} | {"tensors": len(plan["tensors"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="w4-gptq")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as room:
        for name, config in MODELS.items():
            write(Path(room) / name, config)
            runs = [measure(Path(room) / name, asked.recipe) for _ in range(asked.rounds)]
            times = [run["seconds"] for run in runs]
            figures[name] = runs[0] | {
                "seconds": statistics.median(times),
                "seconds_all": times,
                "peak_rss_bytes": max(run["peak_rss_bytes"] for run in runs),
            }
            print(name, json.dumps(figures[name]))
    stored = {"recipe": asked.recipe, "machine": machine.describe(), "models": figures}
    asked.out.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

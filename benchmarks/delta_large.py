"""Does a large pair compress in bounded memory and time? And is the random decomposition worth it?

A synthetic pair in bfloat16, shaped as a Llama of 1.1 billion parameters (hidden 2048, FFN 5632, 22
layers, vocabulary 32000, untied), its fine-tune the base plus noise and a part of low rank. Each
compression is a process of its own, measured from outside. `--layers` makes a smaller one: the
largest tensors, which decide the memory, stay as they are.

    python benchmarks/delta_large.py --layers 22 --method dqrelo
    python benchmarks/delta_large.py --layers 4 --method dqrelo --serve 1 --serve 4 --serve 16
    python benchmarks/delta_large.py --decomposition
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from unicomp import machine
from unicomp.checkpoint import DTYPES
from unicomp.compress.lowrank import leading
from unicomp.writer import Meta, Writer

RESULTS = Path(__file__).resolve().parent / "results"
HIDDEN, FFN, VOCAB, HEADS, KV = 2048, 5632, 32000, 32, 4
SIZE, RANK = 4096, 128


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    narrow = HIDDEN * KV // HEADS
    for layer in range(layers):
        root = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows = narrow if name[0] in "kv" else HIDDEN
            found[f"{root}.self_attn.{name}.weight"] = (rows, HIDDEN)
        for name in ("gate_proj", "up_proj", "down_proj"):
            shape = (HIDDEN, FFN) if name == "down_proj" else (FFN, HIDDEN)
            found[f"{root}.mlp.{name}.weight"] = shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{root}.{name}.weight"] = (HIDDEN,)
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def make(folder: Path, layers: int) -> int:
    """Write the pair as `base` and `tuned` and return its parameters."""
    metas = [Meta(name, "BF16", shape) for name, shape in shapes(layers).items()]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    writers = []
    for name in ("base", "tuned"):
        own = folder / name
        own.mkdir(parents=True)
        (own / "config.json").write_text(json.dumps(config))
        writers.append(Writer(own, metas))
    draw = torch.Generator().manual_seed(0)
    for meta in metas:
        base = 0.02 * torch.randn(meta.shape, generator=draw)
        delta = 0.001 * torch.randn(meta.shape, generator=draw)
        if len(meta.shape) == 2:
            left, right = (torch.randn(size, 16, generator=draw) for size in meta.shape)
            delta += 0.0001 * left @ right.T
        for writer, tensor in zip(writers, (base, base + delta), strict=True):
            writer.write(meta.name, tensor.to(DTYPES["BF16"]))
    for writer in writers:
        writer.finish()
    return sum(torch.Size(meta.shape).numel() for meta in metas)


def compressed(folder: Path, method: str, ratio: float) -> dict[str, Any]:
    """Compress the pair in a process of its own; seconds and peak bytes are taken from outside."""
    command = [sys.executable, "-m", "unicomp", "delta", "compress", str(folder / "tuned")]
    command += ["--base", str(folder / "base"), "--out", str(folder / method), "--method", method]
    command += ["--ratio", str(ratio), "--json", "--quiet", "--overwrite"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{method} failed with status {status}")
    made = json.loads((folder / method / "unicomp.json").read_text())
    return {
        "method": method,
        "ratio": ratio,
        "seconds": time.monotonic() - began,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "totals": made["totals"],
    }


def served(folder: Path, method: str, count: int) -> dict[str, Any]:
    """Hold the base and so many deltas in a process of its own; see `serve`."""
    command = [sys.executable, __file__, "--worker", str(count), "--work", str(folder)]
    answer = subprocess.run(
        [*command, "--method", method], stdout=subprocess.PIPE, check=True, text=True
    )
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def resident() -> int:
    """Return the bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def serve(folder: Path, method: str, count: int) -> dict[str, Any]:
    """Load, run one token a row with each row on another delta, and say what it took.

    Bytes of deltas are those of the buffers; resident bytes are the whole process's.
    """
    from unicomp import load_deltas
    from unicomp.kernels.deltas import DeltaProduct, choose

    model = load_deltas(folder / "base", [folder / method] * count)
    loaded = resident()
    held = sum(
        own.numel() * own.element_size()
        for module in model.modules()
        if isinstance(module, DeltaProduct)
        for own in module.buffers()
    )
    base = 2 * model.num_parameters()
    ids = torch.ones((max(count, 1), 1), dtype=torch.int64)
    seconds = []
    with torch.inference_mode():
        for rows in ([-1], list(range(count))) if count else ([-1],):
            choose(model, rows)
            model(ids)
            began = time.monotonic()
            model(ids)
            seconds.append(time.monotonic() - began)
    return {
        "deltas": count,
        "base_bytes_16": base,
        "delta_bytes": held,
        "share_of_limit": held / (count / 8 * base * 1.05) if count else None,
        "resident_bytes": loaded,
        "seconds_base_rows": seconds[0],
        "seconds_own_delta_each_row": seconds[-1],
    }


def decomposition() -> dict[str, Any]:
    """Compare the random decomposition with the full one on the hardest matrix: noise."""
    whole = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    leading(whole[:512], RANK, seed=0)  # the first call loads libraries
    began = time.monotonic()
    u, values, v = leading(whole, RANK, seed=0)
    quick = time.monotonic() - began
    began = time.monotonic()
    exact = torch.linalg.svd(whole, full_matrices=False)[1]
    full = time.monotonic() - began
    least = float(exact[RANK:].double().square().sum())
    error = float((whole - u * values @ v).double().square().sum())
    return {
        "shape": [SIZE, SIZE],
        "rank": RANK,
        "seconds": quick,
        "full_seconds": full,
        "times_faster": full / quick,
        "squared_error_over_least": error / least,
    }


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--method", action="append")
    parser.add_argument("--ratio", type=float, default=0.125)
    parser.add_argument("--decomposition", action="store_true")
    parser.add_argument("--serve", type=int, action="append", help="deltas to hold at once")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="folder for the pair, kept; else a temporary one")
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(serve(arguments.work, arguments.method[0], arguments.worker)))
        return
    result: dict[str, Any] = {
        "machine": machine.describe(),
        "versions": machine.versions(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
    }
    name = "delta_decomposition"
    if arguments.decomposition:
        result |= decomposition()
    else:
        name = f"delta_large-{arguments.layers}"
        with tempfile.TemporaryDirectory() as folder:
            work = arguments.work or Path(folder)
            if not (work / "tuned").exists():
                make(work, arguments.layers)
            result["parameters"] = sum(
                torch.Size(shape).numel() for shape in shapes(arguments.layers).values()
            )
            wanted = arguments.method or ["dqrelo", "dqrelo-plus"]
            result["runs"] = [compressed(work, own, arguments.ratio) for own in wanted]
            counts = [0, *(arguments.serve or [])] if arguments.serve else []
            result["served"] = [served(work, wanted[0], count) for count in counts]
    written = json.dumps(result, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()

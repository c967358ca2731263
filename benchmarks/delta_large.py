"""Does a large pair compress in bounded memory and time? And is the random decomposition worth it?

A synthetic pair in bfloat16, shaped as a Llama of 1.1 billion parameters (hidden 2048, FFN 5632, 22
layers, vocabulary 32000, untied), its fine-tune the base plus noise and a part of low rank. Each
compression is a process of its own, measured from outside: seconds, libraries and hashing included,
and the greatest resident memory.

    python benchmarks/delta_large.py --work FOLDER --make          # 4.4 GB, kept
    python benchmarks/delta_large.py --work FOLDER --method dqrelo
    python benchmarks/delta_large.py --decomposition

A method's run replaces its own earlier figures in the results and leaves the others.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from quantize_llama import commit
from torch import Tensor

from unicomp import machine
from unicomp.checkpoint import DTYPES
from unicomp.compress.lowrank import leading
from unicomp.writer import Meta, Writer

RESULTS = Path(__file__).resolve().parent / "results"
SIZE, RANK = 4096, 128


@dataclass(frozen=True, slots=True)
class Size:
    """The shape of a Llama with an untied head."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv: int
    vocab: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor of the model."""
        hidden, narrow = self.hidden, self.hidden * self.kv // self.heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, hidden)}
        for layer in range(self.layers):
            root = f"model.layers.{layer}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                rows = narrow if name[0] in "kv" else hidden
                found[f"{root}.self_attn.{name}.weight"] = (rows, hidden)
            for name in ("gate_proj", "up_proj", "down_proj"):
                shape = (hidden, self.ffn) if name == "down_proj" else (self.ffn, hidden)
                found[f"{root}.mlp.{name}.weight"] = shape
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"{root}.{name}.weight"] = (hidden,)
        return found | {"model.norm.weight": (hidden,), "lm_head.weight": (self.vocab, hidden)}

    def parameters(self) -> int:
        """Return how many numbers that is."""
        return sum(prod(shape) for shape in self.shapes().values())

    def config(self) -> dict[str, Any]:
        """Return its `config.json`."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv,
            "vocab_size": self.vocab,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


LARGE = Size(hidden=2048, ffn=5632, layers=22, heads=32, kv=4, vocab=32000)


def models(size: Size, folders: list[Path]) -> Iterator[tuple[str, list[Tensor]]]:
    """Write a base and its fine-tunes, all but the first of `folders`, tensor by tensor.

    Yields each tensor's name as it is written, with what was written, bfloat16.
    """
    metas = [Meta(name, "BF16", shape) for name, shape in size.shapes().items()]
    writers = []
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(size.config()))
        writers.append(Writer(folder, metas))
    draw = torch.Generator().manual_seed(0)
    for meta in metas:
        base = 0.02 * torch.randn(meta.shape, generator=draw)
        if len(meta.shape) == 1:
            base += 1
        made = [base]
        for _ in folders[1:]:
            delta = 0.001 * torch.randn(meta.shape, generator=draw)
            if len(meta.shape) == 2:
                left, right = (torch.randn(side, 16, generator=draw) for side in meta.shape)
                delta.addmm_(left, right.T, alpha=0.0001)
            made.append(delta.add_(base))
        rounded = [own.to(DTYPES["BF16"]) for own in made]
        for writer, tensor in zip(writers, rounded, strict=True):
            writer.write(meta.name, tensor)
        yield meta.name, rounded
    for writer in writers:
        writer.finish()


def make(size: Size, folders: list[Path]) -> None:
    """Write them all; a folder of that name is replaced."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for _ in models(size, folders):
        pass


def compressed(tuned: Path, base: Path, out: Path, method: str, ratio: float) -> dict[str, Any]:
    """Compress a pair in a process of its own; seconds and peak bytes are taken from outside."""
    command = [sys.executable, "-m", "unicomp", "delta", "compress", str(tuned)]
    command += ["--base", str(base), "--out", str(out), "--method", method]
    command += ["--ratio", str(ratio), "--json", "--quiet", "--overwrite", "--fresh"]
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    if status:
        raise RuntimeError(f"{method} failed with status {status}")
    made = json.loads((out / "unicomp.json").read_text())
    return {
        "ratio": ratio,
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "totals": made["totals"],
    }


def about() -> dict[str, Any]:
    """Return what every figure must carry: machine, versions, commit, threads and load."""
    return {
        "machine": machine.describe(),
        "versions": machine.versions(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
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


def store(name: str, value: dict[str, Any]) -> None:
    """Write results, and print them."""
    written = json.dumps(value, indent=1) + "\n"
    (RESULTS / f"{name}.json").write_text(written, encoding="utf-8")
    print(written)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, help="folder for the pair")
    parser.add_argument("--make", action="store_true", help="write the pair, and no more")
    parser.add_argument("--method", action="append", default=[])
    parser.add_argument("--ratio", type=float, default=0.125)
    parser.add_argument("--decomposition", action="store_true")
    arguments = parser.parse_args()
    if arguments.decomposition:
        store("delta_decomposition", about() | decomposition())
        return
    if arguments.work is None:
        parser.error("--work is missing")
    base, tuned = arguments.work / "base", arguments.work / "tuned"
    if arguments.make:
        make(LARGE, [base, tuned])
    for method in arguments.method:
        own = about()
        own |= compressed(tuned, base, arguments.work / method, method, arguments.ratio)
        file = RESULTS / "delta_large.json"
        known = json.loads(file.read_text()) if file.is_file() else {"runs": {}}
        runs = known["runs"] | {f"{method} at {arguments.ratio:g}": own}
        store("delta_large", {"parameters": LARGE.parameters(), "runs": runs})


if __name__ == "__main__":
    main()

"""How far is the forecast of memory from what a run takes?

`unicomp plan --json` gives the forecast, the same command without `plan` is then run as a process
of its own and watched from outside: its greatest resident size, as the kernel counts it. A forecast
that is too low breaks a promise, one that is far too high declines runs that would fit; both are
shown for each case, with the parts of the forecast. A case is stored as soon as it is measured.

Run:  python benchmarks/memory_forecast.py [CASE ...]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize_llama import apart, commit

HERE = Path(__file__).resolve().parent
LLAMA = {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 4096}
TWO = LLAMA | {"num_hidden_layers": 2}
THREE = LLAMA | {"num_hidden_layers": 3}
SHORT = ["--samples", "8", "--seq-len", "512"]
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "vocab_size": 32_000,
    "num_hidden_layers": 2,
}
# A case: the sizes of a model, none for the embedded one, and the command that is measured.
CASES: dict[str, tuple[dict[str, int], list[str]]] = {
    "embedded": ({}, ["quantize", "--seq-len", "256"]),
    "1024 wide": (TWO, ["quantize", "--samples", "32"]),
    "1024 wide, no drift": (TWO, ["quantize", "--samples", "32", "--drift", "0"]),
    "1024 wide, rtn": (TWO, ["quantize", "--method", "rtn"]),
    "1024 wide, magnitude of all": (
        THREE,
        ["prune", "--method", "magnitude", "--scope", "global"],
    ),
    "1024 wide, wanda by sensitivity": (
        THREE,
        [
            *"prune --method wanda --allocation sensitivity".split(),
            *("--samples", "4", "--seq-len", "256"),
        ],
    ),
    "1024 wide, sparsegpt": (THREE, ["prune", "--method", "sparsegpt", *SHORT]),
    "embedded, width": ({}, ["prune", "--method", "width", "--seq-len", "256"]),
    "1024 wide, width": (THREE, ["prune", "--method", "width", *SHORT]),
    "1024 wide, width by second order, not refitted": (
        THREE,
        ["prune", "--method", "width", "--criterion", "second-order", "--no-compensate", *SHORT],
    ),
    "1024 wide, sink heads": (
        THREE,
        ["prune", *"--method heads --heads 8 --kv-heads 8 --criterion sink".split(), *SHORT],
    ),
    "1024 wide, depth": (THREE, ["prune", "--method", "depth", *SHORT]),
    "1024 wide, depth by influence, not refitted": (
        THREE,
        ["prune", "--method", "depth", "--criterion", "influence", "--no-compensate", *SHORT],
    ),
    "2048 wide, width": (LARGE, ["prune", "--method", "width", *SHORT]),
    "2048 wide, depth": (LARGE, ["prune", "--method", "depth", "--layers", "1", *SHORT]),
    "4096 wide": (
        {
            "hidden_size": 4096,
            "intermediate_size": 8192,
            "vocab_size": 1024,
            "num_hidden_layers": 1,
        },
        ["quantize", "--samples", "4"],
    ),
    "4096 wide, vocabulary 128000, rtn": (
        {
            "hidden_size": 4096,
            "intermediate_size": 4096,
            "vocab_size": 128_000,
            "num_hidden_layers": 1,
        },
        ["quantize", "--method", "rtn"],
    ),
}


def make(folder: Path, sizes: dict[str, int], shard: str = "50GB") -> None:
    """Write a random Llama in bfloat16 with the embedded model's tokenizer, in shards."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from unicomp.hub import resolve

    torch.manual_seed(0)
    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(num_attention_heads=heads, tie_word_embeddings=True, **sizes)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(resolve("builtin:tinyworld").folder).save_pretrained(folder)


def peak(command: list[str]) -> int:
    """Run a process and return its greatest resident size in bytes."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"failed: {' '.join(command)}\n{said.read().decode()[-2000:]}")
    return usage.ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def measure(sizes: dict[str, int], words: list[str], work: Path) -> dict[str, Any]:
    """Return forecast and peak of one case."""
    model = "builtin:tinyworld"
    if sizes:
        model = str(work / "model")
        apart(make, work / "model", sizes)
    verb, *options = words
    command = [sys.executable, "-m", "unicomp", verb, model, "--out", str(work / "out")]
    command += ["--calibration", "builtin:tinyworld", *options]
    planned = subprocess.run(
        [*command, "--dry-run", "--json"], check=True, capture_output=True, text=True
    )
    plan = json.loads(planned.stdout)
    actual = peak(command)
    return {
        "command": verb,
        "options": options,
        "sizes": sizes,
        "forecast_bytes": plan["peak_host_bytes"],
        "peak_rss_bytes": actual,
        "forecast_by_peak": plan["peak_host_bytes"] / actual,
        "parts": plan["memory"],
    }


def main() -> None:
    """Measure the cases and store each; others stay in the file."""
    from unicomp import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="their names; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory_forecast.json")
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no such case: {', '.join(unknown)}; there are: {', '.join(CASES)}")
    for name in options.cases or CASES:
        with tempfile.TemporaryDirectory() as work:
            row = measure(*CASES[name], Path(work))
        print(
            f"{name}: forecast {row['forecast_bytes'] / 1e9:.3f} GB, "
            f"peak {row['peak_rss_bytes'] / 1e9:.3f} GB, {row['forecast_by_peak']:.2f} of it",
            file=sys.stderr,
            flush=True,
        )
        row |= {"when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
        cases = json.loads(options.out.read_text())["cases"] if options.out.exists() else {}
        cases[name] = row
        result = {
            "schema": "unicomp.benchmark/1",
            "benchmark": "memory_forecast",
            "cases": {known: cases[known] for known in CASES if known in cases},
            "machine": machine.describe(),
            "versions": machine.versions(),
        }
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

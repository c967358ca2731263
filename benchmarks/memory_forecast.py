"""How far is the forecast of memory from what a run takes?

`unicomp plan --json` gives the forecast, the same command without `plan` is then run as a process
of its own and watched from outside: its greatest resident size, as the kernel counts it. A forecast
that is too low breaks a promise, one that is far too high declines runs that would fit; both are
shown for each case, with the parts of the forecast.

Run:  python benchmarks/memory_forecast.py
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
CASES: dict[str, tuple[dict[str, int], list[str]]] = {
    "embedded": ({}, ["--seq-len", "256"]),
    "1024 wide": (LLAMA | {"num_hidden_layers": 2}, ["--samples", "32"]),
    "1024 wide, no drift": (
        LLAMA | {"num_hidden_layers": 2},
        ["--samples", "32", "--drift", "0"],
    ),
    "1024 wide, rtn": (LLAMA | {"num_hidden_layers": 2}, ["--method", "rtn"]),
    "4096 wide": (
        {
            "hidden_size": 4096,
            "intermediate_size": 8192,
            "vocab_size": 1024,
            "num_hidden_layers": 1,
        },
        ["--samples", "4"],
    ),
    "4096 wide, vocabulary 128000, rtn": (
        {
            "hidden_size": 4096,
            "intermediate_size": 4096,
            "vocab_size": 128_000,
            "num_hidden_layers": 1,
        },
        ["--method", "rtn"],
    ),
}


def make(folder: Path, sizes: dict[str, int]) -> None:
    """Write a random Llama in bfloat16 with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from unicomp.hub import resolve

    torch.manual_seed(0)
    heads = sizes["hidden_size"] // 64
    config = LlamaConfig(num_attention_heads=heads, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
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


def measure(sizes: dict[str, int], options: list[str], work: Path) -> dict[str, Any]:
    """Return forecast and peak of one case."""
    model = "builtin:tinyworld"
    if sizes:
        model = str(work / "model")
        apart(make, work / "model", sizes)
    command = [sys.executable, "-m", "unicomp", "quantize", model, "--out", str(work / "out")]
    command += ["--calibration", "builtin:tinyworld", *options]
    planned = subprocess.run(
        [*command, "--dry-run", "--json"], check=True, capture_output=True, text=True
    )
    plan = json.loads(planned.stdout)
    actual = peak(command)
    return {
        "options": options,
        "sizes": sizes,
        "forecast_bytes": plan["peak_host_bytes"],
        "peak_rss_bytes": actual,
        "forecast_by_peak": plan["peak_host_bytes"] / actual,
        "parts": plan["memory"],
    }


def main() -> None:
    """Measure all cases and store them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "memory_forecast.json")
    options = parser.parse_args()
    found = {}
    for name, (sizes, more) in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            found[name] = measure(sizes, more, Path(work))
        print(
            f"{name}: forecast {found[name]['forecast_bytes'] / 1e9:.2f} GB, "
            f"peak {found[name]['peak_rss_bytes'] / 1e9:.2f} GB",
            file=sys.stderr,
        )
    from unicomp import machine

    result = {
        "schema": "unicomp.benchmark/1",
        "benchmark": "memory_forecast",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cases": found,
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""How far is a plan's forecast of memory and time from what the command takes?

A random Llama of 300 million parameters in bfloat16 is written in shards. The machine is measured
as a user would (`unicomp env --measure`, stored in a folder of its own); then each command is
planned, run as a process of its own and watched from outside: its seconds from start to end and its
greatest resident size. A case is good where the peak is within 20 % of the forecast, the time
within 40 %, and the limit that the plan names is not passed. A case is stored as soon as it is
measured.

Run:  python benchmarks/forecast.py [CASE ...]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from memory_forecast import make
from quantize_llama import apart, commit

HERE = Path(__file__).resolve().parent
SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "vocab_size": 32_000,
    "num_hidden_layers": 21,
}
SHARD = "200MB"
MEMORY, TIME = 0.20, 0.40  # of the actual figure: how far a forecast may be from it


def text(samples: int) -> list[str]:
    """Return the options of so many windows of 512 tokens of the embedded text."""
    return ["--calibration", "builtin:tinyworld", "--samples", str(samples), "--seq-len", "512"]


CASES: dict[str, list[str]] = {
    "rtn, 4 bits": ["quantize", "--method", "rtn"],
    "gptq, 4 bits": ["quantize", "--method", "gptq", *text(8)],
    "ternary": ["quantize", "--method", "ternary", *text(4)],
    "wanda": ["prune", "--method", "wanda", *text(8)],
    "sparsegpt": ["prune", "--method", "sparsegpt", *text(4)],
    "width": ["prune", "--method", "width", *text(2)],
    "depth": ["prune", "--method", "depth", "--criterion", "influence", *text(2)],
}


def within(forecast: float, actual: float, share: float) -> bool:
    """Tell whether a forecast is off by no more than a share of the actual figure."""
    return abs(forecast - actual) <= share * actual


def kept(memory: dict[str, Any], seconds: dict[str, Any]) -> bool:
    """Tell whether a plan kept its word: both figures near enough, and its limit not passed."""
    return (
        within(memory["forecast"], memory["actual"], MEMORY)
        and within(seconds["forecast"], seconds["actual"], TIME)
        and memory["most"] >= memory["actual"]
    )


def watch(command: list[str]) -> tuple[float, int]:
    """Run a process; return its seconds and its greatest resident bytes, as the kernel counts."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - began
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"failed: {' '.join(command)}\n{said.read().decode()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def told(command: list[str]) -> dict[str, Any]:
    """Return what a command says with `--json`."""
    found = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
    said: dict[str, Any] = json.loads(found.stdout)
    return said


def measure(words: list[str], model: Path, out: Path) -> dict[str, Any]:
    """Return forecast and actual figures of one case."""
    verb, *options = words
    command = [sys.executable, "-m", "unicomp", verb, str(model), "--out", str(out), *options]
    plan = told([*command, "--dry-run"])
    seconds, peak = watch(command)
    stated = json.loads((out / "unicomp.json").read_text())["cost"]
    memory = {"forecast": plan["peak_host_bytes"], "actual": peak, "parts": plan["memory"]}
    memory["most"] = plan["most_host_bytes"]
    time_ = {"forecast": plan["seconds"], "actual": seconds, "parts": plan["times"]}
    return {
        "command": words,
        "memory": memory,
        "seconds": time_,
        "comparison": plan.get("comparison"),
        "stated": stated,
        "good": kept(memory, time_),
    }


def main() -> None:
    """Measure the cases and store each; others stay in the file."""
    from unicomp import machine

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help="their names; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "forecast.json")
    parser.add_argument("--work", type=Path, help="a folder whose model is used again")
    options = parser.parse_args()
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no such case: {', '.join(unknown)}; there are: {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as room:
        work = options.work or Path(room)
        os.environ["XDG_CACHE_HOME"] = room
        if not (work / "model").is_dir():
            work.mkdir(exist_ok=True)
            apart(make, work / "model", SIZES, SHARD)
        env = told([sys.executable, "-m", "unicomp", "env", "--measure"])
        for name in options.cases or CASES:
            row = measure(CASES[name], work / "model", Path(room) / name.replace(", ", "-"))
            memory, seconds = row["memory"], row["seconds"]
            print(
                f"{name}: memory {memory['forecast'] / 1e9:.3f} GB forecast, "
                f"{memory['actual'] / 1e9:.3f} actual, {memory['most'] / 1e9:.3f} at most; "
                f"time {seconds['forecast']:.1f} s forecast, {seconds['actual']:.1f} actual"
                f"{'' if row['good'] else '; MISSED'}",
                file=sys.stderr,
                flush=True,
            )
            row |= {"when": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
            row["measured"] = env["measured"]
            cases = json.loads(options.out.read_text())["cases"] if options.out.exists() else {}
            cases[name] = row
            result = {
                "schema": "unicomp.benchmark/1",
                "benchmark": "forecast",
                "sizes": SIZES,
                "cases": {known: cases[known] for known in CASES if known in cases},
                "machine": machine.describe(),
                "versions": machine.versions(),
            }
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

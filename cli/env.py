"""`unicomp env`: what this machine and this installation offer."""

import os
import time
from typing import Annotated, Any

import typer

from unicomp import size
from unicomp.cli import show
from unicomp.cli.options import Json, Quiet

OPTIONAL = ("compressed-tensors", "accelerate", "huggingface-hub", "pyarrow", "gguf", "lm-eval")
VARIABLES = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "NO_COLOR")
READ_BYTES = 1 << 28

Measure = Annotated[
    bool,
    typer.Option(
        "--measure", help="Also measure matrix products (GFLOP/s) and memory (GB/s); some seconds."
    ),
]


def env(measure: Measure = False, json: Json = False, quiet: Quiet = False) -> None:
    """Show versions, processor, memory, GPUs and the settings that unicomp heeds.

    Example: unicomp env --measure
    """
    from unicomp import machine

    found: dict[str, Any] = {
        "schema": "unicomp.env/1",
        "versions": machine.versions() | {name: _version(name) for name in OPTIONAL},
        "machine": machine.describe(),
        "gpus": _gpus(),
        "environment": {name: os.environ.get(name) for name in VARIABLES},
        "measured": _measure() if measure else None,
    }
    if json:
        show.json(found)
        return
    about = found["machine"]
    memory = about["memory_bytes"]
    facts = [(name, version or "not installed") for name, version in found["versions"].items()]
    facts += [
        ("system", f"{about['system']} {about['arch']}"),
        ("processor", f"{about['cpu']}, {about['cores']} cores"),
        ("instructions", " ".join(about["isa"]) or "none of those that unicomp looks for"),
        ("memory", "unknown" if memory is None else size.show(memory)),
        (
            "GPUs",
            ", ".join(f"{g['name']} {size.show(g['bytes'])}" for g in found["gpus"]) or "none",
        ),
    ]
    facts += [(name, value or "not set") for name, value in found["environment"].items()]
    if found["measured"]:
        facts += [
            ("matrix product", f"{found['measured']['gflop_per_s']:.0f} GFLOP/s in float32"),
            ("memory read", f"{found['measured']['read_gb_per_s']:.1f} GB/s"),
        ]
    show.facts(facts)


def _version(name: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {"name": p.name, "bytes": p.total_memory, "capability": f"{p.major}.{p.minor}"}
        for p in properties
    ]


def _measure() -> dict[str, float | int]:
    """Return the best of a few short runs on all threads: float32 products, and a sum's reads."""
    import torch

    square = torch.ones(1024, 1024)
    block = torch.ones(READ_BYTES // 4)
    product = _best(lambda: square @ square)
    reading = _best(block.sum)
    return {
        "threads": torch.get_num_threads(),
        "gflop_per_s": 2 * 1024**3 / product / 1e9,
        "read_gb_per_s": READ_BYTES / reading / 1e9,
    }


def _best(work: Any) -> float:
    """Return the least seconds of at least three calls within about one second."""
    least, spent = float("inf"), 0.0
    for call in range(20):
        began = time.perf_counter()
        work()
        taken = time.perf_counter() - began
        least, spent = min(least, taken), spent + taken
        if spent > 1 and call >= 2:
            break
    return least

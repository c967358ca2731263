"""`unicomp env`: what this machine and this installation offer."""

import os
from dataclasses import asdict
from typing import Annotated, Any

import typer

from unicomp import size
from unicomp.cli import show
from unicomp.cli.options import Json, Quiet

OPTIONAL = ("compressed-tensors", "accelerate", "huggingface-hub", "pyarrow", "gguf", "lm-eval")
VARIABLES = ("HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "NO_COLOR")
# What is measured: its key, its name, and the unit that it is shown in.
SHOWN = (
    ("product", "float32 products", 1e9, "GFLOP/s"),
    ("thin", "float32 products of 128 rows", 1e9, "GFLOP/s"),
    ("half", "bfloat16 products", 1e9, "GFLOP/s"),
    ("moments", "second moments", 1e9, "GFLOP/s"),
    ("factor", "factors and triangular solves", 1e9, "GFLOP/s"),
    ("memory", "elementwise work in memory", 1e9, "GB/s"),
    ("sort", "lesser half of a row found", 1e6, "million/s"),
    ("line", "lesser half of many rows found", 1e6, "million/s"),
    ("grid", "weights whose scales are found", 1e6, "million/s"),
    ("rounding", "weights rounded for those before", 1e6, "million/s"),
    ("states", "files written and read again", 1e9, "GB/s"),
    ("hashing", "SHA-256", 1e9, "GB/s"),
    ("disk", "written to disk", 1e9, "GB/s"),
    ("start", "importing the libraries", 1, "s"),
)

Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Also measure products (GFLOP/s), memory and disk (GB/s) and start-up (s), and store "
        "them for later plans; half a minute.",
    ),
]


def env(measure: Measure = False, json: Json = False, quiet: Quiet = False) -> None:
    """Show versions, the machine, and the settings that unicomp heeds.

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
            (name, f"{found['measured'][key] / scale:.1f} {unit}")
            for key, name, scale, unit in SHOWN
            if found["measured"][key] is not None
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


def _measure() -> dict[str, float | int | None]:
    """Measure what plans rest on, and store it for them."""
    from unicomp.recipes.stage import throughput

    found = throughput.measure()
    try:
        throughput.store(found)
    except OSError as error:
        show.note(f"not stored for later plans: {error.strerror or error}")
    values = asdict(found)
    del values["stored"]
    return values

"""How many bytes ahead should the kernels fetch, with one token?

`uc_ahead` in `kernels/csrc/isa.c` says so for each processor. Here the same sources are built once
for every distance asked for, and the builds take turns, call by call, with more than a gigabyte of
weights: on a machine whose memory others use too, runs one after the other would say nothing. Each
build's first product must have the bits of the installed kernels.

Run:  python benchmarks/fetch_ahead.py --shapes 4096x4096 --threads 1 2
A run replaces what the file of results has of the same processor, shape and threads.
"""

import argparse
import ctypes
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from quantize_llama import commit

from unicomp import machine
from unicomp.kernels import blocked, cpu
from unicomp.kernels.blocked import Blocked, Kind
from unicomp.kernels.packed import PackedTensor, Scheme

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "kernels" / "csrc"
KINDS: dict[Kind, Scheme] = {"int4": Scheme(4, 128), "int2": Scheme(2, -1), "trit5": Scheme(2, -1)}
NUMBERS = {"int4": 1, "int2": 2, "trit5": 3}  # of enum uc_kind
LAYOUT_BYTES = 1024  # more than struct uc_layout has
Call = Callable[[Blocked, torch.Tensor, torch.Tensor, int], None]


class Product(ctypes.Structure):
    """`struct uc_product` of product.h."""

    _fields_ = (
        *(
            (f"{name}{part}", kind)
            for name in ("x", "weight", "bias", "out")
            for part, kind in (("", ctypes.c_void_p), ("_bytes", ctypes.c_size_t))
        ),
        ("tokens", ctypes.c_size_t),
        ("dtype", ctypes.c_int),
        ("exact", ctypes.c_int),
        ("threads", ctypes.c_uint),
    )


def build(folder: Path, ahead: int) -> Call:
    """Build the kernels with one distance; return what multiplies one token, into `out`."""
    asked = folder / f"asked{ahead}.c"
    asked.write_text(
        "#include <stddef.h>\nsize_t uc_asked(size_t tokens);\n"
        f"size_t uc_asked(size_t tokens) {{ (void)tokens; return {ahead}; }}\n"
    )
    sources = [path for path in CSRC.glob("*.c") if path.name != "module.c"]
    objects = []
    flags = f"-std=c11 -O3 -ffp-contract=off -pthread -fPIC -I{CSRC}".split()
    for source in (*sources, asked):
        objects.append(str(folder / f"{source.stem}-{ahead}.o"))
        # Only who asks for the distance: isa.c has a function of that name.
        own = ["-Duc_ahead=uc_asked"] if source.name == "product.c" else []
        command = ["cc", *flags, *own, "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True)
    name = str(folder / f"ahead{ahead}.so")
    link = ["cc", "-shared", "-pthread", "-Wl,-Bsymbolic", *objects, "-lm", "-o", name]
    subprocess.run(link, check=True)
    library = ctypes.CDLL(name)
    integer, long = ctypes.c_int, ctypes.c_longlong
    library.uc_layout_of.argtypes = [ctypes.c_void_p, integer, long, long, long, integer, integer]

    def call(weight: Blocked, x: torch.Tensor, out: torch.Tensor, threads: int) -> None:
        layout = ctypes.create_string_buffer(LAYOUT_BYTES)
        rows, columns = weight.shape
        group = weight.scheme.group_size
        wrong = library.uc_layout_of(layout, NUMBERS[weight.kind], rows, columns, group, 1, 1)
        sides = ((x, 4), (weight.data, 1), (None, 0), (out, 4))
        given = [
            value
            for side, wide in sides
            for value in ((side.data_ptr(), side.numel() * wide) if side is not None else (None, 0))
        ]
        product = Product(*given, 1, 0, 0, threads)
        if wrong or library.uc_linear(layout, ctypes.byref(product)):
            raise SystemExit(f"{weight.kind} {rows}x{columns}: the kernels refuse the product")

    return call


def measure(shape: str, threads: int, calls: dict[int, Call], options: Any) -> dict[str, Any]:
    """Let the distances take turns over all weights of each kind; return medians of each."""
    rows, columns = map(int, shape.split("x"))
    x = torch.randn(1, columns, generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for kind, scheme in KINDS.items():
        low, high = (-8, 8) if kind == "int4" else (-1, 2)
        codes = torch.randint(low, high, (rows, columns), dtype=torch.int8)
        scale = torch.full((rows, scheme.groups(columns)), 1 / 64, dtype=torch.float16)
        first = cpu.block(PackedTensor(codes, scale, None, scheme), kind)
        size = blocked.blocked_bytes(kind, (rows, columns), scheme, torch.float16)
        weights = [first]
        for _ in range(1, round(options.cold * 1e9 / size)):
            data = cpu.allocate(size).copy_(first.data)
            weights.append(Blocked(data, kind, (rows, columns), scheme, torch.float16))
        expected, out = cpu.linear(x, first), torch.empty(1, rows)
        for ahead, call in calls.items():
            call(first, x, out.fill_(torch.nan), threads)
            if not torch.equal(out, expected):
                raise SystemExit(f"{kind}, {ahead} bytes ahead: not the bits of the kernels")
        times: dict[int, list[float]] = {ahead: [] for ahead in calls}
        order, end = list(calls), time.perf_counter() + options.seconds
        at = 0
        while time.perf_counter() < end:
            order.append(order.pop(0))
            for ahead in order:
                took = []
                for _ in range(5):
                    at = (at + 1) % len(weights)
                    start = time.perf_counter()
                    calls[ahead](weights[at], x, out, threads)
                    took.append(time.perf_counter() - start)
                times[ahead].append(statistics.median(took))
        base = times[options.ahead[0]]
        found[kind] = {
            str(ahead): {
                "ms": 1e3 * statistics.median(own),
                "gb_per_s": size / statistics.median(own) / 1e9,
                "times_as_fast": statistics.median(a / b for a, b in zip(base, own, strict=True)),
            }
            for ahead, own in times.items()
        } | {"turns": len(base)}
        print(shape, threads, kind, json.dumps(found[kind]))
    return {
        "shape": shape,
        "threads": threads,
        "kinds": found,
        "isa": cpu.isa(),
        "commit": commit(),
        "machine": machine.describe(),
    }


def main() -> None:
    """Measure every shape and number of threads; store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096", "4096x14336"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--ahead", nargs="+", type=int, default=[0, 1024, 3072], help="bytes")
    parser.add_argument("--seconds", type=float, default=4, help="of turns for each kind")
    parser.add_argument("--cold", type=float, default=1.1, help="GB of weights")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fetch_ahead.json")
    options = parser.parse_args()

    def key(one: dict[str, Any]) -> tuple[Any, ...]:
        return (one["machine"]["cpu"], *one["machine"]["isa"], one["shape"], one["threads"])

    stored = json.loads(options.out.read_text())["results"] if options.out.is_file() else []
    results = {key(one): one for one in stored}
    with tempfile.TemporaryDirectory() as folder:
        calls = {ahead: build(Path(folder), ahead) for ahead in options.ahead}
        for shape in options.shapes:
            for threads in options.threads:
                one = measure(shape, threads, calls, options)
                results[key(one)] = one
    record = {"schema": "unicomp.benchmark/1", "benchmark": "fetch_ahead"}
    options.out.write_text(
        json.dumps(record | {"results": list(results.values())}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()

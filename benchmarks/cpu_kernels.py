"""How fast are the packed products here, beside what a user could install instead?

One weight [out, in] times M tokens, for each contender: our kernels (int4 in groups of 128, with
activations rounded to int8 or exact, ternary in 2 and 1.6 bits, on the best instruction set and on
AVX2), torch (bfloat16, float32, dynamic int8, its int4), ONNX Runtime's MatMulNBits, OpenVINO's
compressed int4 and llama.cpp's Q4_0. Each contender is a process of its own that holds more than a
gigabyte of distinct weights; in each round every one in turn is told to make some calls and says
how long they took. "cold" goes from weight to weight, so that each comes from memory, as when a
model decodes; "hot" repeats one. Right before its calls a contender multiplies with all its weights
once, untimed: a virtual machine takes back the pages of a process that rests. The read ceiling is
the fastest of several plain loops over memory (`read_ceiling.c`), measured in every round too.

Pages: our weights lie on huge pages wherever the system gives them. `--pages huge` has the others'
allocations on huge pages too (a tunable of glibc), `--pages plain` leaves them as they come.

No timing counts before the result is right: each contender compares its first product with one in
float64 of the same dequantized weight.

Run:  python benchmarks/cpu_kernels.py --shapes 4096x4096 --threads 1 2
A run replaces what the file of results has of the same processor, shape, threads and pages, and
leaves the rest: so it can be made in pieces, each of which names its commit and machine.
The others come from the package index: pip install onnx onnxruntime openvino. llama.cpp is built
from its sources there (`pip download llama-cpp-python`, CMake in `vendor/llama.cpp/ggml` with
BUILD_SHARED_LIBS); `--ggml FOLDER` says where its libraries are.
"""

import argparse
import contextlib
import ctypes
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize_llama import commit

HERE = Path(__file__).resolve().parent
GROUP = 128
TOKENS = (1, 4, 16, 64, 256, 512)
Call = Callable[[Any], Any]
OURS: dict[str, tuple[Any, int, str | None, Any]] = {  # kind, bits, instruction set, compute
    "ours int4": ("int4", 4, None, "int8"),
    "ours int4 avx2": ("int4", 4, "avx2", "int8"),
    "ours int4 exact": ("int4", 4, None, "exact"),
    "ours ternary 2.0": ("int2", 2, None, "int8"),
    "ours ternary 1.6": ("trit5", 2, None, "int8"),
}
# name -> (bits of a weight, least group of columns that shares a scale, bits of a scale)
BITS = {
    "ours int4": 4 + 16 / GROUP,
    "ours int4 avx2": 4 + 16 / GROUP,
    "ours int4 exact": 4 + 16 / GROUP,
    "ours ternary 2.0": 2.0,
    "ours ternary 1.6": 1.6,
    "torch bfloat16": 16,
    "torch float32": 32,
    "torch dynamic int8": 8,
    "torch int4pack": 4 + 32 / GROUP,
    "onnxruntime": 4 + 32 / GROUP,
    "openvino": 4 + 16 / GROUP,
    "llama.cpp Q4_0": 4 + 16 / 32,
}


# How many times our time others should take for one token, and ours among each other.
WANTED = {
    ("onnxruntime", "ours int4"): 1.5,
    ("torch int4pack", "ours int4"): 2.0,
    ("ours int4", "ours ternary 2.0"): 1.9,
    ("ours ternary 2.0", "ours ternary 1.6"): 1.0,
}

# ONNX Runtime holds a weight three times over: fewer distinct ones, still far beyond any cache.
FEWER = {"onnxruntime": 0.4}

# Made for few tokens, or too slow for many: up to how many they are measured.
MOST_TOKENS = {"ours int4 avx2": 16, "torch float32": 16, "torch int4pack": 16}
HOT_TOKENS = 16  # beyond, a weight is read once for so many tokens that cold and hot are the same
BURST = 0.2  # seconds of calls after which a turn ends, once there are two


class Contender:
    """One way to multiply: makes weights, calls, and what a call should give."""

    def __init__(
        self, name: str, rows: int, columns: int, threads: int, ggml: Path | None = None
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self.name, self.rows, self.columns, self.threads = name, rows, columns, threads
        self.about: dict[str, Any] = {}
        self.drawn: dict[Any, Any] = {}
        self.kept: list[Any] = []
        self.ggml = ggml
        self.dtype = (
            torch.bfloat16 if name in ("torch bfloat16", "torch int4pack") else torch.float32
        )
        self.tolerance = 0.05  # of int8 activations; a wrong layout gives about 1.4
        kind = name.removeprefix("ours ").split()[0]
        make = "_ours" if name in OURS else "_" + re.sub(r"\W", "_", name).lower()
        self.make: Callable[[int], tuple[Call, Any]] = getattr(self, make)
        self.kind = kind

    def inputs(self, tokens: int) -> Any:
        """Return activations [tokens, in]."""
        import torch

        random = torch.Generator().manual_seed(tokens)
        return torch.randn(tokens, self.columns, generator=random).to(self.dtype)

    def _codes(self, seed: int, low: int, high: int) -> Any:
        """Return int8 [rows, columns], drawn once and turned by as many rows as the seed says."""
        import torch

        if low not in self.drawn:
            random = torch.Generator().manual_seed(0)
            shape = (self.rows, self.columns)
            own = torch.randint(low, high + 1, shape, generator=random, dtype=torch.int8)
            self.drawn[low] = own
        return self.drawn[low].roll(seed, 0)

    def _scale(self, seed: int, groups: int, dtype: Any) -> Any:
        """Return [rows, groups], drawn once and turned likewise."""
        import torch

        if dtype not in self.drawn:
            random = torch.Generator().manual_seed(1)
            own = ((0.5 + torch.rand(self.rows, groups, generator=random)) / 64).to(dtype)
            self.drawn[dtype] = own
        return self.drawn[dtype].roll(seed, 0)

    def _ours(self, seed: int) -> tuple[Call, Any]:
        import torch

        from unicomp.kernels import blocked, cpu
        from unicomp.kernels.packed import PackedTensor, Scheme

        kind, bits, isa, compute = OURS[self.name]
        if isa is not None:
            cpu.use(isa)
        self.about = {"isa": cpu.isa(), "pages": "huge", "compute": compute}
        cpu.set_threads(self.threads)
        group = GROUP if kind == "int4" else -1
        scheme = Scheme(bits, group)
        low, high = (-8, 7) if kind == "int4" else (-1, 1)
        scale = self._scale(seed, scheme.groups(self.columns), torch.float16)
        packed = PackedTensor(self._codes(seed, low, high), scale, None, scheme)
        size = blocked.blocked_bytes(kind, (self.rows, self.columns), scheme, torch.float16)
        weight = cpu.block(packed, kind, cpu.allocate(size))
        return lambda x: cpu.linear(x, weight, compute=compute), packed.dequantize

    def _torch_bfloat16(self, seed: int) -> tuple[Call, Any]:
        import torch

        weight = self._codes(seed, -8, 7).to(torch.bfloat16)
        return lambda x: torch.nn.functional.linear(x, weight), weight.float

    def _torch_float32(self, seed: int) -> tuple[Call, Any]:
        import torch

        weight = self._codes(seed, -8, 7).float()
        return lambda x: torch.nn.functional.linear(x, weight), weight.float

    def _torch_dynamic_int8(self, seed: int) -> tuple[Call, Any]:
        import torch

        torch.backends.quantized.engine = "onednn"
        plain = self._codes(seed, -127, 127).float() / 64
        scales = torch.full((self.rows,), 1 / 64, dtype=torch.float64)
        zeros = torch.zeros(self.rows, dtype=torch.int64)
        weight = torch.quantize_per_channel(plain, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed), weight.dequantize

    def _torch_int4pack(self, seed: int) -> tuple[Call, Any]:
        import torch

        codes = self._codes(seed, 0, 15)
        scale = self._scale(seed, self.columns // GROUP, torch.bfloat16)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        pairs = torch.stack([scale.T, torch.zeros_like(scale.T)], -1).contiguous()

        def plain() -> Any:
            wide = scale.float().repeat_interleave(GROUP, 1)
            return (codes.float() - 8) * wide

        def call(x: Any) -> Any:
            return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, pairs)

        return call, plain

    def _onnxruntime(self, seed: int) -> tuple[Call, Any]:
        import numpy as np
        import onnxruntime
        import torch
        from onnx import TensorProto, helper, numpy_helper

        codes = self._codes(seed, 0, 15)
        groups = self.columns // GROUP
        scale = self._scale(seed, groups, torch.float32)
        pairs = codes.view(self.rows, groups, GROUP // 2, 2)
        packed = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8).numpy()
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            ["y"],
            domain="com.microsoft",
            K=self.columns,
            N=self.rows,
            bits=4,
            block_size=GROUP,
            accuracy_level=4,
        )
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", self.columns])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", self.rows])],
            [
                numpy_helper.from_array(packed, "w"),
                numpy_helper.from_array(scale.reshape(-1).numpy(), "s"),
            ],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.enable_cpu_mem_arena = False  # it would keep each weight once more
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

        def plain() -> Any:
            return (codes.float() - 8) * scale.repeat_interleave(GROUP, 1)

        return lambda x: torch.from_numpy(np.asarray(session.run(None, {"x": x.numpy()})[0])), plain

    def _openvino(self, seed: int) -> tuple[Call, Any]:
        import numpy as np
        import openvino
        import torch
        from openvino import opset13 as ops

        codes = self._codes(seed, 0, 15)
        groups = self.columns // GROUP
        scale = self._scale(seed, groups, torch.float16)
        pairs = codes.view(self.rows, groups, GROUP // 2, 2)
        packed = (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8).numpy()
        shape = openvino.Shape([self.rows, groups, GROUP])
        tensor = openvino.Tensor(packed.reshape(-1), shape, openvino.Type.u4)
        weight = ops.convert(ops.constant(tensor), np.float16)
        centred = ops.subtract(weight, ops.constant(np.full((1, 1, 1), 8, np.float16)))
        scaled = ops.multiply(centred, ops.constant(scale.numpy()[:, :, None]))
        flat = ops.reshape(scaled, np.array([self.rows, self.columns]), False)
        x = ops.parameter([-1, self.columns], np.float32, name="x")
        product = ops.matmul(x, ops.convert(flat, np.float32), False, True)
        compiled = openvino.Core().compile_model(
            openvino.Model([product], [x], "product"),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": str(self.threads),
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(GROUP),
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        request = compiled.create_infer_request()

        def plain() -> Any:
            return (codes.float() - 8) * scale.float().repeat_interleave(GROUP, 1)

        self.kept.append(packed)  # its constants lie there

        def call(x: Any) -> Any:
            return torch.from_numpy(request.infer([x.numpy()])[0])

        return call, plain

    def _llama_cpp_q4_0(self, seed: int) -> tuple[Call, Any]:
        import ggml_product
        import torch

        if self.ggml is None:
            raise SystemExit("no libraries: `--ggml FOLDER` says where they are")
        if "ggml" not in self.drawn:
            most = max(TOKENS)
            self.drawn["ggml"] = ggml_product.Library(
                self.ggml, self.threads, self.rows, self.columns, most
            )
        codes = self._codes(seed, 0, 15)
        scale = self._scale(seed, self.columns // ggml_product.BLOCK, torch.float16)
        packed = ggml_product.blocks(codes.view(torch.uint8).numpy(), scale.numpy())
        weight = ggml_product.Weight(self.drawn["ggml"], packed)
        self.about = {"buffer": weight.buffer}

        def call(x: Any) -> Any:
            weight.multiply(x.numpy())
            return None

        def plain() -> Any:
            return (codes.float() - 8) * scale.float().repeat_interleave(ggml_product.BLOCK, 1)

        self.result = lambda tokens: torch.from_numpy(weight.result(tokens))
        return call, plain


def work(own: Contender, cold: float) -> None:
    """Be one contender: check a product, then time calls as told on stdin, one JSON line each."""
    import torch

    wanted = cold * 1e9 * FEWER.get(own.name, 1)
    copies = max(2, round(wanted / (own.rows * own.columns * BITS[own.name] / 8)))
    calls: list[Call] = []
    error = 0.0
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    with torch.inference_mode():
        for seed in range(copies):
            call, plain = own.make(seed)
            if not calls:
                x = own.inputs(5)
                expected = x.double() @ plain().double().T
                got = call(x)
                got = own.result(5) if got is None else got
                error = float((got.double() - expected).norm() / expected.norm())
                if not error < own.tolerance:
                    raise SystemExit(f"relative error {error}: not worth timing")
            del plain
            calls.append(call)
            if trim is not None:
                trim(0)  # glibc would keep what each drew: five times the weights
        own.drawn = {key: drawn for key, drawn in own.drawn.items() if key == "ggml"}
        print(json.dumps({"copies": copies, "error": error} | own.about), flush=True)
        one, at = own.inputs(1), 0
        for line in sys.stdin:
            order = json.loads(line)
            x = own.inputs(order["tokens"])
            for call in calls:  # pages that lay idle come back, untimed
                call(one)
            at = 0 if order["hot"] else (at + 1) % copies
            calls[at](x)  # what each number of tokens sets up once
            times: list[float] = []
            while len(times) < 2 or (sum(times) < BURST and len(times) < order["calls"]):
                at = 0 if order["hot"] else (at + 1) % copies
                start = time.perf_counter()
                calls[at](x)
                times.append(time.perf_counter() - start)
            print(json.dumps(times), flush=True)


def ceiling() -> Callable[[int, bool], tuple[float, str]]:
    """Return what measures a read of memory from threads and huge pages or not: GB/s, and how."""
    folder = tempfile.mkdtemp()
    library = f"{folder}/read.so"
    source = str(HERE / "read_ceiling.c")
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    subprocess.run(["cc", *flags, source, "-o", library], check=True)
    read = ctypes.CDLL(library).read_seconds
    read.restype = ctypes.c_double
    read.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int)]
    size, way = 3 << 28, (ctypes.c_int * 2)()

    def measure(threads: int, huge: bool) -> tuple[float, str]:
        seconds = read(size, threads, int(huge), way)
        if seconds <= 0:
            raise SystemExit(f"{threads} threads did not read {size} bytes: no memory?")
        return size / seconds / 1e9, f"streams {way[0]}, ahead {way[1]} bytes"

    return measure


class Worker:
    """The process of one contender."""

    def __init__(
        self, name: str, rows: int, columns: int, threads: int, options: argparse.Namespace
    ) -> None:
        words = [sys.executable, __file__, "--worker", name, str(rows), str(columns)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if options.pages == "huge":
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        self.name = name
        self.process = subprocess.Popen(
            [*words, str(threads), str(options.cold), str(options.ggml or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def answer(self, order: dict[str, Any] | None = None) -> Any:
        """Give an order and return what it says; None where it ended before it was ready."""
        if order is not None and self.process.stdin is not None:
            try:
                self.process.stdin.write(json.dumps(order) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                raise SystemExit(f"{self.name} ended: {self.end()}") from None
        line = self.process.stdout.readline() if self.process.stdout else ""
        return json.loads(line) if line else None

    def end(self) -> str:
        """End the process; return the last line that it wrote on stderr."""
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
        said = self.process.stderr.read() if self.process.stderr else ""
        self.process.wait()
        return said.strip().splitlines()[-1] if said.strip() else ""


def duel(shape: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape with one number of threads."""
    from unicomp import machine

    rows, columns = map(int, shape.split("x"))
    read = ceiling()
    found: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    started = [Worker(name, rows, columns, threads, options) for name in options.contenders]
    workers = []
    for worker in started:
        ready = worker.answer()
        if ready is None:
            skipped[worker.name] = worker.end()
            print(f"  {worker.name}: {skipped[worker.name]}", file=sys.stderr)
            continue
        found[worker.name] = ready | {"ms": {}}
        workers.append(worker)
    times: dict[tuple[str, int, bool], list[float]] = {}
    ceilings: dict[str, list[tuple[float, str]]] = {"huge pages": [], "plain pages": []}
    for _ in range(options.rounds):
        for tokens in options.tokens:
            if tokens in (1, options.tokens[-1]):
                ceilings["huge pages"].append(read(threads, True))
                ceilings["plain pages"].append(read(threads, False))
            for hot in (False, True) if tokens <= HOT_TOKENS else (False,):
                for worker in workers:
                    if tokens > MOST_TOKENS.get(worker.name, tokens):
                        continue
                    order = {"tokens": tokens, "calls": 60, "hot": hot}
                    got = worker.answer(order)
                    times.setdefault((worker.name, tokens, hot), []).append(statistics.median(got))
    for worker in workers:
        worker.end()
    for (name, tokens, hot), medians in times.items():
        found[name]["ms"][f"M={tokens} {'hot' if hot else 'cold'}"] = {
            "median": 1e3 * statistics.median(medians),
            "min": 1e3 * min(medians),
            "max": 1e3 * max(medians),
            "rounds": [1e3 * median for median in medians],
        }
    for name, one in found.items():
        one["bits_per_weight"] = BITS[name]
        cold = one["ms"].get("M=1 cold")
        if cold is not None:
            one["gb_per_s"] = rows * columns * BITS[name] / 8 / cold["median"] / 1e6
            one["of_ceiling"] = one["gb_per_s"] / statistics.median(
                speed for speed, _ in ceilings["huge pages"]
            )
    return {
        "shape": shape,
        "threads": threads,
        "pages": options.pages,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "cold_gb": options.cold,
        "read_gb_per_s": {
            pages: statistics.median(speed for speed, _ in own) for pages, own in ceilings.items()
        },
        "read_by": {
            pages: statistics.mode(how for _, how in own) for pages, own in ceilings.items()
        },
        "contenders": found,
        "skipped": skipped,
    }


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Return how many times our time others take, and ours among each other; where measured."""

    def over(top: str, ours: str, case: str) -> float | None:
        try:
            pair = [result["contenders"][name]["ms"][f"{case} cold"] for name in (top, ours)]
        except KeyError:
            return None
        return round(pair[0]["median"] / pair[1]["median"], 3)

    asked = [
        *((peer, "ours int4", "M=1") for peer in BITS if not peer.startswith("ours")),
        ("ours int4", "ours ternary 2.0", "M=1"),
        ("ours ternary 2.0", "ours ternary 1.6", "M=1"),
        *((peer, "ours int4 avx2", "M=1") for peer in ("torch bfloat16", "torch float32")),
        ("openvino", "ours int4", "M=4"),
        *(
            (peer, "ours int4", f"M={tokens}")
            for tokens in TOKENS
            if tokens >= 16
            for peer in ("torch dynamic int8", "torch bfloat16")
        ),
    ]
    found = {f"{case}: {top} / {ours}": over(top, ours, case) for top, ours, case in asked}
    return {what: ratio for what, ratio in found.items() if ratio is not None}


def goals(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return what each goal for one token asks for: GB/s of ours, and as a share of the ceiling.

    Above a share of 1 the goal is beyond the memory: no kernel that reads these bytes can reach it.
    """
    found = {}
    for (top, ours), wanted in WANTED.items():
        ratio = ratios(result).get(f"M=1: {top} / {ours}")
        if ratio is not None:
            needed = result["contenders"][ours]["gb_per_s"] * wanted / ratio
            share = needed / result["read_gb_per_s"]["huge pages"]
            found[f"{top} / {ours}"] = {
                "wanted": wanted,
                "ratio": ratio,
                "needs_gb_per_s": round(needed, 1),
                "needs_of_ceiling": round(share, 2),
            }
    return found


def key(result: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a piece is of: a later one of the same takes its place."""
    processor = (result["machine"]["cpu"], *result["machine"]["isa"])
    return (processor, result["shape"], result["threads"], result["pages"])


def main() -> None:
    """Measure and store everything asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=["4096x4096", "14336x4096", "4096x14336"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--contenders", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pages", choices=("huge", "plain"), default="huge", help="of the others")
    parser.add_argument("--ggml", type=Path, help="folder of llama.cpp's shared libraries")
    parser.add_argument("--cold", type=float, default=1.1, help="GB of distinct weights")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cpu_kernels.json")
    options = parser.parse_args()
    stored = json.loads(options.out.read_text())["results"] if options.out.is_file() else []
    results = {key(one): one for one in stored}
    for shape in options.shapes:
        for threads in options.threads:
            result = duel(shape, threads, options)
            results[key(result)] = result
            for name, one in result["contenders"].items():
                row = "  ".join(f"{case} {ms['median']:.3f}" for case, ms in one["ms"].items())
                share = f"{one['of_ceiling']:.0%}" if "of_ceiling" in one else ""
                print(f"{shape} {threads} {name}: {share} {row}", file=sys.stderr)
            store(options.out, list(results.values()))
    store(options.out, list(results.values()))


def store(out: Path, results: list[dict[str, Any]]) -> None:
    """Write all results, with what follows from them."""
    result = {
        "schema": "unicomp.benchmark/1",
        "benchmark": "cpu_kernels",
        "group_size": GROUP,
        "results": [one | {"ratios": ratios(one), "goals": goals(one)} for one in results],
    }
    out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        rows, columns, threads = map(int, sys.argv[3:6])
        libraries = Path(sys.argv[7]) if sys.argv[7] else None
        work(Contender(sys.argv[2], rows, columns, threads, libraries), float(sys.argv[6]))
    else:
        main()

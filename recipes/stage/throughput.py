"""How fast this machine does what a run is made of: measured, stored, and what a plan rests on.

`unicomp env --measure` measures and stores the rates for this user; a plan takes the entry of its
own processor, cores, release of torch and wish for threads. Where there is none it measures a
float32 product and guesses the rest from what they came to beside one elsewhere. That product is
numpy's: importing torch for its own would take longer than most plans. Rates are those of the
operations that a run calls, at sizes of a layer, not peaks of the processor.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from unicomp import machine
from unicomp.compress.sparsity import Sparsity, Zeros, keep
from unicomp.kernels import gram
from unicomp.kernels.packed import Scheme
from unicomp.later import torch

NAME = "throughput.json"
SCHEMA = "unicomp.throughput/2"
ASKED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # torch heeds them
SIDE = 512  # rows and columns of the product that is timed
# Seconds that Python and the libraries take to import where nobody has measured them here.
START = 5.0
# Of an operation a second of a float32 product, what the other rates came to on an AMD EPYC with
# AVX-512 BF16, two threads, by `unicomp env --measure` (grid and rounding: on one with AVX2, one
# thread); for a plan on a machine that measured none.
BESIDE = {
    "thin": 0.82,
    "half": 2.4,
    "moments": 2.3,
    "factor": 0.28,
    "memory": 0.80,
    "sort": 2.1e-4,
    "line": 6.3e-5,
    "grid": 4.0e-4,
    "rounding": 2.2e-4,
    "states": 0.018,
    "hashing": 0.0105,
}
# The same where the processor has no instruction for bfloat16: torch's own products in it are
# slow, and second moments are made in float32.
BESIDE_PLAIN = BESIDE | {"half": 0.13, "moments": 1.0}
# What a run imports before its first layer.
LIBRARIES = "import unicomp.recipes.pipeline.run, unicomp.compress.calibrate, accelerate; "
MODELS = "from transformers import AutoModelForCausalLM, AutoTokenizer"


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured.

    threads      that torch made products with; None: nobody asked it
    product      operations a second of a float32 product
    thin         of one that makes 128 rows, as solvers do that walk over columns
    half         of a bfloat16 product of torch
    moments      of second moments, in the dtype that they are made in
    factor       of a Cholesky factor and what is solved with it, float32
    memory       bytes a second that elementwise work in float32 reads and writes, as a norm does
    sort         weights a second of which the lesser half of each row is found
    line         of which the lesser half of all is found, which one thread does
    grid         weights a second for which scales of least squared error are found
    rounding     of which each is rounded for the errors of those before it in its block
    states       bytes a second that are written to a file, summed up and read again
    hashing      bytes a second of SHA-256, one thread
    disk         bytes a second that are brought to disk; None: not measured
    start        seconds until the libraries are imported
    stored       measured by `unicomp env --measure`, not just now
    """

    product: float
    thin: float
    half: float
    moments: float
    factor: float
    memory: float
    sort: float
    line: float
    grid: float
    rounding: float
    states: float
    hashing: float
    disk: float | None = None
    start: float = START
    threads: int | None = None
    stored: bool = False

    def words(self) -> str:
        """Return what a forecast of time says of its basis."""
        product = f"{self.product / 1e9:.0f} GFLOP/s in float32"
        if not self.stored:
            later = "the rest guessed from it: `unicomp env --measure` measures all"
            return f"{product}, measured just now, {later}"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        others = f"{self.half / 1e9:.0f} in bfloat16, memory {self.memory / 1e9:.1f} GB/s"
        return f"{product}, {others}, {threads}, measured by `unicomp env --measure`"

    def seconds(self, work: Mapping[str, float]) -> float:
        """Return the time of work: rate -> operations, bytes or numbers."""
        return sum(amount / float(getattr(self, kind)) for kind, amount in work.items())


def rates() -> Rates:
    """Return what is stored for this machine and its settings, else what a product tells.

    That is the fastest of ten calls or more: in some processes most calls took ten times as long
    as in others of the same minute. Why is not known; threads that share a core would.
    """
    return _stored() or _guessed(_product(min(_times(_quick(), 0.05, least=10))))


def store(found: Rates) -> Path:
    """Store rates for later plans; return the file. Raises OSError where it cannot be written."""
    path = _file()
    entries = _entries(path)
    values = asdict(found)
    del values["stored"]
    entries[_key()] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA, "measured": entries}, indent=1) + "\n"
    descriptor, fresh = tempfile.mkstemp(dir=path.parent)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    Path(fresh).replace(path)
    return path


def measure(seconds: float = 0.5) -> Rates:
    """Measure all rates, and the libraries' imports in a process of their own: some seconds.

    Each rate is the usual one of calls within so many seconds, and of three at least.
    """
    square = torch.ones(SIDE, SIDE)
    product = _product(_usual(lambda: square @ square, seconds))
    block, left, right = torch.ones(128, 1024), torch.ones(1024, 128), torch.ones(1024, 1024)
    thin = 2.0 * 128 * 1024**2 / _usual(lambda: torch.addmm(block, left.T, right), seconds)
    wide, weight = torch.ones(1024, 1024).bfloat16(), torch.ones(1024, 1024).bfloat16()
    half = 2.0 * 1024**3 / _usual(lambda: torch.nn.functional.linear(wide, weight), seconds)
    moments = product
    if machine.multiplies_bfloat16() and gram.usable(wide):
        total = torch.zeros(1024, 1024)
        moments = 1024.0**3 / _usual(lambda: gram.add(total, wide, wide), seconds)
    factor = _factor(seconds)
    states, gain = torch.ones(1024, 1024), torch.ones(1024)

    def norm() -> torch.Tensor:
        return gain * (states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True)))

    memory = 7 * 4 * states.numel() / _usual(norm, seconds)
    scores = torch.rand(128, 1024)
    sort = scores.numel() / _usual(lambda: keep(scores, Sparsity(0.5)), seconds)
    fewer = Zeros(scores.numel() // 2)
    line = scores.numel() / _usual(lambda: keep(scores, fewer), seconds)
    grid, rounding = _rounding(seconds)
    piece = memoryview(bytearray(1 << 22))
    hashing = len(piece) / _usual(lambda: hashlib.sha256(piece), seconds)
    with tempfile.TemporaryFile(buffering=0) as file:

        def through() -> None:
            file.seek(0)
            file.write(piece)
            zlib.crc32(piece)
            file.seek(0)
            file.readinto(piece)

        kept = len(piece) / _usual(through, seconds)
    return Rates(
        threads=torch.get_num_threads(),
        product=product,
        thin=thin,
        half=half,
        moments=moments,
        factor=factor,
        memory=memory,
        sort=sort,
        line=line,
        grid=grid,
        rounding=rounding,
        states=kept,
        hashing=hashing,
        disk=_disk(),
        start=_start(),
    )


def _quick() -> Callable[[], Any]:
    """Return a float32 product of numpy to be timed."""
    # Here, not above: with stored rates nobody needs it.
    import numpy as np

    square = np.ones((SIDE, SIDE), np.float32)
    return lambda: square @ square


def _product(seconds: float) -> float:
    """Return operations a second of that product, which took so long."""
    return 2.0 * SIDE**3 / seconds


def _guessed(product: float) -> Rates:
    """Return rates of which only one was measured."""
    beside = BESIDE if machine.multiplies_bfloat16() else BESIDE_PLAIN

    def of(name: str) -> float:
        return product * beside[name]

    return Rates(
        product=product,
        thin=of("thin"),
        half=of("half"),
        moments=of("moments"),
        factor=of("factor"),
        memory=of("memory"),
        sort=of("sort"),
        line=of("line"),
        grid=of("grid"),
        rounding=of("rounding"),
        states=of("states"),
        hashing=of("hashing"),
    )


def _factor(seconds: float) -> float:
    """Return operations a second of a factor and two triangular solves, 3 columns cubed of them."""
    size = 512
    square = torch.eye(size) * size + 1.0

    def solve() -> None:
        lower = torch.linalg.cholesky(square)
        torch.linalg.solve_triangular(lower, square, upper=False)

    return (1 / 3 + 1) * size**3 / _usual(solve, seconds)


def _rounding(seconds: float) -> tuple[float, float]:
    """Return weights a second whose scales are found, and that are rounded one after the other."""
    # Here, not above: plans import this file, and are to be quick and small.
    from unicomp.compress import grid
    from unicomp.compress.babai import Rounding, walk

    scheme = Scheme(bits=4, group_size=128, symmetric=True)
    weight = torch.rand(1024, 1024) - 0.5
    cost, dtype = torch.ones(1024), torch.bfloat16

    def search() -> grid.Grid:
        return grid.search(weight, scheme, "mse", dtype=dtype, importance=cost)

    choice = Rounding(search(), scheme, torch.arange(1024))
    goal, block = weight.T[:128].contiguous(), weight.T[:128].contiguous()
    unit = torch.rand(128, 128) / 128
    found = weight.numel() / _usual(search, seconds)
    return found, block.numel() / _usual(lambda: walk(goal, block, unit, choice, 0), seconds)


def _disk() -> float:
    """Return bytes a second that reach the disk of the temporary folder: 64 MiB, once."""
    data = os.urandom(1 << 20) * 64
    with tempfile.TemporaryFile(buffering=0) as file:
        began = time.perf_counter()
        file.write(data)
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - began)


def _start() -> float:
    """Return the seconds of a process that imports what a run imports, the second time."""
    least = float("inf")
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", LIBRARIES + MODELS], check=True)
        least = min(least, time.perf_counter() - began)
    return least


def _usual(work: Callable[[], Any], seconds: float) -> float:
    """Return the median seconds of at least three calls within about so many seconds."""
    return statistics.median(_times(work, seconds, least=3))


def _times(work: Callable[[], Any], seconds: float, least: int) -> list[float]:
    """Return the seconds of calls, within about so many seconds, after one that does not count."""
    work()
    taken: list[float] = []
    while len(taken) < least or sum(taken) < seconds:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken


def _file() -> Path:
    """Return where rates are stored: the user's folder for what can be made again."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(cache) / "unicomp" / NAME


def _key() -> str:
    """Return what rates are good for: processor, cores, torch and what its threads go by."""
    about = machine.describe()
    asked = [f"{name}={os.environ[name]}" for name in ASKED if name in os.environ]
    release = metadata.version("torch")
    return ", ".join([about["cpu"], f"{about['cores']} cores", f"torch {release}", *asked])


def _entries(path: Path) -> dict[str, Any]:
    """Return what is stored; nothing where the file is absent, unreadable or of another kind."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return {}
    measured = value.get("measured")
    return measured if isinstance(measured, dict) else {}


def _stored() -> Rates | None:
    """Return the stored rates of this machine; None without, or where they make no sense."""
    entry = _entries(_file()).get(_key())
    if not isinstance(entry, dict):
        return None
    known = {one.name for one in fields(Rates)} - {"stored"}
    if set(entry) != known or not all(_sound(value) for value in entry.values()):
        return None
    return Rates(**entry, stored=True)


def _sound(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e18

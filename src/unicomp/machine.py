"""What this machine is and which releases ran on it: the part of every record that may differ."""

import ctypes
import os
import platform
import re
import resource
import sys
from collections.abc import Callable
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
KEPT = 1 << 30  # bytes
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def describe() -> dict[str, Any]:
    """Return processor, instruction sets, cores, memory in bytes and system; no names or paths."""
    model, flags = _processor()
    return {
        "system": platform.system(),
        "arch": platform.machine(),
        "cpu": model,
        "isa": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
    }


@cache
def multiplies_bfloat16() -> bool:
    """Tell whether the processor has instructions for bfloat16 products."""
    _, flags = _processor()
    return bool(flags & {"avx512_bf16", "amx_bf16"})


def versions() -> dict[str, str]:
    """Return the releases of unicomp, Python and the libraries that computed."""
    found = {"unicomp": metadata.version("unicomp"), "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in PACKAGES}


def peak_rss_bytes() -> int:
    """Return the greatest resident size that this program has had.

    Linux counts what the process was before it became this program into `ru_maxrss`, so that a
    large parent would show; its own page of figures does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text())
        if found is not None:
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def resident_bytes() -> int:
    """Return the process's resident size; 0 where the system does not tell: other than Linux."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * resource.getpagesize() if status.is_file() else 0


def keep_freed_memory() -> None:
    """Tell the C library to use freed memory again rather than give it back to the system.

    Activations of tens of megabytes come and go with every product. By default each of them is
    mapped anew, and the system clears its pages: a tenth of the time of a run over a model. Call it
    before there is much; other C libraries than glibc know nothing of it.
    """
    option = _of_libc("mallopt")
    if option is not None:
        for which in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            option(which, KEPT)


def return_freed_memory() -> None:
    """Return freed memory to the system where the C library would keep it: glibc does.

    Loading a model of 1.1 billion parameters in 4 bits peaked at 1.49 GB instead of 1.29.
    """
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def _of_libc(name: str) -> Callable[..., int] | None:
    """Return a function of the C library; None where it has no such thing."""
    if sys.platform != "linux":
        return None
    return cast("Callable[..., int] | None", getattr(ctypes.CDLL(None), name, None))


def _processor() -> tuple[str, set[str]]:
    info = Path("/proc/cpuinfo")
    model, flags = platform.processor() or platform.machine(), set[str]()
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    return model, flags


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None

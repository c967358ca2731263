"""What is said of a machine, and what its C library is told."""

import platform
import subprocess
import sys

import pytest
import torch

from unicomp import machine

FAULTS = """
import resource, sys, numpy as np
from unicomp import machine
if len(sys.argv) > 1:
    machine.keep_freed_memory()
np.ones(6_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(6_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_freed_memory_is_used_again() -> None:
    def faults(*given: str) -> int:
        command = [sys.executable, "-c", FAULTS, *given]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("keep") * 10 < faults()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_is_resident_grows_with_what_is_held() -> None:
    before = machine.resident_bytes()
    held = torch.ones(1 << 24)
    grown = machine.resident_bytes() - before
    assert 0.9 * held.nbytes < grown < 1.5 * held.nbytes
    assert machine.resident_bytes() <= machine.peak_rss_bytes()

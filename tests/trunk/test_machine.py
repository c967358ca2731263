"""What is said of a machine, and what its C library is told."""

import platform
import subprocess
import sys

import pytest

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

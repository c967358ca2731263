"""The C kernels without Python: a driver, under valgrind, sanitizers and emulators."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "kernels" / "csrc"
DRIVER = Path(__file__).parent / "csrc_driver" / "main.c"
CC = os.environ.get("CC", "cc")
CROSS = "aarch64-linux-gnu-gcc"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CC) is None, reason="no C compiler"),
]


def build(folder: Path, *flags: str, compiler: str = CC) -> Path:
    """Compile every kernel with the driver, a warning being an error."""
    sources = [path for path in sorted(CSRC.glob("*.c")) if path.name != "module.c"]
    target = folder / "driver"
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
    command += ["-ffp-contract=off", "-pthread", f"-I{CSRC}", *flags]
    subprocess.run(
        [*command, *map(str, sources), str(DRIVER), "-lm", "-o", str(target)],
        check=True,
        timeout=300,
    )
    return target


def run(*command: str | Path) -> str:
    answer = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def test_all_instruction_sets_agree(tmp_path: Path) -> None:
    assert "equal" in run(build(tmp_path, "-O2"), "1500")


def test_sanitizers_are_clean(tmp_path: Path) -> None:
    flags = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all".split()
    assert "equal" in run(build(tmp_path, *flags), "600")


def test_sanitizers_see_a_weight_that_is_too_short(tmp_path: Path) -> None:
    flags = "-O1 -g -fsanitize=address -DSHORT=64".split()
    answer = subprocess.run(
        [str(build(tmp_path, *flags)), "8"], capture_output=True, text=True, timeout=300
    )
    assert answer.returncode != 0
    assert "heap-buffer-overflow" in answer.stderr


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind")
def test_valgrind_is_clean(tmp_path: Path) -> None:
    # It knows neither AVX-512 nor AMX.
    driver = build(tmp_path, "-O1", "-g")
    known = [name for name in ("scalar", "avx2") if runs(driver, name)]
    check = "valgrind -q --leak-check=full --error-exitcode=9".split()
    assert "equal" in run(*check, driver, "80", *known)


@pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which("qemu-aarch64-static") is None,
    reason="no cross-compiler or no emulator",
)
def test_another_processor_agrees(tmp_path: Path) -> None:
    driver = build(tmp_path, "-O2", "-static", compiler=CROSS)
    assert "equal" in run("qemu-aarch64-static", driver, "200")


def runs(driver: Path, isa: str) -> bool:
    return subprocess.run([str(driver), "0", isa], capture_output=True).returncode == 0

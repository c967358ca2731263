"""The C kernels without Python: a driver, under valgrind, sanitizers and emulators.

Few machines have AMX, so its tiles run on a model of its instructions besides.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "kernels" / "csrc"
DRIVER = Path(__file__).parent / "csrc_driver" / "main.c"
CC = os.environ.get("CC", "cc")
CROSS = "aarch64-linux-gnu-gcc"
MODEL = DRIVER.parent / "amx_model.h"
AMX = (f"-I{MODEL.parent}", "-DUC_AMX_MODEL=uc_panels_scalar")  # with the panels of `scalar`
MISTAKES = {1: "signs", 2: "operands", 3: "16 bits", 4: "sums"}

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
    assert "equal" in run(build(tmp_path, *flags, *AMX), "600")


def test_sanitizers_see_a_weight_that_is_too_short(tmp_path: Path) -> None:
    flags = "-O1 -g -fsanitize=address -DSHORT=64".split()
    answer = subprocess.run(
        [str(build(tmp_path, *flags)), "8"], capture_output=True, text=True, timeout=300
    )
    assert answer.returncode != 0
    assert "heap-buffer-overflow" in answer.stderr


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="no valgrind")
def test_valgrind_is_clean(tmp_path: Path) -> None:
    # It knows neither AVX-512 nor AMX, but the model.
    driver = build(tmp_path, "-O1", "-g", *AMX)
    known = [name for name in ("scalar", "avx2", "amx") if runs(driver, name)]
    check = "valgrind -q --leak-check=full --error-exitcode=9".split()
    assert "equal" in run(*check, driver, "80", *known)


@pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which("qemu-aarch64-static") is None,
    reason="no cross-compiler or no emulator",
)
def test_another_processor_agrees(tmp_path: Path) -> None:
    driver = build(tmp_path, "-O2", "-static", compiler=CROSS)
    assert "equal" in run("qemu-aarch64-static", driver, "200")


@pytest.fixture(scope="module")
def modelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the driver with the model, for several slabs and chunks."""
    sizes = ("-DMOST_TOKENS=300", "-DMOST_COLUMNS=1500")
    return build(tmp_path_factory.mktemp("amx"), "-O2", *AMX, *sizes)


def test_amx_agrees_on_a_model(modelled: Path) -> None:
    assert "equal" in run(modelled, "600", "amx")


@pytest.mark.parametrize("mistake", MISTAKES, ids=MISTAKES.get)
def test_a_model_that_is_wrong_does_not_agree(modelled: Path, mistake: int) -> None:
    answer = subprocess.run(
        [modelled, "600", "amx"],
        env=os.environ | {"UC_AMX_WRONG": str(mistake)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 1
    assert "amx differs" in answer.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the model alone, to be called from Python."""
    target = tmp_path_factory.mktemp("model") / "model.so"
    flags = "-std=c11 -O1 -shared -fPIC -DUC_AMX_PART= -x c".split()
    subprocess.run([CC, *flags, str(MODEL), "-o", str(target)], check=True, timeout=300)
    return target


def shape_of(*tiles: tuple[int, int], palette: int = 1) -> bytes:
    """Return what LDTILECFG reads, of tiles of so many rows and bytes a row."""
    shape = np.zeros(64, np.uint8)
    shape[0] = palette
    for index, (rows, columns) in enumerate(tiles):
        shape[16 + 2 * index] = columns
        shape[48 + index] = rows
    return shape.tobytes()


@pytest.mark.parametrize("seed", range(20))
def test_the_model_multiplies_as_numpy_does(model: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows, depth, lanes = (int(size) for size in draw.integers(1, 17, 3))
    left = draw.integers(-128, 128, (rows, depth, 4), np.int8)
    right = draw.integers(-128, 128, (depth, lanes, 4), np.int8)
    sums = draw.integers(-(2**31), 2**31, (rows, lanes), np.int32)
    products = np.einsum("mki,kni->mn", left.astype(np.int64), right.astype(np.int64))
    amx, wide = ctypes.CDLL(str(model)), ctypes.c_int64
    amx.uc_amx_configure(shape_of((rows, 4 * lanes), (rows, 4 * depth), (depth, 4 * lanes)))
    for tile, of in enumerate((sums, left, right)):
        amx.uc_amx_load(tile, of.ctypes.data_as(ctypes.c_void_p), wide(of.nbytes // len(of)))
    amx.uc_amx_multiply(0, 1, 2)
    found = np.zeros_like(sums)
    amx.uc_amx_store(0, found.ctypes.data_as(ctypes.c_void_p), wide(4 * lanes))
    amx.uc_amx_release()
    assert (found == (sums + products).astype(np.int32)).all()
    assert (found != sums).any()


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ("amx.uc_amx_zero(0)", "no tiles are configured"),
        ("amx.uc_amx_configure({palette})", "no such palette"),
        ("amx.uc_amx_configure({rows})", "too many rows"),
        ("amx.uc_amx_configure({columns})", "too many columns"),
        ("amx.uc_amx_configure({empty})", "rows without columns"),
        ("amx.uc_amx_configure({fine}); amx.uc_amx_configure({fine})", "left configured"),
        ("amx.uc_amx_configure({fine}); amx.uc_amx_zero(3)", "not configured"),
        ("amx.uc_amx_configure({fine}); amx.uc_amx_multiply(0, 1, 1)", "named twice"),
        ("amx.uc_amx_configure({fine}); amx.uc_amx_multiply(0, 2, 1)", "other rows"),
    ],
)
def test_the_model_faults_where_a_processor_would(model: Path, steps: str, said: str) -> None:
    shapes = {
        "palette": shape_of(palette=2),
        "rows": shape_of((17, 64)),
        "columns": shape_of((16, 68)),
        "empty": shape_of((16, 0)),
        "fine": shape_of((4, 64), (4, 32), (8, 64)),
    }
    code = f"import ctypes; amx = ctypes.CDLL({str(model)!r}); {steps.format(**shapes)}"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode < 0
    assert said in answer.stderr


def runs(driver: Path, isa: str) -> bool:
    return subprocess.run([str(driver), "0", isa], capture_output=True).returncode == 0

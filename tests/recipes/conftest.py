"""What tests of runs share: equal folders, interruptions; and another author's package."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unicomp import manifest
from unicomp.recipes.stage.progress import Progress, Show

TIMINGS = {"seconds", "peak_rss_bytes", "peak_gpu_bytes"}


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """Return the function that hashes every file of a folder but the manifest."""

    def find(folder: Path) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.iterdir())
            if path.name != manifest.NAME
        }

    return find


@pytest.fixture(scope="session")
def timeless() -> Callable[[Path], dict[str, Any]]:
    """Return the function that reads a manifest without times, peaks, versions and machine."""

    def read(folder: Path) -> dict[str, Any]:
        found = manifest.read(folder).to_json()
        stages = [{k: v for k, v in one.items() if k not in TIMINGS} for one in found["stages"]]
        others = {k: v for k, v in found.items() if k not in ("versions", "machine", "cost")}
        return others | {"stages": stages}

    return read


@pytest.fixture(scope="session")
def stopped() -> Callable[[Callable[[Path, Show], object], Path], int]:
    """Return the function that interrupts a run, later each time, until it comes to its end.

    It takes the run, which is given a folder and whom to show its steps, and that folder; it
    returns how often the run was interrupted.
    """

    def repeat(once: Callable[[Path, Show], object], out: Path) -> int:
        stops = 0
        while not out.exists():
            left = iter(range(1 + 3 * stops))

            def show(_: Progress, left: Any = left) -> None:
                if next(left, None) is None:
                    raise KeyboardInterrupt

            try:
                once(out, show)
            except KeyboardInterrupt:
                stops += 1
                assert not out.exists()
        assert not out.with_name(f"{out.name}.partial").exists()
        return stops

    return repeat


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that installs a distribution `name` with a module and entry points."""

    def put(name: str, source: str, entries: dict[str, str]) -> Path:
        folder = tmp_path / "site" / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{key} = {value}" for key, value in entries.items()]
        (info / "entry_points.txt").write_text("[unicomp.methods]\n" + "\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)
        return folder

    return put

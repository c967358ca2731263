"""What is built is what is in the tree: the sdist is whole, and its wheel runs by itself."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "compress", "evaluate", "kernels", "recipes")

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Run python with these arguments and return its stdout; show its stderr if it fails."""
    answer = subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 0, answer.stderr + answer.stdout
    return answer.stdout


def copy_of_the_tree(target: Path) -> Path:
    """Copy what a clone would hold, links as links: building in place would leave traces."""
    keep = {*FOLDERS, "src"}
    for path in ROOT.iterdir():
        if path.is_dir() and path.name in keep:
            shutil.copytree(
                path,
                target / path.name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"),
            )
        elif path.is_file():
            shutil.copy(path, target / path.name)
    return target


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, unpacked."""
    source = tmp_path_factory.mktemp("source")
    run("setup.py", "-q", "sdist", "--dist-dir", "../sdist", cwd=copy_of_the_tree(source))
    (archive,) = (source.parent / "sdist").glob("unicomp-*.tar.gz")
    target = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as file:
        file.extractall(target, filter="data")
    (folder,) = target.iterdir()
    return folder


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the source archive, unpacked."""
    target = tmp_path_factory.mktemp("wheel")
    build = "pip wheel -q --no-deps --no-index --no-build-isolation -w".split()
    run("-m", *build, str(target), ".", cwd=sdist)
    (archive,) = target.glob("unicomp-*.whl")
    with zipfile.ZipFile(archive) as file:
        file.extractall(target / "site")
    return target / "site"


def package_files() -> set[str]:
    """Return every file of the package in the tree, as the wheel names it."""
    found = {}
    for folder in ("src/unicomp", *FOLDERS):
        base = ROOT / "src" if folder.startswith("src") else ROOT
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and "csrc" not in path.parts:
                name = path.relative_to(base).as_posix()
                found[name if base.name == "src" else f"unicomp/{name}"] = path
    return set(found)


def test_sdist_carries_real_files_and_what_a_build_needs(sdist: Path) -> None:
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md"):
        assert (sdist / name).is_file(), name
    assert not any(path.is_symlink() for path in sdist.rglob("*"))


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    inside = {p.relative_to(wheel).as_posix() for p in wheel.rglob("*") if p.is_file()}
    assert package_files() <= inside
    assert {name.split("/")[0] for name in inside} == {"unicomp", "unicomp-0.1.0.dist-info"}
    assert "unicomp/py.typed" in inside
    assert "unicomp/recipes/quickstart.yaml" in inside
    assert "unicomp/builtin/models/tinyworld/model.safetensors" in inside
    assert {name.split("/")[1] for name in inside} >= set(FOLDERS)
    assert not [name for name in inside if "csrc" in name or "__pycache__" in name]


def test_wheel_runs_without_the_tree(wheel: Path, tmp_path: Path) -> None:
    code = (
        "import unicomp, unicomp.builtin as builtin; from unicomp.recipes.load import shipped\n"
        "print(unicomp.__file__, builtin.model('tinyworld'), *shipped(), sep='\\n')"
    )
    file, model, *recipes = run("-c", code, cwd=tmp_path, PYTHONPATH=str(wheel)).split()
    assert Path(file).is_relative_to(wheel)
    assert Path(model).is_relative_to(wheel)
    assert (Path(model) / "config.json").is_file()
    assert {"quickstart", "w4-gptq", "w3-gptq", "w8-rtn", "w4-rtn", "w2-ternary"} <= set(recipes)
    assert "quantize" in run("-m", "unicomp", "--help", cwd=tmp_path, PYTHONPATH=str(wheel))


def test_tree_without_links_is_refused(tmp_path: Path) -> None:
    tree = copy_of_the_tree(tmp_path)
    (tree / "src/unicomp/kernels").unlink()
    answer = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=tree, capture_output=True, text=True
    )
    assert answer.returncode == 1
    assert "error: src/unicomp/kernels is not a link" in answer.stderr
    assert "hint: clone with" in answer.stderr

"""The folder is the registry; other packages add to it by entry points."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from unicomp.compress import methods
from unicomp.compress.method import Method, QuantizeMethod
from unicomp.errors import UnsupportedError

COMPRESS = Path(methods.__file__).parent

SOURCE = """
from unicomp.compress.method import Method, QuantizeMethod

class Magic(QuantizeMethod):
    strength: float = 0.5

NOTHING = 3
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that installs a distribution with a module of its name."""

    def put(name: str, entries: dict[str, str], source: str = SOURCE) -> None:
        folder = tmp_path / name
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"{name}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        lines = [f"{key} = {value}" for key, value in entries.items()]
        (info / "entry_points.txt").write_text("[unicomp.methods]\n" + "\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, name, raising=False)

    return put


def test_the_folder_is_the_registry() -> None:
    folders = [path for path in COMPRESS.iterdir() if path.is_dir() and path.name[0].isalpha()]
    wanted = {
        folder.name.replace("_", "-"): {
            path.stem.replace("_", "-") for path in folder.glob("*.py") if path.name[0] != "_"
        }
        for folder in folders
    }
    wanted = {verb: names for verb, names in wanted.items() if names}
    assert methods.verbs() == sorted(wanted)
    assert "quantize" in wanted
    for verb, names in wanted.items():
        assert methods.methods(verb) == sorted(names)


@pytest.mark.parametrize(
    ("verb", "method"), [(v, m) for v in methods.verbs() for m in methods.methods(v)]
)
def test_every_method_is_found_in_its_file(verb: str, method: str) -> None:
    found = methods.find(verb, method)
    assert issubclass(found, Method)
    folder, file = verb.replace("-", "_"), method.replace("-", "_")
    assert found.__module__ == f"unicomp.compress.{folder}.{file}"


def test_listing_needs_no_torch() -> None:
    code = (
        "import sys; from unicomp.compress.methods import methods, verbs; "
        "assert 'gptq' in methods('quantize') and verbs(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_file_that_appears_is_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "FOLDER", tmp_path)
    (tmp_path / "delta").mkdir()
    assert methods.verbs() == []
    (tmp_path / "delta" / "dqrelo_plus.py").write_text("")
    (tmp_path / "delta" / "_private.py").write_text("")
    assert methods.verbs() == ["delta"]
    assert methods.methods("delta") == ["dqrelo-plus"]
    with pytest.raises(UnsupportedError, match="unknown method `dqrelo_plus`") as caught:
        methods.find("delta", "dqrelo_plus")
    assert caught.value.hint == "did you mean `dqrelo-plus`?"


@pytest.mark.parametrize("verb", ["quantise", "", "..", ".", "../compress", "/", "method", "_x"])
def test_unknown_verbs(verb: str) -> None:
    assert methods.methods(verb) == []
    with pytest.raises(UnsupportedError, match="unknown stage"):
        methods.find(verb, "gptq")


def test_near_names() -> None:
    with pytest.raises(UnsupportedError) as caught:
        methods.find("quantise", "gptq")
    assert caught.value.hint == "did you mean `quantize`?"
    with pytest.raises(UnsupportedError) as caught:
        methods.find("quantize", "gtpq")
    assert caught.value.message == "unknown method `gtpq` for `quantize`"
    assert caught.value.hint == "did you mean `gptq`?"


def test_another_package_adds_methods_and_verbs(install: Callable[..., None]) -> None:
    install("magics", {"quantize.magic": "magics:Magic", "melt.magic-two": "magics:Magic"})
    assert "magic" in methods.methods("quantize")
    assert "gptq" in methods.methods("quantize")
    assert "melt" in methods.verbs()
    assert methods.methods("melt") == ["magic-two"]
    found = methods.find("quantize", "magic")
    assert issubclass(found, QuantizeMethod)
    assert "strength" in found.model_fields


def test_a_package_is_gone_when_its_folder_is() -> None:
    assert "melt" not in methods.verbs()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("magics:Absent", "cannot be loaded: AttributeError"),
        ("absent_module:Magic", "cannot be loaded: ModuleNotFoundError"),
        ("magics:NOTHING", "is no method: `magics:NOTHING` is not a subclass"),
    ],
)
def test_a_broken_package_is_named(install: Callable[..., None], entry: str, said: str) -> None:
    install("magics", {"quantize.magic": entry})
    with pytest.raises(UnsupportedError) as caught:
        methods.find("quantize", "magic")
    assert said in caught.value.message
    assert caught.value.message.startswith("`quantize: magic` of `magics` ")
    assert caught.value.hint is not None


def test_two_owners_of_one_name_are_refused(install: Callable[..., None]) -> None:
    install("magics", {"quantize.magic": "magics:Magic", "quantize.rtn": "magics:Magic"})
    install("others", {"quantize.magic": "others:Magic"})
    with pytest.raises(UnsupportedError) as caught:
        methods.find("quantize", "magic")
    assert caught.value.message == "`quantize: magic` is defined by `others`, `magics`"
    with pytest.raises(UnsupportedError) as caught:
        methods.find("quantize", "rtn")
    assert caught.value.message == "`quantize: rtn` is defined by `unicomp`, `magics`"


def test_an_entry_point_is_named_verb_dot_method(install: Callable[..., None]) -> None:
    install("magics", {"magic": "magics:Magic"})
    with pytest.raises(UnsupportedError, match="entry point `magic` of `magics`"):
        methods.verbs()


@pytest.mark.parametrize("count", [0, 2])
def test_a_file_defines_one_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    name = "unicomp.compress.fake.several"
    module = ModuleType(name)
    kinds = [type(f"M{i}", (Method,), {"__module__": name}) for i in range(count)]
    vars(module).update({kind.__name__: kind for kind in kinds}, Method=Method)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(methods, "FOLDER", tmp_path)
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "several.py").write_text("")
    with pytest.raises(TypeError, match=f"must define one public Method class, found {count}"):
        methods.find("fake", "several")

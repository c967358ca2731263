"""The rules of the house, each as a function over a tree, each shown to fail on a planted breach.

A rule returns `file:line: what is wrong` for every breach. import-linter cannot do this: its graph
skips folders without `__init__.py`. Why the folders have none: `docs/decisions/001-house.md`.
"""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("cli", "compress", "evaluate", "kernels", "recipes")
TRUNK = "src/unicomp"

# cli -> recipes -> compress | evaluate -> kernels -> trunk
MAY_IMPORT = {
    "cli": {"cli", "recipes", "compress", "evaluate", "kernels", "trunk"},
    "recipes": {"recipes", "compress", "evaluate", "kernels", "trunk"},
    "compress": {"compress", "kernels", "trunk"},
    "evaluate": {"evaluate", "kernels", "trunk"},
    "kernels": {"kernels", "trunk"},
    "trunk": {"trunk"},
}
LAZY = {"load", "load_deltas", "plan", "run", "score"}
# The two files of the trunk that look up: the lazy public names, and `python -m unicomp`.
DOORS = {f"{TRUNK}/__init__.py", f"{TRUNK}/__main__.py"}
STAND_INS = {f"{TRUNK}/later.py"}  # hands torch on, and is there for nothing else

GATES = {
    "lm_eval": r"evaluate/(door|tasks/(harness|model))\.py",
    "rich": r"cli/show\.py",
    "huggingface_hub": r"src/unicomp/hub\.py",
    "triton": r"kernels/\w+_triton\.py",
    "peft": r"compress/distill/training/adapters\.py",
    "accelerate": r"compress/(calibrate|distill/training/\w+)\.py",
}

# Imported by name, installed and versioned by another dependency.
COMES_WITH = {
    "pydantic_core": "pydantic",
    "click": "typer",
    "tokenizers": "transformers",
    "datasets": "lm-eval",
}

# Longest allowed, in lines; the first pattern that fits counts.
SIZES = {
    r"compress/(quantize|prune|distill|delta)/\w+\.py": 200,
    r"kernels/\w+_triton\.py": 400,
    r".*": 600,
}
COMMAND_LINES = 80

GLOBAL_STATE = re.compile(
    r"(torch|random|np\.random|numpy\.random|transformers)\.(manual_)?(set_)?seed\("
    r"|torch\.(set_\w+|use_deterministic_algorithms)\(|torch\.backends\.[\w.]+ = "
    r"|os\.environ(\[[^]]*\] = |\.(update|setdefault|pop|clear)\()|os\.putenv\("
    r"|sys\.path(\.(insert|append|extend)\(|(\[[^]]*\])? \+?= )|sys\.setrecursionlimit\("
    r"|logging\.(basicConfig|disable)\(|warnings\.(simple)?filter|signal\.signal\("
)
PRIVATE_PATH = re.compile(r"(?<![\w.$}/~-])/(home|Users|root|mnt|work)/\w")


def walk(root: Path, *folders: str) -> Iterator[tuple[str, Path]]:
    """Yield (path relative to the root, path) of each file once: links are not followed."""
    for folder in folders:
        for parent, names, files in os.walk(root / folder):
            names[:] = sorted(n for n in names if n != "__pycache__" and not n.endswith("egg-info"))
            for file in sorted(files):
                path = Path(parent, file)
                yield path.relative_to(root).as_posix(), path


def library(root: Path) -> Iterator[tuple[str, ast.Module, list[str]]]:
    """Yield (relative path, syntax tree, lines) of every module of the package."""
    for name, path in walk(root, *FOLDERS, TRUNK):
        if path.suffix == ".py":
            text = path.read_text(encoding="utf-8")
            yield name, ast.parse(text), text.splitlines()


def imports(tree: ast.AST) -> Iterator[tuple[int, str, str | None]]:
    """Yield (line, module, name or None) of each import, those by `import_module` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            first = node.args[0]
            if isinstance(first, ast.JoinedStr) and first.values:
                first = first.values[0]
            if called in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value).rstrip("."), None


def layer_of(path: str) -> str:
    """Return the layer that a file belongs to."""
    top = path.partition("/")[0]
    return top if top in FOLDERS else "trunk"


def target_layer(module: str, name: str | None) -> str | None:
    """Return the layer that an import reaches, or None for one outside the package."""
    parts = module.split(".")
    if parts[0] != "unicomp":
        return None
    below = parts[1] if len(parts) > 1 else name
    if len(parts) == 1 and name in LAZY:
        return "cli"  # the public names: for users, never for the package itself
    return below if below in FOLDERS else "trunk"


def directions(root: Path) -> list[str]:
    """Imports point downward, and `compress` and `evaluate` never meet."""
    return [
        f"{path}:{line}: {layer_of(path)} may not import `{module}{f'.{name}' if name else ''}`"
        for path, tree, _ in library(root)
        if path not in DOORS
        for line, module, name in imports(tree)
        if (layer := target_layer(module, name)) and layer not in MAY_IMPORT[layer_of(path)]
    ]


def absolute(root: Path) -> list[str]:
    """Imports are absolute and start at `unicomp`, never at a bare folder."""
    return [
        f"{path}:{line}: import from `unicomp.`, not from `{module}`"
        for path, tree, _ in library(root)
        for line, module, _ in imports(tree)
        if module.startswith(".") or module.partition(".")[0] in FOLDERS
    ]


def re_exports(root: Path) -> list[str]:
    """A name is imported from the module that defines it, and nothing is handed on."""
    modules = {path: tree for path, tree, _ in library(root)}
    borrowed = {
        path: {
            alias.asname or alias.name
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        for path, tree in modules.items()
    }
    breaches = []
    for path, tree in modules.items():
        if path in DOORS | STAND_INS:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                breaches += [
                    f"{path}:{node.lineno}: `{alias.name} as {alias.name}` re-exports it"
                    for alias in node.names
                    if alias.asname == alias.name
                ]
        for line, module, name in imports(tree):
            if not module.startswith("unicomp.") or name is None:
                continue
            home = module.removeprefix("unicomp.").replace(".", "/")
            stem = home if layer_of(home) in FOLDERS else f"{TRUNK}/{home}"
            if any(name in borrowed.get(stem + end, ()) for end in (".py", "/__init__.py")):
                breaches.append(
                    f"{path}:{line}: `{module}` does not define `{name}`, it imports it"
                )
    return breaches


def no_init(root: Path) -> list[str]:
    """An `__init__.py` in a top-level folder would shadow other packages of that name."""
    return [
        f"{name}:1: remove it: without it `import {name.partition('/')[0]}` stays free"
        for name, path in walk(root, *FOLDERS, "tests")
        if path.name in ("__init__.py", "__init__.pyi")
    ]


def links(root: Path) -> list[str]:
    """The five links make one package of the five folders."""
    breaches = []
    for folder in FOLDERS:
        link = root / TRUNK / folder
        if not link.is_symlink() or os.readlink(link) != f"../../{folder}" or not link.is_dir():
            breaches.append(f"{TRUNK}/{folder}:1: not a link to ../../{folder}")
    return breaches


def gates(root: Path) -> list[str]:
    """Each big outsider enters by one door."""
    return [
        f"{path}:{line}: `{outsider}` may be imported only in {GATES[outsider]}"
        for path, tree, _ in library(root)
        for line, module, _ in imports(tree)
        if (outsider := module.partition(".")[0]) in GATES
        and not re.fullmatch(GATES[outsider], path)
    ]


def global_state(root: Path) -> list[str]:
    """Importing a module seeds nothing, switches nothing and configures nothing."""

    def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Import):
                continue
            inner = [getattr(node, part, []) for part in ("body", "orelse", "finalbody")]
            if any(inner):
                for part in inner:
                    yield from at_import(part)
            else:
                yield node

    return [
        f"{path}:{node.lineno}: `{ast.unparse(node)}` sets global state at import"
        for path, tree, _ in library(root)
        for node in at_import(tree.body)
        if GLOBAL_STATE.search(ast.unparse(node)) and "__main__" not in path
    ]


def sizes(root: Path) -> list[str]:
    """Files stay short enough to read, commands short enough to hold no logic."""
    breaches = []
    for name, path in walk(root, *FOLDERS, TRUNK, "tests", "benchmarks", "examples"):
        if path.suffix not in (".py", ".c", ".h"):
            continue
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        limit = next(most for pattern, most in SIZES.items() if re.fullmatch(pattern, name))
        if lines > limit:
            breaches.append(f"{name}:{lines}: {lines} lines, at most {limit}")
        if not name.startswith("cli/"):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno:
                length = node.end_lineno - node.lineno + 1
                if length > COMMAND_LINES:
                    breaches.append(
                        f"{name}:{node.lineno}: `{node.name}` has {length} lines, "
                        f"at most {COMMAND_LINES}"
                    )
    return breaches


def names(root: Path) -> list[str]:
    """A file is named after what it does."""
    vague = {"utils", "util", "helpers", "helper", "common", "base", "misc"}
    return [
        f"{name}:1: name it after what it does"
        for name, path in walk(root, *FOLDERS, TRUNK, "tests", "benchmarks", "examples")
        if path.stem.removeprefix("test_") in vague or path.parent.name in vague
    ]


def private_paths(root: Path) -> list[str]:
    """No file names a path of the machine that it was written on."""
    skip = {"out", "build", "dist"}
    tops = [p for p in root.iterdir() if p.name not in skip]
    tops = [p for p in tops if p.is_file() or p.name[0] != "." or p.name in (".ci", ".ctags.d")]
    files = [p for p in tops if p.is_file()]
    files += [path for _, path in walk(root, *sorted(p.name for p in tops if p.is_dir()))]
    breaches = []
    for path in files:
        if path.suffix in (".safetensors", ".png", ".parquet") or path.is_symlink():
            continue
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
            if PRIVATE_PATH.search(line):
                breaches.append(f"{path.relative_to(root).as_posix()}:{number}: a private path")
    return breaches


def dependencies(root: Path) -> list[str]:
    """What is imported is declared, and what is declared is imported; extras only on use."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]

    def plain(requirement: str) -> str:
        return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")

    needed = {plain(r) for r in project["dependencies"]}
    extras = {plain(r) for more in project.get("optional-dependencies", {}).values() for r in more}
    providers = packages_distributions()
    used = set()
    breaches = []
    for path, tree, _ in library(root):
        top = {node.lineno for node in tree.body}
        for line, module, _ in imports(tree):
            outer = module.partition(".")[0]
            if outer in sys.stdlib_module_names or outer in ("", "unicomp", "_typeshed"):
                continue
            outer = COMES_WITH.get(outer, outer)
            owners = {plain(owner) for owner in providers.get(outer, [outer])}
            used |= owners
            if not owners & (needed if line in top else needed | extras):
                breaches.append(f"{path}:{line}: `{outer}` is not among the dependencies")
    breaches += [f"pyproject.toml:1: `{name}` is never imported" for name in sorted(needed - used)]
    return breaches


def torch_free(root: Path) -> list[str]:
    """Every module of the command line imports without torch, so that help is instant."""
    modules = [f"unicomp.cli.{path.stem}" for path in sorted((root / "cli").glob("*.py"))]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from importlib import import_module\n"
        "for name in sys.argv[2:]:\n"
        "    import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "    if heavy:\n"
        "        print(f'{name}: importing it imports {sorted(heavy)}'); break\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, str(root / "src"), *modules], capture_output=True, text=True
    )
    return answer.stdout.splitlines() + answer.stderr.splitlines()


def shadowing(root: Path, site: Path) -> list[str]:
    """Seen from the root, `import evaluate` is still whoever is installed under that name.

    site  an empty folder, filled with one installed package for each of our folders' names
    """
    for folder in FOLDERS:
        (site / folder).mkdir()
        (site / folder / "__init__.py").write_text("theirs = True\n")
    code = (
        f"import {', '.join(FOLDERS)}\n"
        f"for module in ({', '.join(FOLDERS)}):\n"
        "    if not hasattr(module, 'theirs'): print(f'{module.__name__}: shadowed by ours')\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    return answer.stdout.splitlines() + answer.stderr.splitlines()


RULES: list[Callable[[Path], list[str]]] = [
    directions,
    absolute,
    re_exports,
    no_init,
    links,
    gates,
    global_state,
    sizes,
    names,
    private_paths,
    dependencies,
    torch_free,
]

# rule, file, text, the breach; `cli/main.py` and the trunk's `__init__.py` are there already.
BREACHES = [
    (directions, "kernels/a.py", "\nfrom unicomp.compress.x import y\n", "kernels/a.py:2:"),
    (directions, "compress/a.py", "import unicomp.evaluate.scores\n", "compress/a.py:1:"),
    (directions, "evaluate/a.py", "from unicomp import compress\n", "evaluate/a.py:1:"),
    (directions, "src/unicomp/a.py", "def f():\n    import unicomp.kernels.b\n", "a.py:2:"),
    (directions, "recipes/a.py", "from unicomp.cli.show import x\n", "recipes/a.py:1:"),
    (directions, "recipes/a.py", "from unicomp import plan\n", "recipes/a.py:1:"),
    (directions, "kernels/a.py", "import_module(f'unicomp.recipes.{x}')\n", "kernels/a.py:1:"),
    (absolute, "cli/a.py", "from . import main\n", "cli/a.py:1:"),
    (absolute, "cli/a.py", "from compress.grid import x\n", "cli/a.py:1:"),
    (absolute, "cli/a.py", "import kernels\n", "cli/a.py:1:"),
    (re_exports, "cli/a.py", "from unicomp.errors import E as E\n", "cli/a.py:1:"),
    (re_exports, "cli/a.py", "from unicomp.cli.main import sys\n", "cli/a.py:1:"),
    (no_init, "evaluate/__init__.py", "", "evaluate/__init__.py:1:"),
    (no_init, "compress/quantize/__init__.py", "", "compress/quantize/__init__.py:1:"),
    (no_init, "tests/cli/__init__.py", "", "tests/cli/__init__.py:1:"),
    (gates, "evaluate/accuracy.py", "import lm_eval.tasks\n", "evaluate/accuracy.py:1:"),
    (gates, "cli/a.py", "def f():\n    from rich.table import Table\n", "cli/a.py:2:"),
    (gates, "recipes/a.py", "import huggingface_hub\n", "recipes/a.py:1:"),
    (gates, "kernels/a.py", "import triton\n", "kernels/a.py:1:"),
    (gates, "kernels/a.py", "from accelerate import x\n", "kernels/a.py:1:"),
    (global_state, "kernels/a.py", "import torch\ntorch.manual_seed(0)\n", "kernels/a.py:2:"),
    (global_state, "kernels/a.py", "if x:\n    os.environ['A'] = '1'\n", "kernels/a.py:2:"),
    (global_state, "kernels/a.py", "torch.backends.cudnn.tf32 = True\n", "kernels/a.py:1:"),
    (global_state, "cli/a.py", "logging.basicConfig()\n", "cli/a.py:1:"),
    (sizes, "kernels/a.py", "x = 1\n" * 601, "601 lines, at most 600"),
    (sizes, "compress/prune/a.py", "x = 1\n" * 201, "201 lines, at most 200"),
    (sizes, "cli/a.py", "def f():\n" + "    x = 1\n" * 80, "`f` has 81 lines"),
    (names, "kernels/utils.py", "", "kernels/utils.py:1:"),
    (names, "tests/kernels/test_helpers.py", "", "test_helpers.py:1:"),
    (names, "compress/common/a.py", "", "compress/common/a.py:1:"),
    (private_paths, "docs/a.md", "see\n`/" + "home/me/x`\n", "docs/a.md:2:"),
    (private_paths, ".ci/run", "cd /" + "work/x\n", ".ci/run:1:"),
    (dependencies, "kernels/a.py", "import pytest\n", "kernels/a.py:1: `pytest`"),
    (dependencies, "kernels/a.py", "import pyarrow\n", "kernels/a.py:1: `pyarrow`"),
    (dependencies, "pyproject.toml", "[project]\ndependencies = ['yarl>=1']\n", "`yarl` is never"),
    (torch_free, "cli/a.py", "import numpy\n", "unicomp.cli.a: importing it imports ['numpy']"),
    (torch_free, "cli/a.py", "import absent_module\n", "absent_module"),
]


@pytest.fixture
def plant(tmp_path: Path) -> Callable[[str, str], Path]:
    """A tree that keeps every rule, and a function that puts a file into it."""
    root = tmp_path / "tree"

    def put(name: str, text: str) -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return root

    put(f"{TRUNK}/__init__.py", '"""Nothing."""\n')
    put(f"{TRUNK}/errors.py", "class E(Exception): ...\n")
    put("cli/main.py", "import sys\n\nfrom unicomp.errors import E\n\nX = (sys.path, E)\n")
    put(
        "kernels/lazy.py", "import os\n\nX = os.environ['HOME']\n\n\ndef f():\n    import pyarrow\n"
    )
    put(
        "pyproject.toml",
        "[project]\ndependencies = []\noptional-dependencies = {parquet = ['pyarrow']}\n",
    )
    for folder in FOLDERS:
        (root / folder).mkdir(exist_ok=True)
        (root / TRUNK / folder).symlink_to(f"../../{folder}")
    return put


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule: Callable[[Path], list[str]]) -> None:
    assert rule(ROOT) == []


def test_other_packages_are_not_shadowed(tmp_path: Path) -> None:
    assert shadowing(ROOT, tmp_path) == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_accepts_a_clean_tree(
    rule: Callable[[Path], list[str]], plant: Callable[[str, str], Path]
) -> None:
    assert rule(plant("docs/a.md", "A page.\n")) == []


@pytest.mark.parametrize(("rule", "file", "text", "breach"), BREACHES)
def test_rule_finds_a_planted_breach(
    rule: Callable[[Path], list[str]],
    file: str,
    text: str,
    breach: str,
    plant: Callable[[str, str], Path],
) -> None:
    found = rule(plant(file, text))
    assert any(breach in line for line in found), found


def test_every_rule_has_a_planted_breach() -> None:
    assert {rule for rule, *_ in BREACHES} | {links} == set(RULES)


@pytest.mark.parametrize("harm", ["absent", "folder", "elsewhere"])
def test_broken_link_is_found(harm: str, plant: Callable[[str, str], Path]) -> None:
    root = plant("kernels/b.py", "")
    link = root / TRUNK / "kernels"
    link.unlink()
    if harm == "folder":
        link.mkdir()
    elif harm == "elsewhere":
        link.symlink_to(root / "kernels")
    assert links(root) == ["src/unicomp/kernels:1: not a link to ../../kernels"]


def test_shadowing_is_found(plant: Callable[[str, str], Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    assert shadowing(plant("evaluate/__init__.py", ""), site) == ["evaluate: shadowed by ours"]


def test_constraints_are_pins_and_cover_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", pin) for pin in pins)
    assert "torch==2.13.0" in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"]]
    wanted += [name for extra in project["optional-dependencies"].values() for name in extra]
    direct = {re.split(r"[^\w.-]", requirement)[0] for requirement in wanted} - {"unicomp"}
    assert direct <= {pin.partition("==")[0] for pin in pins}

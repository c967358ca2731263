"""Every command's help, every exit code, and that help and completion come without torch."""

import errno
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from unicomp import __version__
from unicomp.cli import bench, main, recipes, show
from unicomp.cli.main import exit_code
from unicomp.errors import CheckpointError, RecipeError
from unicomp.evaluate.scores import SCHEMA, Report, Subject, measured, write

COMMANDS = "run quantize prune distill plan inspect verify".split()
COMMANDS += "export score compare generate push env".split()
RECIPES = ["recipes list", "recipes show", "recipes cp", "recipes check", "recipes schema"]
BENCH = ["bench model", "bench kernels"]
SLOW = {"run", "quantize", "prune", "distill", "score", *BENCH}

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def verify_raises(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """A function that makes `unicomp verify` end with an exception."""

    def arrange(failure: BaseException) -> None:
        def resolve(model: str) -> None:
            raise failure

        monkeypatch.setattr("unicomp.hub.resolve", resolve)

    return arrange


def help_of(command: str, capsys: Capture) -> str:
    assert exit_code([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_help_names_every_command(capsys: Capture) -> None:
    out = help_of("", capsys)
    named = re.findall(r"^  (\w+)  ", out.partition("Commands:")[2], re.MULTILINE)
    assert set(named) == {*COMMANDS, "bench", "delta", "recipes"}


@pytest.mark.parametrize("command", [*COMMANDS, *RECIPES, *BENCH])
def test_help_ends_with_an_example_and_has_the_common_options(
    command: str, capsys: Capture
) -> None:
    out = help_of(command, capsys)
    assert "--json" in out
    assert "--quiet" in out
    assert out.rstrip().splitlines()[-1].startswith(f"  Example: unicomp {command}")


def examples() -> Iterator[Any]:
    """The example of every command, those that take seconds marked as slow."""
    groups = ((main.app, ""), (recipes.app, "recipes "), (bench.app, "bench "))
    for group, prefix in groups:
        for command in group.registered_commands:
            name = f"{prefix}{command.name}"
            line = (command.epilog or "").partition("Example: ")[2]
            marks = [pytest.mark.slow] if name in SLOW else []
            yield pytest.param(line, id=name, marks=marks)


@pytest.mark.parametrize("line", list(examples()))
def test_every_example_works_as_it_stands(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):  # reports to compare
        report = Report(
            schema=SCHEMA,
            model=Subject(id=name),
            baseline=None,
            machine={},
            versions={},
            seeds={},
            scores=[measured("efficiency/disk_bytes", 1, unit="bytes", higher_is_better=False)],
        )
        write(tmp_path / f"{name}.json", report)
    words = shlex.split(line.partition(" > ")[0])
    assert words[0] == "unicomp"
    if "out/quickstart" in words:
        made = ["quantize", "builtin:tinyworld", "--method", "rtn", "--out", "out/quickstart"]
        assert exit_code(made) == 0
        capsys.readouterr()
    assert exit_code(words[1:]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def test_version(capsys: Capture) -> None:
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"unicomp {__version__}\n"


def test_usage_errors_are_2(capsys: Capture) -> None:
    for arguments in ([], ["nonsense"], ["verify"], ["verify", "x", "--nonsense"]):
        assert exit_code(arguments) == 2
    for arguments in (
        ["quantize", "builtin:tinyworld"],
        ["quantize", "builtin:tinyworld", "--out", "x", "--bits", "four"],
        ["plan", "w4-rtn", "--max-memory", "8G"],
    ):
        capsys.readouterr()
        assert exit_code(arguments) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Error: " in err
    assert "write `8GB`" in err


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (
            CheckpointError("`x` is short", hint="fetch it"),
            1,
            "error: `x` is short\nhint: fetch it\n",
        ),
        (CheckpointError("`x` is short"), 1, "error: `x` is short\n"),
        (
            RecipeError([("a.yaml:1:2: one", "do"), ("a.yaml:3:4: two", None)]),
            1,
            "error: a.yaml:1:2: one\nhint: do\nerror: a.yaml:3:4: two\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "d/f"), 1, "error: `d/f`: no space left"),
        (
            PermissionError(errno.EACCES, "Permission denied", "f"),
            1,
            "error: `f`: permission denied",
        ),
        (MemoryError(), 1, "error: out of memory\nhint: "),
        (KeyError("x"), 70, "Traceback"),
        (OSError(errno.EBADF, "Bad file descriptor"), 70, "Traceback"),
        (SystemExit("strange"), 1, ""),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(3), 3, ""),
    ],
)
def test_exit_codes(
    failure: BaseException,
    code: int,
    said: str,
    verify_raises: Callable[[BaseException], None],
    capsys: Capture,
) -> None:
    verify_raises(failure)
    assert exit_code(["verify", "m", "--json"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert ("Traceback" in err) == (code == 70)


def test_main_ends_the_process_with_the_code() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "unicomp", "verify", "absent/folder/here"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ")


def test_what_was_to_be_done_at_exit_is_done() -> None:
    code = "import atexit; from unicomp.cli import main; atexit.register(print, 'bye'); "
    ended = subprocess.run(
        [sys.executable, "-c", code + "main.main()", "--version"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "bye"


def test_quiet_does_not_last(capsys: Capture) -> None:
    assert exit_code(["recipes", "list", "--quiet"]) == 0
    show.note("silent")
    assert exit_code(["--version"]) == 0
    show.note("heard")
    assert capsys.readouterr().err == "heard\n"


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


HEAVY = (
    "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub', 'rich'}\n"
    "print('HEAVY', sorted(heavy & set(sys.modules)), code)\n"
)


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["recipes", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys\nfrom unicomp.cli.main import exit_code\ncode = exit_code({arguments})\n"
    answer = in_a_process(code + HEAVY)
    assert answer.stdout.endswith("HEAVY [] 0\n"), answer.stdout + answer.stderr
    assert "Usage: unicomp" in answer.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("unicomp q", "quantize"),
        ("unicomp quantize builtin:tinyworld --gr", "--group-size"),
        ("unicomp quantize builtin:tinyworld --method g", "gptq"),
        ("unicomp quantize builtin:tinyworld --order m", "min-pivot"),
        ("unicomp quantize builtin:tinyworld --format c", "compressed-tensors"),
        ("unicomp recipes s", "schema"),
    ],
)
def test_completion_imports_nothing_heavy(line: str, expected: str) -> None:
    code = "import sys\nfrom unicomp.cli.main import exit_code\ncode = exit_code([])\n"
    answer = in_a_process(
        code + HEAVY,
        _UNICOMP_COMPLETE="complete_bash",
        COMP_WORDS=line,
        COMP_CWORD=str(line.count(" ")),
    )
    *words, last = answer.stdout.splitlines()
    assert expected in words, answer.stdout + answer.stderr
    assert last == "HEAVY [] 0"


def test_a_reader_that_leaves_early() -> None:
    code = "from unicomp.cli.main import main\nimport sys\nsys.argv[1:] = ['--version']\nmain()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == show.CLOSED_PIPE

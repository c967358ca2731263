"""`unicomp compare`: a table, exact JSON, and exit codes by the gates."""

import json
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from unicomp.cli.compare import compare
from unicomp.errors import UnicompError
from unicomp.evaluate.scores import Report, Subject, measured, write


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    made = []
    for name, value, size in (("big", 0.9, 10.0), ("small", 0.7, 4.0)):
        scores = [
            measured("efficiency/disk_bytes", size, unit="bytes", higher_is_better=False),
            measured(
                "accuracy/arc/acc",
                value,
                unit="fraction",
                higher_is_better=True,
                ci95=(value - 0.05, value + 0.05),
                n=100,
            ),
        ]
        report = Report(
            schema="unicomp.report/1",
            model=Subject(id=name),
            baseline=None,
            machine={},
            versions={},
            seeds={},
            scores=scores,
        )
        path = tmp_path / f"{name}.json"
        write(path, report)
        made.append(str(path))
    return made


def call(*words: str) -> Result:
    app = Typer()
    app.command()(compare)
    return CliRunner().invoke(app, list(words))


def test_the_table_marks_the_best(files: list[str]) -> None:
    result = call(*files)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["score", "big", "small", "unit", "better"]
    assert any("0.9 **" in line and "0.7" in line for line in lines)
    assert "front of efficiency/disk_bytes and accuracy/arc/acc: big, small" in lines


def test_json_is_one_object(files: list[str]) -> None:
    found = json.loads(call(*files, "--json").stdout)
    assert found["schema"] == "unicomp.comparison/1"
    assert found["models"] == ["big", "small"]


@pytest.mark.parametrize(("least", "code"), [(0.6, 0), (0.8, 3), (0.7, 4)])
def test_gates_decide_the_exit_code(
    files: list[str], least: float, code: int, tmp_path: Path
) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text(f"- score: accuracy/*/acc\n  min: {least}\n")
    result = call(*files, "--gate", str(gate))
    assert result.exit_code == code, result.output
    assert "gate small: " in result.stdout


def test_what_is_wrong_is_said(files: list[str], tmp_path: Path) -> None:
    assert isinstance(call(files[0]).exception, UnicompError)
    assert isinstance(call(files[0], str(tmp_path / "absent.json")).exception, UnicompError)
    assert isinstance(call(*files, "--gate", "defualt").exception, UnicompError)

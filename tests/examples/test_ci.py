"""`examples/ci`: the job passes, fails where it must, and the workflow runs just that job."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "ci"
SCRIPT, WORKFLOW = FOLDER / "compress.sh", FOLDER / "compress.yml"

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def summary() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_summary", FOLDER / "summary.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / "baseline.json").read_text(encoding="utf-8"))
    return found


def job(out: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    """Run the job as a user would, with the installed command and without a network."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *words],
        env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "OUT": str(out)} | env,
        cwd=out.parent,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )


def cases(path: Path) -> dict[str, str]:
    """Return what each test case of a JUnit file says: the tag of its outcome, or passed."""
    found = ET.parse(path).getroot().iter("testcase")
    return {case.attrib["name"]: case[0].tag if len(case) else "passed" for case in found}


# the whole job


@pytest.mark.slow
def test_job_passes(tmp_path: Path) -> None:
    done = job(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "passed" in done.stdout.splitlines()[0]
    for name in ("gates.xml", "baseline.xml"):
        assert set(cases(tmp_path / "out" / name).values()) == {"passed"}
    sent = [path.removeprefix("out/ci/") for path in artifacts()]
    assert [path for path in sent if not (tmp_path / "out" / path).is_file()] == []
    card = (tmp_path / "out" / "model" / "README.md").read_text(encoding="utf-8")
    assert "fidelity/kl" in card


@pytest.mark.slow
def test_regression_exits_with_3(tmp_path: Path) -> None:
    done = job(tmp_path / "out", "--set", "stages.0.bits=3")
    assert done.returncode == 3, done.stderr
    assert "failed" in done.stdout.splitlines()[0]
    assert cases(tmp_path / "out" / "gates.xml")["fidelity/kl: max 0.005"] == "failure"
    assert cases(tmp_path / "out" / "baseline.xml")["fidelity/kl"] == "failure"


@pytest.mark.slow
def test_regression_that_no_gate_names_exits_with_3(tmp_path: Path) -> None:
    loose = tmp_path / "loose.yaml"
    loose.write_text("- score: fidelity/kl\n  max: 9\n", encoding="utf-8")
    done = job(tmp_path / "out", "--set", "stages.0.bits=3", GATES=str(loose))
    assert done.returncode == 3, done.stderr
    assert set(cases(tmp_path / "out" / "gates.xml").values()) == {"passed"}


@pytest.mark.slow
def test_too_little_evidence_exits_with_4(tmp_path: Path) -> None:
    done = job(tmp_path / "out", LIMIT="1")
    assert done.returncode == 4, done.stderr
    assert "too little evidence" in done.stdout.splitlines()[0]
    assert cases(tmp_path / "out" / "gates.xml")["fidelity/kl: max 0.005"] == "error"


def test_absent_baseline_is_said_before_any_work(tmp_path: Path) -> None:
    done = job(tmp_path / "out", BASELINE=str(tmp_path / "absent.json"))
    assert done.returncode == 1
    assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    assert not (tmp_path / "out").exists()


def test_an_error_keeps_its_exit_code_and_leaves_no_old_summary(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "summary.md").write_text("## passed\n", encoding="utf-8")
    done = job(tmp_path / "out", RECIPE="no-such-recipe")
    assert done.returncode == 1
    assert not (tmp_path / "out" / "summary.md").exists()


# the comparison


def outcomes(summary: ModuleType, before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    return {own.name: own.outcome for own in summary.compare(before, now)}


def test_a_report_is_no_worse_than_itself(summary: ModuleType, committed: dict[str, Any]) -> None:
    found = outcomes(summary, committed, committed)
    assert len(found) >= 5
    assert set(found.values()) == {"kept"}
    assert "efficiency/disk_bytes" not in found


def _shift(by: float) -> Change:
    def change(score: dict[str, Any]) -> None:
        score["value"] += by
        if score["ci95"]:
            score["ci95"] = [end + by for end in score["ci95"]]

    return change


def _set(key: str, value: Any) -> Change:
    def change(score: dict[str, Any]) -> None:
        score[key] = value

    return change


@pytest.mark.parametrize(
    ("name", "change", "outcome"),
    [
        ("fidelity/kl", _shift(0.01), "worse"),
        ("fidelity/kl", _shift(-0.001), "better"),
        ("fidelity/kl", _shift(0.0001), "kept"),
        ("fidelity/top1_agreement", _shift(-0.1), "worse"),
        ("accuracy/perplexity", _set("delta_ci95", [0.1, 0.2]), "worse"),
        ("efficiency/bits_per_weight", _shift(0.01), "worse"),
        ("fidelity/kl", _set("ci95", None), "open"),
        ("fidelity/kl", _set("value", None), "open"),
        ("fidelity/kl", _set("n", 3), "open"),
        ("fidelity/kl", _set("detail", {"sha256": "another"}), "open"),
        ("fidelity/kl", _set("name", "fidelity/other"), "open"),
    ],
)
def test_one_score_changes(
    summary: ModuleType, committed: dict[str, Any], name: str, change: Change, outcome: str
) -> None:
    now = deepcopy(committed)
    change(next(score for score in now["scores"] if score["name"] == name))
    found = outcomes(summary, committed, now)
    assert found.pop(name) == outcome
    assert set(found.values()) == {"kept"}


def test_what_is_no_report_is_said_in_two_lines(summary: ModuleType, tmp_path: Path) -> None:
    for text in ("no JSON", "[]", "{}"):
        (tmp_path / "report.json").write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit) as stopped:
            summary.read(tmp_path / "report.json")
        assert re.fullmatch(r"error: .*\nhint: .*", str(stopped.value))


# the workflow


def workflow() -> dict[str, Any]:
    text = WORKFLOW.read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.load(text, Loader=yaml.BaseLoader)  # `on` stays a word
    return found


def artifacts() -> list[str]:
    steps = workflow()["jobs"]["compress"]["steps"]
    sent = next(step for step in steps if step.get("uses", "").startswith("actions/upload"))
    return str(sent["with"]["path"]).split()


def test_workflow_hands_over_what_the_script_reads() -> None:
    given = workflow()["jobs"]["compress"]["env"]
    read = set(re.findall(r"^#   ([A-Z]+) ", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE))
    assert read - {"UNICOMP"} <= set(given)
    assert set(given) <= read | {"FOLDER", "INSTALL"}


def test_workflow_uses_each_input_and_no_other() -> None:
    text = WORKFLOW.read_text(encoding="utf-8")
    used = set(re.findall(r"inputs\.([a-z-]+)", text))
    assert used == set(workflow()["on"]["workflow_call"]["inputs"])


def test_no_input_is_put_into_a_script() -> None:
    for step in workflow()["jobs"]["compress"]["steps"]:
        assert "${{" not in step.get("run", "")


def test_script_has_the_defaults_of_the_workflow() -> None:
    inputs = workflow()["on"]["workflow_call"]["inputs"]
    script = SCRIPT.read_text(encoding="utf-8")
    for name in ("recipe", "model", "text"):
        assert f"{name}=${{{name.upper()}:-{inputs[name]['default']}}}" in script

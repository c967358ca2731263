"""Scores and reports: what may stand in them, and that JSON brings them back."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from unicomp.errors import UnicompError
from unicomp.evaluate import scores
from unicomp.evaluate.scores import Report, Score, Subject, measured, missing

LOSS = {"unit": "nats/token", "higher_is_better": False}


def report(*found: Score) -> Report:
    return Report(
        schema=scores.SCHEMA,
        model=Subject(id="a"),
        baseline=None,
        machine={"cores": 2},
        versions={"torch": "2"},
        seeds={"windows": 0},
        scores=list(found),
    )


def test_the_json_has_the_keys_of_the_contract_in_order() -> None:
    value = measured("fidelity/kl", 0.5, **LOSS, ci95=(0.4, 0.6), n=9, baseline=0.25)
    found = report(value).to_json()
    keys = ["schema", "model", "baseline", "machine", "versions", "seeds", "scores"]
    assert list(found) == keys
    assert found["schema"] == "unicomp.report/1"
    assert (
        list(found["scores"][0])
        == (
            "axis name value ci95 n unit higher_is_better baseline delta delta_ci95 status detail"
        ).split()
    )
    assert found["scores"][0]["axis"] == "fidelity"
    assert found["scores"][0]["delta"] == 0.25


def test_a_report_comes_back_from_disk(tmp_path: Path) -> None:
    made = report(
        measured("fidelity/kl", 0.5, **LOSS, ci95=(0.4, 0.6), n=9, detail={"text": "a.txt"}),
        missing("fidelity/ear", "no baseline", unit="probability", higher_is_better=True),
    )
    path = tmp_path / "report.json"
    scores.write(path, made)
    assert scores.read(path) == made
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert made.score("fidelity/kl").value == 0.5
    with pytest.raises(KeyError):
        made.score("fidelity/flips")


def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.json"
    scores.write(path, report())
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UnicompError, match="no space left"):
        scores.write(path, report(measured("fidelity/kl", 0.5, **LOSS)))
    assert path.read_bytes() == before


def test_a_place_that_cannot_hold_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnicompError, match="it is a folder"):
        scores.write(tmp_path, report())
    with pytest.raises(UnicompError, match="no folder"):
        scores.write(tmp_path / "no" / "report.json", report())


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not JSON"),
        ("[]", "not a report"),
        ('{"schema": "unicomp.manifest/1"}', "`unicomp.manifest/1`"),
        ('{"schema": "unicomp.report/1"}', "not a report: `model`"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str, part: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(UnicompError, match=part) as caught:
        scores.read(path)
    assert caught.value.hint


def test_an_absent_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnicompError, match="no such report"):
        scores.read(tmp_path / "report.json")


def test_keys_of_a_newer_release_are_read_over(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    value = report(measured("fidelity/kl", 0.5, **LOSS)).to_json()
    value["new"] = value["scores"][0]["new"] = 1
    path.write_text(json.dumps(value))
    assert scores.read(path).score("fidelity/kl").value == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_not_measured(value: float) -> None:
    found = measured("fidelity/kl", value, **LOSS, n=3)
    assert (found.status, found.value) == ("unmeasurable", None)
    assert str(value) in found.detail["reason"]


def test_a_baseline_that_is_not_finite_gives_no_delta() -> None:
    found = measured("fidelity/kl", 1.0, **LOSS, baseline=math.inf, delta_ci95=(0, 1))
    assert (found.baseline, found.delta, found.delta_ci95) == (None, None, None)


GOOD: dict[str, Any] = {
    "axis": "fidelity",
    "name": "fidelity/kl",
    "value": 1.0,
    "unit": "nats/token",
    "higher_is_better": False,
    "status": "measured",
}


@pytest.mark.parametrize(
    "change",
    [
        {"axis": "accuracy"},
        {"value": None},
        {"value": math.nan},
        {"status": "skipped"},
        {"status": "skipped", "value": None},
        {"status": "unmeasurable", "value": None, "detail": {"reason": ""}},
        {"status": "invented"},
        {"ci95": (2.0, 1.0)},
        {"n": 0},
    ],
)
def test_a_score_that_contradicts_itself_cannot_be_made(change: dict[str, Any]) -> None:
    Score(**GOOD)
    with pytest.raises(ValidationError):
        Score(**GOOD | change)

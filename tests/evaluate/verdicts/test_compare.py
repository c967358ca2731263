"""Reports side by side: who is best, how clearly, and who is on the front."""

import json
from typing import Any

import pytest

from unicomp.errors import UnicompError
from unicomp.evaluate.scores import SCHEMA as REPORT
from unicomp.evaluate.scores import Report, Score, Subject, measured, missing
from unicomp.evaluate.verdicts.compare import SCHEMA, compare
from unicomp.evaluate.verdicts.gates import Gate


def report(name: str, *scores: Score, baseline: str | None = None, **machine: Any) -> Report:
    return Report(
        schema=REPORT,
        model=Subject(id=name),
        baseline=None if baseline is None else Subject(id=baseline),
        machine=machine,
        versions={},
        seeds={},
        scores=list(scores),
    )


def size(value: float) -> Score:
    return measured("efficiency/disk_bytes", value, unit="bytes", higher_is_better=False)


def acc(value: float, half: float = 0.01, **rest: Any) -> Score:
    ends = (value - half, value + half)
    words: dict[str, Any] = {"unit": "fraction", "higher_is_better": True, "n": 100, "ci95": ends}
    return measured("accuracy/arc/acc", value, **(words | rest))


def test_the_best_and_how_clearly() -> None:
    found = compare([report("a", size(10), acc(0.5)), report("b", size(4), acc(0.505))])
    rows = {row.name: row for row in found.rows}
    assert (rows["efficiency/disk_bytes"].best, rows["efficiency/disk_bytes"].clear) == ((1,), True)
    assert (rows["accuracy/arc/acc"].best, rows["accuracy/arc/acc"].clear) == ((1,), False)
    clear = compare([report("a", acc(0.5)), report("b", acc(0.6))]).rows[0]
    assert (clear.best, clear.clear) == ((1,), True)
    even = compare([report("a", acc(0.5)), report("b", acc(0.5))]).rows[0]
    assert (even.best, even.clear) == ((0, 1), False)
    unknown = compare([report("a", acc(0.5, ci95=None)), report("b", acc(0.6))]).rows[0]
    assert not unknown.clear


def test_a_score_that_one_report_lacks() -> None:
    absent = missing("accuracy/arc/acc", "why", unit="fraction", higher_is_better=True)
    found = compare([report("a", size(1), acc(0.5)), report("b", absent), report("c")])
    row = next(row for row in found.rows if row.name == "accuracy/arc/acc")
    assert row.scores[2] is None
    assert row.best == ()
    assert found.fronts == ()


def test_the_front_holds_who_is_not_outdone() -> None:
    reports = [
        report("big", size(10), acc(0.9)),
        report("small", size(2), acc(0.5)),
        report("middle", size(5), acc(0.8)),
        report("outdone", size(6), acc(0.7)),
        report("same", size(5), acc(0.8)),
    ]
    (front,) = compare(reports).fronts
    assert (front.x, front.y) == ("efficiency/disk_bytes", "accuracy/arc/acc")
    assert front.on == (0, 1, 2, 4)
    assert front.points[3] == (6, 0.7)


def test_names_gates_notes_and_json() -> None:
    reports = [
        report("a", acc(0.5, detail={"sha256": "1"}), baseline="x", cpu="one"),
        report("a", acc(0.9, detail={"sha256": "2"}), cpu="two"),
    ]
    found = compare(reports, [Gate("accuracy/*/acc", min=0.7)])
    assert found.names == ("a (1)", "a (2)")
    assert [own[0].outcome for own in found.verdicts] == ["fail", "pass"]
    assert len(found.notes) == 3
    assert "baselines: none, x" in found.notes[0]
    made = found.to_json()
    assert made["schema"] == SCHEMA
    assert [own["outcome"] for own in made["gates"]] == ["fail", "pass"]
    json.dumps(made, allow_nan=False)


def test_one_report_is_nothing_to_compare() -> None:
    with pytest.raises(UnicompError, match="1 report"):
        compare([report("a")])

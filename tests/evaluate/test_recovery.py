"""Recovery by task, against the definition and the paper's own table."""

import pytest

from unicomp.errors import UnicompError
from unicomp.evaluate.recovery import recovery
from unicomp.evaluate.scores import Report, Score, Subject


def report(values: dict[str, float | None], ci: float | None = None) -> Report:
    scores = [
        Score(
            axis=name.partition("/")[0],
            name=name,
            value=value,
            ci95=None if ci is None or value is None else (value - ci, value + ci),
            unit="%",
            higher_is_better=True,
            status="measured" if value is not None else "skipped",
            detail={} if value is not None else {"reason": "no data"},
        )
        for name, value in values.items()
    ]
    return Report(
        schema="unicomp.report/1",
        model=Subject(id="m"),
        baseline=None,
        machine={},
        versions={},
        seeds={},
        scores=scores,
    )


# D-QRELO, arXiv:2604.16940, main table: base, fine-tune, D-QRELO at 1/8; vision tasks from 0.
TABLE = {
    "gsm8k": (5.45, 88.93, 84.84),
    "math": (2.6, 61.2, 57.4),
    "textvqa": (0, 84.51, 81.94),
    "mme": (0, 1676, 1664),
    "aime24": (7.78, 45.56, 42.33),
    "gpqa": (27.61, 61.28, 59.65),
    "mmlu": (18.25, 63.25, 62.71),
    "lcb": (10.0, 30.4, 24.91),
    "ifeval": (34.57, 82.23, 78.76),
    "mmlu-moe": (58.74, 74.13, 75.88),
    "lcb-moe": (16.79, 40.46, 35.09),
    "ifeval-moe": (39.37, 83.18, 83.73),
}


def of_table() -> list[Report]:
    return [report({f"accuracy/{k}/acc": v[i] for k, v in TABLE.items()}) for i in range(3)]


def test_the_papers_drop_is_one_minus_the_mean() -> None:
    found = recovery(*of_table())
    assert 100 * (1 - found.mean) == pytest.approx(6.17, abs=0.01)
    assert 100 * (1 - found.clipped) == pytest.approx(7.22, abs=0.01)
    assert found.worst.name == "accuracy/lcb/acc"
    assert found.worst.recovery == pytest.approx(1 - 0.269, abs=1e-3)
    swapped = recovery(*reversed(of_table()))
    assert swapped.mean != pytest.approx(found.mean, abs=0.1)  # the order is not without meaning


def test_scores_that_are_not_of_all_three_are_left_out() -> None:
    base = report({"accuracy/a/acc": 0.2, "accuracy/b/acc": None, "efficiency/load_s": 1.0}, 0.05)
    tuned = report({"accuracy/a/acc": 0.6, "accuracy/b/acc": 0.5, "efficiency/load_s": 2.0}, 0.05)
    kept = report({"accuracy/a/acc": 0.5, "accuracy/b/acc": 0.5, "efficiency/load_s": 2.0}, 0.05)
    found = recovery(base, tuned, kept)
    assert [task.name for task in found.tasks] == ["accuracy/a/acc"]
    assert found.worst.recovery == pytest.approx(0.75)
    assert found.worst.clear
    assert not recovery(report({"accuracy/a/acc": 0.55}, 0.05), tuned, kept).worst.clear
    with pytest.raises(UnicompError, match="no task's score"):
        recovery(tuned, tuned, kept)

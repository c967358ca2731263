"""Gates: what they decide, and how often they are right."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from scipy.stats import t as student

from unicomp.evaluate.scores import SCHEMA, Report, Score, Subject, measured, missing
from unicomp.evaluate.statistics import estimates, proportions
from unicomp.evaluate.verdicts import gates
from unicomp.evaluate.verdicts.gates import Gate, decide, matches, outcome

DRAWS = 2000


def report(*scores: Score) -> Report:
    return Report(
        schema=SCHEMA,
        model=Subject(id="a"),
        baseline=Subject(id="b"),
        machine={},
        versions={},
        seeds={},
        scores=list(scores),
    )


def score(name: str = "accuracy/x/mean", value: float = 0.5, **rest: Any) -> Score:
    words: dict[str, Any] = {"unit": "fraction", "higher_is_better": True}
    return measured(name, value, **(words | rest))


def found(gate: Gate, *scores: Score) -> list[str]:
    return [verdict.outcome for verdict in decide(report(*scores), [gate])]


SHARE = "safety/refusal_rate"
NINETY = score(value=0.9, ci95=(0.85, 0.95), n=100, baseline=0.95, delta_ci95=(-0.08, -0.02))


@pytest.mark.parametrize(
    ("bound", "expected"),
    [
        ({"min": 0.84}, "pass"),
        ({"min": 0.86}, "inconclusive"),
        ({"min": 0.96}, "fail"),
        ({"max": 0.96}, "pass"),
        ({"max": 0.94}, "inconclusive"),
        ({"max": 0.84}, "fail"),
        ({"max_drop": 0.09}, "pass"),
        ({"max_drop": 0.05}, "inconclusive"),
        ({"max_drop": 0.01}, "fail"),
        ({"max_rise": 0.0}, "pass"),
        ({"retention": 0.9}, "pass"),
        ({"retention": 0.95}, "inconclusive"),
        ({"retention": 0.99}, "fail"),
        ({"min": 0.86, "confidence": 0.5}, "pass"),
        ({"min": 0.84, "confidence": 0.99}, "inconclusive"),
    ],
)
def test_the_interval_decides(bound: dict[str, float], expected: str) -> None:
    assert found(Gate(score="accuracy/*/mean", **bound), NINETY) == [expected]


def test_lower_is_better_keeps_the_inverse() -> None:
    worse = score(
        "accuracy/perplexity",
        11.0,
        higher_is_better=False,
        ci95=(10.0, 12.0),
        n=60,
        baseline=10.0,
        delta_ci95=(0.9, 1.1),
    )
    verdict = decide(report(worse), [Gate("accuracy/perplexity", retention=0.9)])[0]
    assert verdict.value == pytest.approx(10 / 11)
    assert verdict.interval == pytest.approx((10 / 11.1, 10 / 10.9))
    assert verdict.outcome == "pass"
    assert found(Gate("accuracy/perplexity", max_rise=0.5), worse) == ["fail"]


def test_what_is_exact_needs_no_interval_and_what_is_not_does() -> None:
    size = score("efficiency/bits_per_weight", 4.5, higher_is_better=False, baseline=16.0)
    assert found(Gate("efficiency/bits_per_weight", max=4.5), size) == ["pass"]
    assert found(Gate("efficiency/bits_per_weight", max=4.4), size) == ["fail"]
    assert found(Gate("efficiency/bits_per_weight", max_rise=0.0), size) == ["pass"]
    one = score(value=0.9, n=1)
    verdict = decide(report(one), [Gate("accuracy/*/mean", min=0.1)])[0]
    assert verdict.outcome == "inconclusive"
    assert "interval" in (verdict.reason or "")


@pytest.mark.parametrize(
    ("policy", "name", "expected"),
    [
        (None, "safety/refusal_rate", "inconclusive"),
        (None, "accuracy/x/acc", "inconclusive"),
        (None, "efficiency/energy_j_per_token", "not applied"),
        ("skip", "safety/refusal_rate", "not applied"),
        ("fail", "efficiency/energy_j_per_token", "fail"),
        ("inconclusive", "efficiency/energy_j_per_token", "inconclusive"),
    ],
)
def test_what_cannot_be_measured_never_passes(policy: Any, name: str, expected: str) -> None:
    gate = Gate(name, max=1.0, unmeasurable=policy)
    absent = missing(name, "no such meter", unit="x", higher_is_better=False, status="unmeasurable")
    assert found(gate, absent) == [expected]
    assert found(gate) == [expected]  # and so with a score that is not there at all
    verdict = decide(report(absent), [gate])[0]
    assert "no such meter" in str(verdict)


def test_no_baseline_is_no_drop() -> None:
    alone = score(SHARE, 0.9, ci95=(0.85, 0.95), n=100)
    verdict = decide(report(alone), [Gate(SHARE, max_drop=0.5, unmeasurable="fail")])[0]
    assert verdict.outcome == "fail"
    assert "baseline" in (verdict.reason or "")
    zero = score(SHARE, 0.9, n=100, baseline=0.0, delta_ci95=(0.8, 1.0))
    assert found(Gate(SHARE, retention=0.5), zero) == ["inconclusive"]


def test_patterns() -> None:
    assert matches("accuracy/*/acc", "accuracy/arc/acc")
    assert matches("accuracy/blimp_*/acc", "accuracy/blimp_x/acc")
    assert not matches("accuracy/*/acc", "accuracy/arc/acc_norm")
    assert not matches("accuracy/*", "accuracy/arc/acc")
    assert not matches("a.c/x", "abc/x")
    verdict = decide(
        report(score("safety/refusal_rate", n=1)), [Gate("safety/refusals_rate", min=0)]
    )
    assert "did you mean `safety/refusal_rate`" in str(verdict[0])


def test_the_outcome_of_all() -> None:
    def verdicts(*outcomes: Any) -> Sequence[gates.Verdict]:
        return [gates.Verdict("a", "a", "min", own) for own in outcomes]

    assert outcome(verdicts("pass", "inconclusive", "fail")) == "fail"
    assert outcome(verdicts("pass", "inconclusive", "not applied")) == "inconclusive"
    assert outcome(verdicts("pass", "not applied")) == "pass"
    assert outcome([]) == "pass"


def test_a_gate_without_a_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="no bound"):
        Gate("accuracy/x/acc")


@cache
def shared(name: str, *cells: int) -> Score:
    """Return the score of a paired share with these counts, in the order of `Pairs`."""
    kind = torch.repeat_interleave(torch.arange(4), torch.tensor(cells))
    return proportions.share(name, (kind == 0) | (kind == 2), (kind == 0) | (kind == 1))


def alarms(n: int, base: float, drop: float, gate: Gate, several: int = 1) -> float:
    """Return how often a gate fails a true drop from `base`, on `several` scores at once."""
    gained, hits = 2 / 240, 0
    known: dict[tuple[tuple[int, ...], ...], bool] = {}
    cells = torch.tensor([base - drop - gained, drop + gained, gained, 1 - base - gained])
    kinds = torch.multinomial(cells, DRAWS * several * n, replacement=True)
    counts = torch.nn.functional.one_hot(kinds.view(DRAWS, several, n), 4).sum(2).tolist()
    for draw in counts:
        drawn = tuple(tuple(own) for own in draw)
        if drawn not in known:
            scores = [shared(f"safety/{at}", *own) for at, own in enumerate(drawn)]
            known[drawn] = outcome(decide(report(*scores), [gate])) == "fail"
        hits += known[drawn]
    return hits / DRAWS


@pytest.fixture
def _mute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what is only printed, which takes longest."""
    monkeypatch.setattr(gates, "_detectable", lambda *_: None)
    monkeypatch.setattr(proportions, "detectable_drop", lambda *_, **__: None)
    shared.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("_mute")
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_false_alarms_are_at_most_the_level(confidence: float) -> None:
    """The true drop is just what is allowed: the worst case of a model that keeps its bounds."""
    gate = Gate("safety/*", max_drop=0.05, confidence=confidence)
    assert alarms(120, 0.92, 0.05, gate) <= 1 - confidence
    assert alarms(60, 0.92, 0.05, gate, several=3) <= 1 - confidence  # all three share the level


@pytest.mark.slow
@pytest.mark.usefixtures("_mute")
def test_false_alarms_of_other_bounds() -> None:
    retention = Gate("safety/*", retention=0.9)
    assert alarms(120, 0.9, 0.09, retention) <= 0.05
    least = Gate("safety/*", min=0.85)
    assert alarms(120, 0.9, 0.05, least) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("allowed", [0.0, 0.05])
def test_the_printed_drop_is_failed_four_times_in_five(
    allowed: float, request: pytest.FixtureRequest
) -> None:
    gate = Gate("safety/*", max_drop=allowed)
    sample = shared("safety/0", 218, 2, 2, 18)
    seen = decide(report(sample), [gate])[0].detectable
    assert seen is not None
    assert allowed < seen < 0.2
    request.getfixturevalue("_mute")
    assert alarms(240, 0.95, seen, gate) >= 0.8
    assert alarms(240, 0.95, allowed + (seen - allowed) / 4, gate) < 0.5


def test_too_few_prompts_decide_nothing() -> None:
    yes = torch.ones(12, dtype=torch.bool)
    gate = Gate(SHARE, max_drop=0.05)
    verdict = decide(report(proportions.share(SHARE, yes, yes)), [gate])[0]
    assert verdict.outcome == "inconclusive"
    assert verdict.value == 0
    assert (verdict.detectable or 1) > 0.3  # and says what so few can show
    many = torch.ones(300, dtype=torch.bool)
    assert found(gate, proportions.share(SHARE, many, many)) == ["pass"]


def of_mean(name: str, values: torch.Tensor) -> Score:
    estimate = estimates.mean(values)
    return score(name, value=estimate.value, ci95=estimate.interval(), n=values.numel())


@pytest.mark.parametrize(("n", "several"), [(8, 1), (8, 5), (60, 5)])
def test_alarms_of_means_are_within_the_level_and_the_printed_mean_is_seen(
    n: int, several: int
) -> None:
    """Normal values whose true mean is just the least allowed, and what was printed of them."""
    gate = Gate("accuracy/*/mean", min=0.0)
    values = torch.randn(DRAWS, 2, several, n, dtype=torch.float64)
    alarms = seen = 0
    for first, second in values:
        names = [f"accuracy/{place}/mean" for place in range(several)]
        scores = [of_mean(name, own) for name, own in zip(names, first, strict=True)]
        verdicts = decide(report(*scores), [gate])
        alarms += any(own.outcome == "fail" for own in verdicts)
        least = verdicts[0].detectable
        assert least is not None
        moved = of_mean(names[0], second[0] + least)
        seen += decide(report(moved, *scores[1:]), [gate])[0].outcome == "fail"
    # Exactly 0.8 by `reach`, which test_estimates.py holds to scipy; here within the simulation.
    assert seen / DRAWS == pytest.approx(0.8, abs=3 * (0.16 / DRAWS) ** 0.5)
    # Each bound is broken by chance as often as Student's t lies below its share of the level.
    tail = min(0.025, 0.05 / several)
    each = float(student.cdf(-estimates.t_quantile(1 - tail, n - 1), n - 1))
    level = 1 - (1 - each) ** several
    assert level <= 0.05
    assert alarms / DRAWS == pytest.approx(level, abs=3 * (level / DRAWS) ** 0.5)


def test_a_line_says_everything() -> None:
    lines = str(decide(report(NINETY), [Gate("accuracy/*/mean", max_drop=0.05)])[0])
    assert lines == (
        "inconclusive: accuracy/x/mean: max_drop 0.05, found 0.05 (0.02 to 0.08); "
        "would have seen 0.09314"
    )
    made = decide(report(NINETY), [Gate("accuracy/*/mean", min=0.5)])[0].to_json()
    assert made["outcome"] == "pass"
    assert made["interval"] == pytest.approx((0.85, 0.95))

"""Gates: bounds that scores must keep, decided by confidence bounds and never by the point value.

A check passes where the whole interval keeps the bound, fails where the whole interval breaks it,
and is inconclusive in between: then the sample is too small for the question. So a gate fails a
model that keeps its bounds at most as often as its level, 1 - confidence. A gate that several
scores match shares that level among them (Bonferroni), for each could raise the alarm.

A score that cannot be measured is never passed: see `POLICY`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

from unicomp import suggest
from unicomp.evaluate.scores import Interval, Report, Score
from unicomp.evaluate.statistics import estimates, proportions
from unicomp.evaluate.statistics.proportions import Pairs

Outcome = Literal["fail", "inconclusive", "pass", "not applied"]
Policy = Literal["skip", "inconclusive", "fail"]

OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""The worst first, as pages and cards show them."""
POLICY: Policy = "inconclusive"
"""What a score that cannot be measured counts as, unless the gate says otherwise."""
SKIPPED = re.compile(r"efficiency/(energy|co2)\w*")
"""Scores that most machines cannot measure: not applied, unless the gate says otherwise."""
MANY = 1000  # degrees of freedom at which Student's t is the normal law
CHECKS = ("min", "max", "max_drop", "max_rise", "retention")


@dataclass(frozen=True, slots=True)
class Gate:
    """What a gate file says; see `recipes/schema.py` for the same from YAML.

    score         name of the scores meant, `*` for any part between slashes
    min, max      of the value, in the score's unit
    max_drop      of baseline - value
    max_rise      of value - baseline
    retention     least value / baseline; where lower is better, least baseline / value
    confidence    of the intervals that decide
    unmeasurable  None: as `POLICY` and `SKIPPED` have it
    """

    score: str
    min: float | None = None
    max: float | None = None
    max_drop: float | None = None
    max_rise: float | None = None
    retention: float | None = None
    confidence: float = 0.95
    unmeasurable: Policy | None = None

    def __post_init__(self) -> None:
        if all(getattr(self, check) is None for check in CHECKS):
            raise ValueError(f"the gate on `{self.score}` has no bound")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One bound on one score.

    gate        the pattern of the gate
    score       the score's name, or the pattern where no score has such a name
    check       one of `CHECKS`, or "" where no score has such a name
    limit       the bound
    value       of what is bounded: the value, the drop, the rise or the retention
    interval    of the same, at the gate's confidence; None where it is exact or unknown
    detectable  the nearest true value beyond the limit that fails with 80% power; None where no
                value would, or nothing is known
    reason      why, where the outcome is no plain comparison
    """

    gate: str
    score: str
    check: str
    outcome: Outcome
    limit: float | None = None
    value: float | None = None
    interval: Interval | None = None
    detectable: float | None = None
    unit: str = ""
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Return one line: outcome, score, what was found beside the bound, and what was seen."""
        line = f"{self.outcome}: {self.score}"
        if self.check:
            line += f": {self.check} {_number(self.limit)}"
        if self.value is not None:
            line += f", found {_number(self.value)}"
            if self.interval is not None:
                line += f" ({_number(self.interval[0])} to {_number(self.interval[1])})"
        if self.reason is not None:
            line += f": {self.reason}"
        if self.detectable is not None:
            line += f"; would have seen {_number(self.detectable)}"
        return line


def decide(report: Report, gates: Sequence[Gate]) -> list[Verdict]:
    """Return a verdict for every bound of every gate on every score that it means."""
    found: list[Verdict] = []
    for gate in gates:
        scores = [score for score in report.scores if matches(gate.score, score.name)]
        if not scores:
            known = suggest.closest(gate.score, (score.name for score in report.scores))
            reason = "the report has no such score"
            reason += f"; did you mean `{known}`?" if known else ""
            found.append(
                Verdict(gate.score, gate.score, "", _without(gate, gate.score), reason=reason)
            )
            continue
        checks = [check for check in CHECKS if getattr(gate, check) is not None]
        count = len(scores) * len(checks)
        found += [_check(gate, score, check, count) for score in scores for check in checks]
    return found


def outcome(verdicts: Sequence[Verdict]) -> Literal["pass", "fail", "inconclusive"]:
    """Return the outcome of all: one failure fails, then one that is open leaves it open."""
    found = {verdict.outcome for verdict in verdicts}
    if "fail" in found:
        return "fail"
    return "inconclusive" if "inconclusive" in found else "pass"


def matches(pattern: str, name: str) -> bool:
    """Tell whether a score's name fits a pattern, `*` standing for any part between slashes."""
    parts = (re.escape(part).replace(r"\*", "[^/]*") for part in pattern.split("/"))
    return re.fullmatch("/".join(parts), name) is not None


class _Bounded(NamedTuple):
    """What a check bounds.

    interval  at a confidence; None where the value is exact
    known     False: there is no interval, but there should be one
    """

    value: float
    interval: Interval | None
    known: bool


def _check(gate: Gate, score: Score, check: str, count: int) -> Verdict:
    limit = float(getattr(gate, check))
    said: dict[str, Any] = {
        "gate": gate.score,
        "score": score.name,
        "check": check,
        "limit": limit,
        "unit": "ratio" if check == "retention" else score.unit,
    }
    reason = _unknown(score, check)
    if reason is not None:
        return Verdict(**said, outcome=_without(gate, score.name), reason=reason)
    level = 1 - gate.confidence
    strict = 1 - 2 * min(level / 2, level / count)
    plain = _bounded(score, check, gate.confidence)
    if not plain.known:
        reason = "the sample has no interval: one unit, or none that can be told"
        return Verdict(**said, outcome="inconclusive", value=plain.value, reason=reason)
    upward = check in ("max", "max_drop", "max_rise")
    if plain.interval is None:
        kept = plain.value <= limit if upward else plain.value >= limit
        return Verdict(**said, outcome="pass" if kept else "fail", value=plain.value)
    wide = _bounded(score, check, strict, careful=True).interval or plain.interval
    if upward:
        kept, broken = plain.interval[1] <= limit, wide[0] > limit
    else:
        kept, broken = plain.interval[0] >= limit, wide[1] < limit
    result: Outcome = "pass" if kept else "fail" if broken else "inconclusive"
    seen = _detectable(score, check, limit, strict, wide, plain.value)
    return Verdict(
        **said, outcome=result, value=plain.value, interval=plain.interval, detectable=seen
    )


def _unknown(score: Score, check: str) -> str | None:
    """Return why a score cannot be checked, or None."""
    if score.value is None:
        return f"{score.status}: {score.detail.get('reason', 'no value')}"
    if check in ("min", "max"):
        return None
    if score.baseline is None:
        return "there is no baseline to compare with"
    if check == "retention" and min(score.baseline, score.value) <= 0:
        return "no ratio to a baseline of zero"
    return None


def _bounded(score: Score, check: str, confidence: float, *, careful: bool = False) -> _Bounded:
    value = score.value or 0.0
    exact = score.n is None
    if check in ("min", "max"):
        interval = _value_interval(score, confidence)
        return _Bounded(value, interval, exact or interval is not None)
    baseline = score.baseline or 0.0
    delta = value - baseline
    apart = _delta_interval(score, confidence, careful=careful)
    if check == "max_rise":
        return _Bounded(delta, apart, exact or apart is not None)
    if check == "max_drop":
        turned = None if apart is None else (-apart[1], -apart[0])
        return _Bounded(-delta, turned, exact or apart is not None)
    ratio = value / baseline if score.higher_is_better else baseline / value
    kept = _retention_interval(score, confidence, ratio)
    return _Bounded(ratio, kept, exact or kept is not None)


def _value_interval(score: Score, confidence: float) -> Interval | None:
    yes = score.detail.get("yes")
    if yes is not None and score.n is not None:
        method = _method(score)
        return method(int(yes), score.n, confidence)
    return _scaled(score, score.ci95, score.value or 0.0, confidence)


def _delta_interval(score: Score, confidence: float, *, careful: bool = False) -> Interval | None:
    found = _pairs(score)
    if found is not None:
        return proportions.difference(found, confidence, careful=careful)
    return _scaled(score, score.delta_ci95, score.delta or 0.0, confidence)


def _retention_interval(score: Score, confidence: float, ratio: float) -> Interval | None:
    """Return the interval of the ratio; where the score has none, by its delta's.

    Then the baseline is taken as it was found, and the delta carries the error of both.
    """
    found = _pairs(score)
    if found is not None and score.higher_is_better:
        return proportions.retention(found, confidence=confidence)
    kept = score.detail.get("retention")
    if isinstance(kept, Mapping) and kept.get("ci95") is not None:
        return _scaled(score, tuple(kept["ci95"]), ratio, confidence)
    apart = _delta_interval(score, confidence)
    baseline = score.baseline or 0.0
    if apart is None or not baseline:
        return None
    low, high = (1 + end / baseline for end in apart)
    if score.higher_is_better:
        return low, high
    return None if low <= 0 else (1 / high, 1 / low)


def _pairs(score: Score) -> Pairs | None:
    found = score.detail.get("pairs")
    return Pairs(**found) if isinstance(found, Mapping) else None


def _method(score: Score) -> Callable[[int, int, float], Interval]:
    wilson = score.detail.get("interval") == "wilson"
    return proportions.wilson if wilson else proportions.clopper_pearson


def _scaled(score: Score, interval: Any, value: float, confidence: float) -> Interval | None:
    """Return a 95% interval at another confidence, each side as that of Student's t."""
    if interval is None:
        return None
    ends = [estimates.t_quantile((1 + own) / 2, _degrees(score)) for own in (confidence, 0.95)]
    factor = ends[0] / ends[1]
    low, high = interval
    return value - (value - low) * factor, value + (high - value) * factor


def _degrees(score: Score) -> int:
    """Return the degrees of freedom of an interval; of units that nobody counted, many."""
    return MANY if score.n is None else max(1, score.n - 1)


def _detectable(
    score: Score, check: str, limit: float, confidence: float, interval: Interval, value: float
) -> float | None:
    """Return the nearest true value beyond the limit that this sample fails with 80% power."""
    found, n = _pairs(score), score.n
    if found is not None and check in ("max_drop", "max_rise"):
        back = found.model_only if check == "max_drop" else found.baseline_only
        return proportions.detectable_drop(
            found.n, back / found.n, allowed=limit, confidence=confidence
        )
    if score.detail.get("yes") is not None and n is not None and check in ("min", "max"):
        method = _method(score)
        seen = proportions.detectable_below if check == "min" else proportions.detectable_above
        return seen(n, limit, confidence=confidence, interval=method)
    # A value beyond a least one is told by the upper end of its interval, and the other way round.
    least = check in ("min", "retention")
    side = interval[1] - value if least else value - interval[0]
    away = side * estimates.reach(_degrees(score), confidence)
    if not math.isfinite(away):
        return None
    return limit - away if least else limit + away


def _without(gate: Gate, name: str) -> Outcome:
    """Return what a score without a value counts as."""
    policy: Policy = gate.unmeasurable or ("skip" if SKIPPED.fullmatch(name) else POLICY)
    return "not applied" if policy == "skip" else policy


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

"""Calibration scores: on multiple choice, by normalized likelihoods, and on next tokens.

Accuracy can stay while confidence no longer means anything; distilled and quantized models grow
too sure. All documents of all tasks are one sample, each document a unit. On text the window is
the unit, since tokens of one window depend on each other. What is kept of a token is six numbers,
never its logits; sums at a grid of temperatures serve to fit one.

A temperature is fitted on one half of the units and judged on the other. It is a suggestion: no
score here is after it, and nothing is changed in the model.

Definitions: `statistics/reliability.py`. Paper on what compression does to it: arXiv:2606.01850.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unicomp.evaluate.scores import NOT_FINITE, Score, Status, measured, missing
from unicomp.evaluate.statistics import estimates, reliability
from unicomp.evaluate.statistics.reliability import Predictions
from unicomp.evaluate.tasks.choices import Choices
from unicomp.metrics import log_probabilities

KINDS = {
    "ece": ("fraction", False),
    "ace": ("fraction", False),
    "brier": ("squared probability", False),
    "nll": ("nats", False),
    "overconfidence_gap": ("fraction", False),
    "aurc": ("fraction", False),
    "entropy_ratio": ("ratio", True),
    "temperature": ("ratio", False),
}
"""Name -> unit, and whether higher is better (of gap, ratio and temperature, nearer to 0 or 1)."""

PLACES = {"choices": "calibration/", "tokens": "calibration/token_"}
CHOICE_GRID = tuple(2 ** (step / 16) for step in range(-32, 33))
TOKEN_GRID = tuple(2 ** (step / 8) for step in range(-8, 9))
CHUNK = 1 << 22  # elements of one temporary
TOKEN_DRAWS = 400


@dataclass(frozen=True, slots=True)
class Heated:
    """What a temperature would do, at each of a grid.

    grid    temperatures
    nll     float64 [units, temperatures], sums over the unit's predictions
    counts  float64 [units, temperatures, bins], predictions
    gaps    float64 [units, temperatures, bins], sums of confidence - right
    """

    grid: tuple[float, ...]
    nll: Tensor
    counts: Tensor
    gaps: Tensor


@dataclass(frozen=True, slots=True)
class Seen:
    """Predictions of one model, and what temperatures would do to them."""

    predictions: Predictions
    heated: Heated
    detail: Mapping[str, Any]


def of_choices(tasks: Sequence[Choices]) -> Seen | None:
    """Return what a model made of every document with one right choice; None without any."""
    kept = [task for task in tasks if task.right is None and len(task)]
    if not kept:
        return None
    raw = [values.double() for task in kept for values in task.loglikelihoods]
    gold = torch.cat([task.gold for task in kept])
    found = reliability.predict([torch.log_softmax(values, 0) for values in raw], gold)
    width = max(values.numel() for values in raw)
    padded = torch.full((len(raw), width), -math.inf, dtype=torch.float64)
    for row, values in enumerate(raw):
        padded[row, : values.numel()] = values
    heated = _heat(padded, gold, torch.arange(len(raw)), len(raw), CHOICE_GRID)
    return Seen(found, heated, {"tasks": [task.task for task in kept], "documents": len(raw)})


class TokenWatch:
    """Gathers what calibration needs from logits as they pass, batch by batch."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.heated: list[Heated] = []
        self.windows = 0

    def add(self, logits: Tensor, targets: Tensor) -> None:
        """Take a batch in.

        logits   floating [windows, tokens, vocab]
        targets  int64 [windows, tokens]
        """
        step = max(1, CHUNK // logits.shape[-1])
        for window in range(logits.shape[0]):
            heated = []
            for start in range(0, targets.shape[1], step):
                part = slice(start, start + step)
                goal, own = targets[window, part], logits[window, part]
                log_p = log_probabilities(own)
                p = log_p.exp()
                confidence, taken = p.max(-1)
                nll = -log_p.gather(-1, goal[:, None])[:, 0]
                brier = (p * p).sum(-1) - 2 * (-nll).exp() + 1
                entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
                right = (taken == goal).double()
                unit = torch.full_like(nll, self.windows)
                rows = torch.stack([confidence, right, nll, brier, entropy, unit], 1)
                self.parts.append(rows.cpu())
                place = torch.zeros(len(goal), dtype=torch.int64)
                heated.append(_heat(own.float(), goal, place, 1, TOKEN_GRID))
            self.heated.append(_added(heated))
            self.windows += 1

    def seen(self, detail: Mapping[str, Any]) -> Seen:
        """Return what was gathered."""
        values = torch.cat(self.parts)
        confidence, right, nll, brier, entropy, unit = values.unbind(1)
        predictions = Predictions(confidence, right, nll, brier, entropy, unit.long())
        heated = Heated(
            TOKEN_GRID,
            torch.cat([own.nll for own in self.heated]),
            torch.cat([own.counts for own in self.heated]),
            torch.cat([own.gaps for own in self.heated]),
        )
        return Seen(predictions, heated, detail)


def scores(ours: Seen, theirs: Seen | None, *, place: str = "choices") -> list[Score]:
    """Return every score of `KINDS`, beside the baseline's where there is one.

    ours, theirs  of the same documents or windows in the same order
    place         one of `PLACES`
    """
    if theirs is not None and not torch.equal(ours.predictions.unit, theirs.predictions.unit):
        raise ValueError("calibration beside a baseline needs the same predictions on both sides")
    prefix = PLACES[place]
    if not all(bool(own.isfinite().all()) for own in _columns(ours.predictions)):
        reason = "the model's logits are not finite"
        return skipped(reason, place=place, status="unmeasurable", hint=NOT_FINITE)
    if theirs is not None and not all(
        bool(own.isfinite().all()) for own in _columns(theirs.predictions)
    ):
        theirs = None
    return [
        _error(f"{prefix}ece", ours, theirs, adaptive=False),
        _error(f"{prefix}ace", ours, theirs, adaptive=True),
        _mean(f"{prefix}brier", ours, theirs, lambda found: found.brier, 0.0, 2.0),
        _mean(f"{prefix}nll", ours, theirs, lambda found: found.nll, 0.0, math.inf),
        _mean(
            f"{prefix}overconfidence_gap",
            ours,
            theirs,
            lambda found: found.confidence - found.right,
            -1.0,
            1.0,
        ),
        _aurc(f"{prefix}aurc", ours, theirs),
        _entropy(f"{prefix}entropy_ratio", ours, theirs),
        _temperature(f"{prefix}temperature", ours, theirs),
    ]


def skipped(
    reason: str,
    *,
    place: str = "choices",
    status: Status = "skipped",
    hint: str | None = None,
) -> list[Score]:
    """Return the same scores without values; hint as of `scores.missing`."""
    return [
        missing(
            PLACES[place] + name,
            reason,
            unit=unit,
            higher_is_better=better,
            status=status,
            hint=hint,
        )
        for name, (unit, better) in KINDS.items()
    ]


def chances(
    model: Choices, probabilities: Sequence[Tensor], baseline: Choices | None = None
) -> Score:
    """Return `calibration/chance_kl`: how far a model is from outcomes whose chances are known.

    In `detail`: the calibration error, the over-confidence gap and the Brier score above its least
    over the true chances, so that no draw of outcomes stands between.

    probabilities  per document the true chance of each outcome, [choices]; none is 0
    """

    def off(found: Choices) -> Tensor:
        values = [
            float((true.double() * (true.double().log() - log_p)).sum())
            for true, log_p in zip(probabilities, found.log_probabilities(), strict=True)
        ]
        return torch.tensor(values, dtype=torch.float64)

    ours = off(model)
    theirs = None if baseline is None else off(baseline)
    return measured(
        "calibration/chance_kl",
        float(ours.mean()),
        unit="nats",
        higher_is_better=False,
        ci95=estimates.bootstrap_mean(ours, low=0.0),
        n=len(ours),
        baseline=None if theirs is None else float(theirs.mean()),
        delta_ci95=None if theirs is None else estimates.bootstrap_mean(ours - theirs),
        detail={
            "task": model.task,
            "of": "KL(true chances || model's, given the outcomes)",
            **_against(model, probabilities),
            "baseline": None if baseline is None else _against(baseline, probabilities),
        },
    )


def _against(found: Choices, probabilities: Sequence[Tensor]) -> dict[str, float]:
    """Return figures over the true chances of outcomes, in place of outcomes drawn from them."""
    rows = []
    for true, log_p in zip(probabilities, found.log_probabilities(), strict=True):
        p, chance = log_p.exp(), true.double()
        taken = int(p.argmax())
        rows.append([float(p[taken]), float(chance[taken]), float((p - chance).square().sum())])
    sure, chance, apart = torch.tensor(rows, dtype=torch.float64).unbind(1)
    bins = reliability.equal_width(sure)
    return {
        "ece": reliability.calibration_error(sure, chance, bins),
        "overconfidence_gap": float((sure - chance).mean()),
        "brier_above_least": float(apart.mean()),
    }


def _heat(
    logits: Tensor, gold: Tensor, unit: Tensor, units: int, grid: tuple[float, ...]
) -> Heated:
    """Sum per unit what predictions come to at each temperature; logits [predictions, choices]."""
    size = (units, len(grid))
    nll = torch.zeros(size, dtype=torch.float64)
    counts = torch.zeros(*size, reliability.BINS, dtype=torch.float64)
    gaps = torch.zeros_like(counts)
    best, taken = logits.max(-1)
    goal = logits.gather(-1, gold[:, None])[:, 0]
    right = (taken == gold).double().cpu()
    for column, heat in enumerate(grid):
        total = torch.logsumexp(logits / heat, -1)
        confidence = (best / heat - total).double().exp().cpu()
        bins = reliability.equal_width(confidence)
        nll[:, column].index_add_(0, unit, (total - goal / heat).double().cpu())
        place = (unit, torch.full_like(unit, column), bins)
        counts.index_put_(place, torch.ones_like(confidence), accumulate=True)
        gaps.index_put_(place, confidence - right, accumulate=True)
    return Heated(grid, nll, counts, gaps)


def _added(parts: Sequence[Heated]) -> Heated:
    return Heated(
        parts[0].grid,
        torch.stack([own.nll for own in parts]).sum(0),
        torch.stack([own.counts for own in parts]).sum(0),
        torch.stack([own.gaps for own in parts]).sum(0),
    )


def _columns(found: Predictions) -> tuple[Tensor, ...]:
    return found.confidence, found.nll, found.brier, found.entropy


def _score(name: str, value: float, ours: Seen, **rest: Any) -> Score:
    unit, better = KINDS[name.rpartition("/")[2].removeprefix("token_")]
    rest["detail"] = {**ours.detail, **rest.get("detail", {})}
    return measured(
        name, value, unit=unit, higher_is_better=better, n=ours.predictions.units, **rest
    )


def _error(name: str, ours: Seen, theirs: Seen | None, *, adaptive: bool) -> Score:
    define = reliability.ace if adaptive else reliability.ece
    cut = reliability.equal_mass if adaptive else reliability.equal_width

    def whole(seen: Seen) -> tuple[float, tuple[float, float], Tensor]:
        found = seen.predictions
        bins, value = cut(found.confidence), define(found)
        return (
            value,
            reliability.error_interval(found, bins, value),
            reliability.influence(found, bins),
        )

    value, interval, moved = whole(ours)
    detail: dict[str, Any] = {"bins": reliability.BINS}
    if not adaptive:
        detail["diagram"] = reliability.diagram(ours.predictions)
    if theirs is None:
        return _score(name, value, ours, ci95=interval, detail=detail)
    base, other, also = whole(theirs)
    if not adaptive:
        detail["baseline_diagram"] = reliability.diagram(theirs.predictions)
    both = torch.corrcoef(torch.stack([moved, also]))[0, 1] if moved.numel() > 1 else moved.sum()
    correlation = float(both) if math.isfinite(float(both)) else 0.0
    delta = reliability.apart(value, interval, base, other, correlation)
    return _score(name, value, ours, ci95=interval, baseline=base, delta_ci95=delta, detail=detail)


def _mean(name: str, ours: Seen, theirs: Seen | None, of: Any, low: float, high: float) -> Score:
    def units(seen: Seen) -> Tensor:
        return seen.predictions.per_unit(of(seen.predictions))

    mine = units(ours)
    other = None if theirs is None else units(theirs)
    return _score(
        name,
        float(mine.mean()),
        ours,
        ci95=estimates.bootstrap_mean(mine, low=low, high=high),
        baseline=None if other is None else float(other.mean()),
        delta_ci95=None if other is None else estimates.bootstrap_mean(mine - other),
    )


def _aurc(name: str, ours: Seen, theirs: Seen | None) -> Score:
    def area(seen: Seen, weights: Tensor | None) -> Tensor:
        found = seen.predictions
        if weights is None:
            return reliability.aurc(found.confidence, found.right)
        step = max(1, CHUNK // found.unit.numel())
        parts = [
            reliability.aurc(found.confidence, found.right, rows[:, found.unit])
            for rows in weights.split(step)
        ]
        return torch.cat(parts)

    units = ours.predictions.units
    draws = estimates.DRAWS if units == ours.predictions.unit.numel() else TOKEN_DRAWS
    ci95 = estimates.bootstrap(
        lambda weights: area(ours, weights), units, draws=draws, low=0.0, high=1.0
    )
    value = float(area(ours, None)[0])
    if theirs is None:
        return _score(name, value, ours, ci95=ci95)
    delta = estimates.bootstrap(
        lambda weights: area(ours, weights) - area(theirs, weights), units, draws=draws
    )
    base = float(area(theirs, None)[0])
    return _score(name, value, ours, ci95=ci95, baseline=base, delta_ci95=delta)


def _entropy(name: str, ours: Seen, theirs: Seen | None) -> Score:
    unit, better = KINDS["entropy_ratio"]
    mine = ours.predictions.per_unit(ours.predictions.entropy)
    if theirs is None:
        return missing(name, "no baseline was given", unit=unit, higher_is_better=better)
    other = theirs.predictions.per_unit(theirs.predictions.entropy)
    if not float(other.sum()) > 0:
        reason = "the baseline has no doubt at all"
        return missing(name, reason, unit=unit, higher_is_better=better, status="unmeasurable")
    estimate = estimates.ratio(mine, other)
    return _score(
        name,
        estimate.value,
        ours,
        ci95=estimate.interval(low=0.0),
        detail={"entropy": float(mine.mean()), "baseline_entropy": float(other.mean())},
    )


def _temperature(name: str, ours: Seen, theirs: Seen | None) -> Score:
    unit, better = KINDS["temperature"]
    units = ours.predictions.units
    if units < 4:
        reason = f"{units} documents or windows are too few to fit on one half"
        return missing(name, reason, unit=unit, higher_is_better=better, status="unmeasurable")
    order = torch.randperm(units, generator=torch.Generator().manual_seed(0))
    fit, judge = order[: units // 2], order[units // 2 :]
    heated = ours.heated
    grid = torch.tensor(heated.grid, dtype=torch.float64)
    column = int(heated.nll[fit].sum(0).argmin())
    plain = heated.grid.index(1.0)

    def judged(at: int) -> dict[str, float]:
        count = heated.counts[judge, at].sum()
        gaps = heated.gaps[judge, at].sum(0).abs().sum()
        return {"nll": float(heated.nll[judge, at].sum() / count), "ece": float(gaps / count)}

    ci95 = estimates.bootstrap(
        lambda weights: grid[(weights @ heated.nll[fit]).argmin(1)], len(fit), smooth=False
    )
    return _score(
        name,
        heated.grid[column],
        ours,
        ci95=ci95,
        baseline=None if theirs is None else theirs.heated.grid[_best(theirs, fit)],
        detail={
            "suggestion": heated.grid[column],
            "fitted_on": len(fit),
            "judged_on": len(judge),
            "before": judged(plain),
            "after": judged(column),
        },
    )


def _best(seen: Seen, fit: Tensor) -> int:
    return int(seen.heated.nll[fit].sum(0).argmin())

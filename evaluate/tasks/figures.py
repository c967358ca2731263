"""The scores of tasks: lm-eval's figures with intervals over documents, paired with the baseline.

A figure that is a share of documents has Wilson's interval and Tango's for the difference; any
other mean is resampled; a perplexity has the interval of its logarithm. What a figure is worth
beside guessing stands in `detail` as `retention_above_chance`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unicomp.evaluate.scores import Score, measured, missing
from unicomp.evaluate.statistics import proportions
from unicomp.evaluate.statistics.estimates import (
    CONFIDENCE,
    Estimate,
    Interval,
    bootstrap_mean,
    exponential,
    log_ratio,
    mean,
    paired_difference,
    ratio,
    scaled,
)
from unicomp.evaluate.tasks.choices import Choices
from unicomp.evaluate.tasks.result import Metric, Result

LN2 = float(torch.tensor(2.0, dtype=torch.float64).log())
CHANCES = "kl_from_truth"  # of a task whose outcomes' chances are known: no accuracy
UNITS = {"likelihood_diff": "nats", "bits_per_byte": "bits/byte"}
GUESSED = ("acc", "acc_norm", "acc_bytes", "exact_match")  # what guessing gets a share of


def scores(
    results: Sequence[Result], base: Sequence[Result] | None, detail: Mapping[str, Any]
) -> list[Score]:
    """Return `accuracy/<task>/<metric>` for every figure of these tasks.

    base    the baseline's results of the same tasks on the same documents
    detail  how they were run
    """
    theirs = {} if base is None else {result.name: result for result in base}
    ours = {result.name: result for result in results}
    found = []
    for result in results:
        other = theirs.get(result.name)
        if other is not None and other.ids != result.ids:
            raise ValueError(f"`{result.name}`: model and baseline ran other documents")
        said = {**detail, "version": result.version, "shots": result.shots}
        for name, metric in result.metrics.items():
            if name == CHANCES:
                continue
            pair = None if other is None else other.metrics.get(name)
            label = f"accuracy/{result.name}/{name}"
            if result.members:
                found.append(_of_group(label, name, result, metric, pair, ours, theirs, said))
            else:
                chance = _chance(result, name)
                found.append(_of_task(label, name, metric, pair, chance, said))
    return found


def questions(results: Sequence[Result]) -> list[Choices]:
    """Return the choices of the tasks that have a right answer, so that `acc` counts it."""
    found = []
    for result in results:
        if result.choices is not None and "acc" in result.metrics:
            found.append(result.choices)
    return found


def known_chances(results: Sequence[Result]) -> Choices | None:
    """Return the choices of the task whose outcomes' chances are known, if it was run."""
    for result in results:
        if CHANCES in result.metrics:
            return result.choices
    return None


def flips(results: Sequence[Result], base: Sequence[Result] | None) -> Score:
    """Return `fidelity/flips`: the share of questions that are answered otherwise than before.

    In `detail`: how many right answers became wrong, wrong ones right, and wrong ones wrong in
    another way. Accuracy only shows the first two against each other.
    """
    name, unit = "fidelity/flips", "fraction"
    chosen = questions(results)
    if base is None or not chosen:
        reason = "no baseline was given" if base is None else "no task has choices"
        return missing(name, reason, unit=unit, higher_is_better=False)
    theirs = {own.task: own for own in questions(base)}
    changed, lost, gained = [], 0, 0
    for own in chosen:
        before = theirs[own.task]
        if own.ids != before.ids:
            raise ValueError(f"`{own.task}`: model and baseline ran other documents")
        now, then, gold = own.answers(), before.answers(), own.gold
        changed.append(now != then)
        lost += int(((then == gold) & (now != gold)).sum())
        gained += int(((then != gold) & (now == gold)).sum())
    all_ = torch.cat(changed)
    return proportions.share(
        name,
        all_,
        higher_is_better=False,
        unit=unit,
        detail={
            "tasks": [own.task for own in chosen],
            "right_to_wrong": lost,
            "wrong_to_right": gained,
            "wrong_to_wrong": int(all_.sum()) - lost - gained,
        },
    )


def _chance(result: Result, metric: str) -> float | None:
    """Return what guessing gets, where that is one over the number of choices."""
    if result.choices is None or result.choices.right is not None or metric not in GUESSED:
        return None
    return result.choices.chance()


def _of_task(
    label: str,
    name: str,
    metric: Metric,
    other: Metric | None,
    chance: float | None,
    detail: Mapping[str, Any],
) -> Score:
    values = torch.tensor(metric.values, dtype=torch.float64)
    theirs = None if other is None else torch.tensor(other.values, dtype=torch.float64)
    if metric.kind == "mean" and _yes_or_no(values) and (theirs is None or _yes_or_no(theirs)):
        return proportions.share(
            label,
            values.bool(),
            None if theirs is None else theirs.bool(),
            higher_is_better=metric.higher_is_better,
            chance=chance,
            detail=detail,
        )
    if metric.kind in ("perplexity", "bits"):
        return _of_text(label, name, metric, other, detail)
    known = dict(detail)
    ci95 = delta = None
    if metric.kind == "mean":
        ci95 = bootstrap_mean(values)
        delta = None if theirs is None else bootstrap_mean(values - theirs)
    else:
        known["note"] = "no interval: it is no mean over documents"
    return _measured(label, name, metric, other, ci95, delta, len(values) or None, known)


def _of_text(
    label: str, name: str, metric: Metric, other: Metric | None, detail: Mapping[str, Any]
) -> Score:
    """Return the score of a perplexity, or of bits per byte, over documents."""
    ours = _log(metric)
    known = {**detail, "stderr": None}
    if metric.kind == "bits":
        estimate = scaled(ours, 1 / LN2)
        ci95 = estimate.interval(low=0.0)
        theirs = None if other is None else scaled(_log(other), 1 / LN2)
    else:
        estimate = exponential(ours)
        ci95 = _exp(ours.interval())
        theirs = None if other is None else exponential(_log(other))
    known["stderr"] = estimate.stderr
    delta = None if theirs is None else paired_difference(estimate, theirs).interval()
    if theirs is not None and estimate.value > 0 and theirs.value > 0:
        # Lower is better: what is kept is the baseline over the model.
        known["retention"] = {
            "value": theirs.value / estimate.value,
            "ci95": _exp(log_ratio(theirs, estimate).interval()),
        }
    return _measured(label, name, metric, other, ci95, delta, len(metric.values), known)


def _of_group(
    label: str,
    name: str,
    group: Result,
    metric: Metric,
    other: Metric | None,
    ours: Mapping[str, Result],
    theirs: Mapping[str, Result],
    detail: Mapping[str, Any],
) -> Score:
    """Return the score of a mean over tasks; each task's documents are a sample of their own."""
    mine = _weighted(group, name, ours)
    known = {**detail, "tasks": len(group.members)}
    if mine is None:
        return _measured(label, name, metric, other, None, None, None, known)
    delta = None
    if other is not None and (before := _weighted(group, name, theirs)) is not None:
        delta = paired_difference(mine, before).interval()
    ci95 = mine.interval()
    return _measured(label, name, metric, other, ci95, delta, mine.influence.numel(), known)


def _weighted(group: Result, name: str, results: Mapping[str, Result]) -> Estimate | None:
    """Estimate the weighted mean of the tasks' means; None where a task has no such documents."""
    total, value, influence = 0, 0.0, []
    for task, weight in group.members.items():
        own = results[task].metrics.get(name)
        if own is None or own.kind != "mean":
            return None
        values = torch.tensor(own.values, dtype=torch.float64)
        estimate = mean(values)
        total += values.numel()
        value += weight * estimate.value
        # A document moves its task's mean by 1/n of its own, and so the whole by weight/n.
        influence.append(estimate.influence * weight / values.numel())
    return Estimate(value, torch.cat(influence) * total)


def _measured(
    label: str,
    name: str,
    metric: Metric,
    other: Metric | None,
    ci95: Interval | None,
    delta: Interval | None,
    n: int | None,
    detail: Mapping[str, Any],
) -> Score:
    known = dict(detail)
    if other is not None and "retention" not in known:
        over, under = (metric, other) if metric.higher_is_better else (other, metric)
        if under.value != 0:
            known["retention"] = {"value": over.value / under.value, "ci95": None}
    return measured(
        label,
        metric.value,
        unit=UNITS.get(name, "perplexity" if metric.kind == "perplexity" else "mean"),
        higher_is_better=metric.higher_is_better,
        ci95=ci95,
        n=n,
        baseline=None if other is None else other.value,
        delta_ci95=delta,
        detail={**known, "confidence": CONFIDENCE},
    )


def _log(metric: Metric) -> Estimate:
    """Estimate the negative log-likelihood per word or byte."""
    values = torch.tensor(metric.values, dtype=torch.float64)
    return ratio(-values, torch.tensor(metric.weights, dtype=torch.float64))


def _exp(interval: Interval | None) -> Interval | None:
    if interval is None or interval[1] > 700:  # exp of which no float holds
        return None
    low, high = torch.tensor(interval, dtype=torch.float64).exp().tolist()
    return low, high


def _yes_or_no(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())

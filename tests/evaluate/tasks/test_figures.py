"""The scores of tasks, against numpy and by hand; other documents are refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from unicomp.evaluate.tasks import figures
from unicomp.evaluate.tasks.choices import Choices
from unicomp.evaluate.tasks.result import Metric, Result


def choices(name: str, picks: list[int], gold: list[int]) -> Choices:
    """Two choices a document, of which the picked is the likelier."""
    values = [torch.tensor([-1.0 - pick, -2.0 + pick]).double() for pick in picks]
    ids = [str(at) for at in range(len(picks))]
    return Choices(name, values, [torch.tensor([1, 1])] * len(picks), torch.tensor(gold), ids)


def questions(name: str, picks: list[int], gold: list[int]) -> Result:
    right = tuple(float(a == b) for a, b in zip(picks, gold, strict=True))
    metric = Metric(sum(right) / len(right), True, "mean", right)
    found = choices(name, picks, gold)
    return Result(name, "1", 0, {"acc": metric}, tuple(found.ids), found, None, {})


def text(values: list[float], words: list[float]) -> Result:
    nll = -sum(values) / sum(words)
    metrics = {
        "word_perplexity": Metric(math.exp(nll), False, "perplexity", (*values,), (*words,)),
        "bits_per_byte": Metric(nll / math.log(2), False, "bits", (*values,), (*words,)),
    }
    ids = tuple(str(at) for at in range(len(values)))
    return Result("text", "1", 0, metrics, ids, None, None, {})


GOLD = [0, 1] * 20
OURS = [0] * 30 + [1, 0] * 5
THEIRS = GOLD[:35] + [1 - one for one in GOLD[35:]]


def test_a_share_has_wilsons_interval_and_is_paired() -> None:
    ours, theirs = questions("q", OURS, GOLD), questions("q", THEIRS, GOLD)
    (score,) = figures.scores([ours], [theirs], {"batch_size": 4})
    right = np.array(OURS) == np.array(GOLD)
    before = np.array(THEIRS) == np.array(GOLD)
    assert score.name == "accuracy/q/acc"
    assert score.value == right.mean()
    assert score.baseline == before.mean()
    pairs = score.detail["pairs"]
    assert pairs["baseline_only"] == (before & ~right).sum()
    assert pairs["model_only"] == (right & ~before).sum()
    assert score.detail["retention"]["value"] == pytest.approx(right.mean() / before.mean())
    above = score.detail["retention_above_chance"]
    assert above["value"] == pytest.approx((right.mean() - 0.5) / (before.mean() - 0.5))
    assert score.detail["batch_size"] == 4
    assert score.ci95 is not None
    assert 0 < score.ci95[0] < score.value < score.ci95[1] < 1


def test_flips_are_counted_in_both_directions() -> None:
    ours, theirs = questions("q", OURS, GOLD), questions("q", THEIRS, GOLD)
    score = figures.flips([ours], [theirs])
    now, then, gold = np.array(OURS), np.array(THEIRS), np.array(GOLD)
    assert score.value == (now != then).mean()
    assert score.detail["right_to_wrong"] == ((then == gold) & (now != gold)).sum()
    assert score.detail["wrong_to_right"] == ((then != gold) & (now == gold)).sum()
    assert score.detail["wrong_to_wrong"] == 0  # there is one wrong answer of two
    same = figures.flips([ours], [ours])
    assert same.value == 0
    assert figures.flips([ours], None).detail["reason"] == "no baseline was given"
    alone = figures.flips([text([-1.0], [1.0])], [text([-1.0], [1.0])])
    assert alone.status == "skipped"


def studentized(values: np.ndarray) -> tuple[float, float]:
    """Return the 95% studentized bootstrap interval of a mean; float64 [units]."""
    drawn = np.random.default_rng(9).choice(values, size=(50_000, values.size))
    t = (drawn.mean(1) - values.mean()) / drawn.std(1)
    below, above = np.quantile(t, [0.025, 0.975])
    return values.mean() - above * values.std(), values.mean() - below * values.std()


def test_a_mean_that_is_no_share_is_resampled() -> None:
    values = tuple(np.random.default_rng(0).uniform(size=50))
    metric = Metric(float(np.mean(values)), True, "mean", values)
    ids = tuple(map(str, range(50)))
    ours = Result("mc2", "1", 0, {"acc": metric}, ids, None, None, {})
    lower = replace(metric, value=metric.value - 0.1, values=tuple(v - 0.1 for v in values))
    (score,) = figures.scores([ours], [replace(ours, metrics={"acc": lower})], {})
    expected = studentized(np.array(values))
    # Three deviations of an end from 2,000 draws: sqrt(0.025 0.975 / 2000) over the density there.
    near = 3 * math.sqrt(0.025 * 0.975 / 2000) / 0.0584 * np.std(values) / math.sqrt(50)
    assert score.ci95 == pytest.approx(expected, abs=near)
    narrow = [metric.value + 0.8 * (end - metric.value) for end in expected]
    assert score.ci95 != pytest.approx(narrow, abs=near)  # a fifth less is seen
    assert score.delta_ci95 == pytest.approx((0.1, 0.1), abs=1e-9)
    assert "retention_above_chance" not in score.detail


def evened(away: float, influence: NDArray[np.float64]) -> float:
    """Return Hall's cubic of a studentized mean, whose ends of an interval are Student's t."""
    centred = influence - influence.mean()
    skewness = (centred**3).mean() / (centred**2).mean() ** 1.5 / math.sqrt(len(influence))
    return float(away + skewness * away**2 / 3 + skewness**2 * away**3 / 27 + skewness / 6)


def test_perplexities_have_intervals_over_documents() -> None:
    random = np.random.default_rng(1)
    words = random.integers(5, 50, size=40).astype(float)
    values = -words * random.uniform(1, 2, size=40)
    ours, theirs = text([*values], [*words]), text([*(values * 0.9)], [*words])
    perplexity, bits = figures.scores([ours], [theirs], {})
    nll = -values.sum() / words.sum()
    influence = (-values - nll * words) / words.mean()
    error = influence.std(ddof=1) / math.sqrt(40)
    assert perplexity.detail["stderr"] == pytest.approx(math.exp(nll) * error)
    assert bits.detail["stderr"] == pytest.approx(error / math.log(2))
    low, high = perplexity.ci95 or (0, 0)
    for end, quantile in ((low, 2.0227), (high, -2.0227)):
        away = (nll - math.log(end)) / error
        assert evened(away, influence) == pytest.approx(quantile, rel=1e-3)
    kept = perplexity.detail["retention"]
    assert kept["value"] == pytest.approx(math.exp(0.9 * nll) / math.exp(nll))
    assert kept["ci95"][0] < kept["value"] < kept["ci95"][1]
    assert not perplexity.higher_is_better


def test_a_groups_tasks_count_as_the_group_says() -> None:
    small, large = questions("s", OURS[:10], GOLD[:10]), questions("l", THEIRS, GOLD)
    means = [one.metrics["acc"].value for one in (small, large)]
    for weights in ({"s": 0.5, "l": 0.5}, {"s": 0.2, "l": 0.8}):
        value = sum(weight * mean for weight, mean in zip(weights.values(), means, strict=True))
        metric = Metric(value, True, "mean", ())
        group = Result("g", "1", 0, {"acc": metric}, (), None, None, weights)
        score = figures.scores([small, large, group], [small, large, group], {})[-1]
        variance, influence = 0.0, []
        for name, one in (("s", small), ("l", large)):
            values = np.array(one.metrics["acc"].values)
            variance += weights[name] ** 2 * values.var(ddof=0) / len(values)
            influence += [*(weights[name] * (values - values.mean()) / len(values))]
        assert score.ci95 is not None
        for end, quantile in zip(score.ci95, (2.01, -2.01), strict=True):
            away = (value - end) / math.sqrt(variance)
            assert evened(away, np.array(influence)) == pytest.approx(quantile, rel=0.02)
        assert (score.name, score.n, score.delta) == ("accuracy/g/acc", 50, 0)
        assert score.detail["tasks"] == 2


def test_a_figure_that_is_no_mean_has_no_interval() -> None:
    metric = Metric(0.3, True, "other", ())
    result = Result("f1", "1", 0, {"f1": metric}, ("a",), None, None, {})
    (score,) = figures.scores([result], None, {})
    assert (score.value, score.ci95) == (0.3, None)
    assert "no interval" in score.detail["note"]


def test_chances_are_no_accuracy() -> None:
    own = questions("c", OURS, GOLD)
    known = replace(own, metrics={figures.CHANCES: own.metrics["acc"]})
    assert figures.scores([known], None, {}) == []
    assert figures.questions([own, known]) == [own.choices]
    assert figures.known_chances([own, known]) is known.choices
    assert figures.known_chances([own]) is None


def test_other_documents_are_refused() -> None:
    ours, theirs = questions("q", OURS, GOLD), questions("q", OURS[:5], GOLD[:5])
    with pytest.raises(ValueError, match="other documents"):
        figures.scores([ours], [theirs], {})
    with pytest.raises(ValueError, match="other documents"):
        figures.flips([ours], [theirs])


def test_results_come_back_from_json_as_they_were() -> None:
    import json

    for one in (questions("q", OURS, GOLD), text([-0.1, -1 / 3], [3.0, 7.0])):
        back = Result.from_json(json.loads(json.dumps(one.to_json())))
        assert back.metrics == one.metrics
        assert (back.name, back.ids, back.members) == (one.name, one.ids, one.members)
        if one.choices is not None and back.choices is not None:
            assert torch.equal(back.choices.gold, one.choices.gold)
            pairs = zip(back.choices.loglikelihoods, one.choices.loglikelihoods, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
            assert all(own.dtype == torch.float64 for own in back.choices.loglikelihoods)
    with pytest.raises((KeyError, TypeError, ValueError)):
        Result.from_json({"name": "q"})

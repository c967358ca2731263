"""Calibration scores: from choices, from logits as they pass, and against known chances."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from unicomp import builtin
from unicomp.evaluate import calibration
from unicomp.evaluate.scores import Score
from unicomp.evaluate.statistics import reliability
from unicomp.evaluate.tasks.choices import Choices
from unicomp.kernels.load import load
from unicomp.text import tokenizer as read_tokenizer

TIMES = 240  # outcomes of each prompt


def choices(logits: list[Tensor], gold: Tensor, task: str = "t") -> Choices:
    lengths = [torch.ones(len(own), dtype=torch.int64) for own in logits]
    return Choices(task, logits, lengths, gold, [f"{task}{i}" for i in range(len(logits))])


def sampled(n: int, heat: float, seed: int = 0) -> Choices:
    """Documents answered by the model's own chances, then made surer by `heat`."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(2 + i % 3, generator=generator).double() * 2 for i in range(n)]
    gold = [int(torch.multinomial(own.softmax(0), 1, generator=generator)) for own in logits]
    return choices([own * heat for own in logits], torch.tensor(gold))


def named(found: list[Score]) -> dict[str, Score]:
    return {score.name.partition("/")[2]: score for score in found}


def test_every_score_of_choices_beside_a_baseline() -> None:
    ours, theirs = (
        calibration.of_choices([sampled(600, 2.0)]),
        calibration.of_choices([sampled(600, 1.0)]),
    )
    assert ours is not None
    assert theirs is not None
    found = named(calibration.scores(ours, theirs))
    assert list(found) == list(calibration.KINDS)
    assert all(score.status == "measured" and score.n == 600 for score in found.values())
    for name in ("ece", "ace", "nll", "overconfidence_gap"):
        assert (found[name].delta or 0) > 0, name
        assert name == "ace" or (found[name].delta_ci95 or (0, 0))[0] > 0, name
    assert (found["ece"].ci95 or (0, 0))[0] > 0
    hot, plain = (
        sum(float(-(log.exp() * log).sum()) for log in sampled(600, heat).log_probabilities())
        for heat in (2.0, 1.0)
    )
    assert found["entropy_ratio"].value == pytest.approx(hot / plain, rel=1e-9)
    heat = found["temperature"]
    assert heat.value == pytest.approx(2.0, rel=0.2)
    assert (heat.ci95 or (0, 0))[0] <= 2.0 <= (heat.ci95 or (0, 0))[1]
    assert heat.baseline == pytest.approx(1.0, rel=0.2)
    assert heat.detail["after"]["nll"] < heat.detail["before"]["nll"]
    assert heat.detail["after"]["ece"] < heat.detail["before"]["ece"]
    assert heat.detail["fitted_on"] == heat.detail["judged_on"] == 300
    bars = found["ece"].detail["diagram"]
    assert sum(bar["count"] for bar in bars) == 600
    assert found["ece"].detail["baseline_diagram"] != bars
    json.dumps([score.model_dump(mode="json") for score in found.values()], allow_nan=False)


def test_a_model_beside_itself_does_not_differ() -> None:
    own = calibration.of_choices([sampled(80, 1.0), sampled(40, 1.5, seed=1)])
    assert own is not None
    for name, score in named(calibration.scores(own, own)).items():
        if name == "entropy_ratio":
            assert score.value == 1
            continue
        assert score.delta == 0
        if score.delta_ci95 is not None:
            assert score.delta_ci95[0] <= 0 <= score.delta_ci95[1]


def test_alone_there_is_nothing_to_compare_with() -> None:
    own = calibration.of_choices([sampled(40, 1.0)])
    assert own is not None
    found = named(calibration.scores(own, None))
    assert found["entropy_ratio"].status == "skipped"
    assert found["ece"].baseline is None


def test_what_cannot_be_measured() -> None:
    assert calibration.of_choices([]) is None
    several = Choices(
        "mc2",
        [torch.zeros(2)],
        [torch.ones(2)],
        torch.tensor([0]),
        ["a"],
        right=[torch.tensor([True, True])],
    )
    assert calibration.of_choices([several]) is None
    few = calibration.of_choices([sampled(3, 1.0)])
    assert few is not None
    assert named(calibration.scores(few, None))["temperature"].status == "unmeasurable"
    broken = calibration.of_choices([choices([torch.tensor([math.nan, 0.0])], torch.tensor([0]))])
    assert broken is not None
    assert {score.status for score in calibration.scores(broken, None)} == {"unmeasurable"}
    one, two = calibration.of_choices([sampled(8, 1.0)]), calibration.of_choices([sampled(9, 1.0)])
    assert one is not None
    with pytest.raises(ValueError, match="same predictions"):
        calibration.scores(one, two)
    assert {score.status for score in calibration.skipped("no tasks")} == {"skipped"}


def test_tokens_are_what_choices_over_the_vocabulary_would_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logits, targets = 3 * torch.randn(6, 20, 11), torch.randint(11, (6, 20))
    watch = calibration.TokenWatch()
    monkeypatch.setattr(calibration, "CHUNK", 70)  # several parts a window
    watch.add(logits[:4], targets[:4])
    watch.add(logits[4:], targets[4:])
    seen = watch.seen({"text": "x"})
    flat = [row.double() for row in logits.flatten(0, 1)]
    plain = calibration.of_choices([choices(flat, targets.flatten())])
    assert plain is not None
    for name in ("confidence", "right", "nll", "brier", "entropy"):
        ours, theirs = getattr(seen.predictions, name), getattr(plain.predictions, name)
        assert torch.allclose(ours, theirs, atol=1e-9), name
    assert seen.predictions.units == 6
    at, other = calibration.TOKEN_GRID.index(2.0), calibration.CHOICE_GRID.index(2.0)
    assert float(seen.heated.nll[:, at].sum()) == pytest.approx(
        float(plain.heated.nll[:, other].sum()), rel=1e-6
    )
    assert torch.equal(seen.heated.counts.sum(0)[at], plain.heated.counts.sum(0)[other])
    found = calibration.scores(seen, seen, place="tokens")
    assert found[0].name == "calibration/token_ece"
    assert all(score.n == 6 for score in found)
    assert found[0].value == pytest.approx(reliability.ece(plain.predictions), abs=1e-9)


def _chances() -> tuple[Choices, list[Tensor]]:
    """Return tinyworld's likelihoods of outcomes, and their true chances."""
    rows = [
        json.loads(line)
        for line in builtin.heldout("chances.jsonl").read_text("utf-8").splitlines()
    ]
    folder = builtin.model("tinyworld")
    model, tokenizer = load(folder), read_tokenizer(folder)
    found = []
    for row in rows:
        values = []
        for outcome in row["outcomes"]:
            prompt = tokenizer(row["prompt"])["input_ids"]
            end = tokenizer(outcome, add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                out = model(input_ids=torch.tensor([prompt + end])).logits[0].double()
            log_p = out.log_softmax(-1)[len(prompt) - 1 : -1]
            values.append(float(log_p.gather(1, torch.tensor(end)[:, None]).sum()))
        found.append(torch.tensor(values, dtype=torch.float64))
    gold = torch.zeros(len(rows), dtype=torch.int64)
    true = [torch.tensor(row["probabilities"], dtype=torch.float64) for row in rows]
    return choices(found, gold), true


@pytest.fixture(scope="module")
def known() -> tuple[Choices, list[Tensor]]:
    return _chances()


def test_tinyworld_has_its_published_distance_from_the_known_chances(
    known: tuple[Choices, list[Tensor]],
) -> None:
    model, true = known
    surer = choices([2 * own for own in model.loglikelihoods], model.gold)
    score = calibration.chances(surer, true, model)
    assert score.baseline == pytest.approx(0.0111, abs=2e-4)
    assert (score.value or 0) > 0.02
    assert (score.delta_ci95 or (0, 0))[0] > 0
    exact = choices([own.log() for own in true], model.gold)
    assert calibration.chances(exact, true).value == pytest.approx(0, abs=1e-12)


def counted(true: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return outcomes in which each chance is met exactly, and those chances.

    `TIMES` outcomes of every prompt, as many of each kind as its chance says, rounded.
    """
    gold, shares = [], []
    for own in true:
        counts = (own * TIMES).round().long()
        counts[own.argmax()] += TIMES - counts.sum()
        gold.append(torch.arange(len(own)).repeat_interleave(counts))
        shares.append(counts.double() / TIMES)
    return torch.cat(gold), shares


def expected(logits: list[Tensor], true: list[Tensor]) -> dict[str, float]:
    """Return what the figures are where outcomes have these chances, in closed form."""
    sure, chance, nll, brier = [], [], [], []
    for own, p in zip(logits, true, strict=True):
        q = own.softmax(0)
        sure.append(float(q.max()))
        chance.append(float(p[int(q.argmax())]))
        nll.append(-float((p * q.log()).sum()))
        brier.append(float((q * q).sum() - 2 * (p * q).sum() + 1))
    gap = np.array(sure) - np.array(chance)
    place = np.minimum(np.array(sure) * 10 // 1, 9)
    bins = [abs(gap[place == at].sum()) for at in range(10)]
    means = {"nll": np.mean(nll), "brier": np.mean(brier), "overconfidence_gap": gap.mean()}
    return {"ece": sum(bins) / len(gap)} | {name: float(own) for name, own in means.items()}


def off(found: dict[str, Score], known: dict[str, float]) -> set[str]:
    """Return the figures that are not what is known."""
    return {name for name, own in known.items() if abs((found[name].value or 0) - own) > 1e-9}


@pytest.mark.slow
@pytest.mark.parametrize("heat", [1.0, 2.5, 0.4], ids=["model", "too sure", "not sure enough"])
def test_figures_are_those_of_the_known_chances(
    known: tuple[Choices, list[Tensor]], heat: float
) -> None:
    """Every figure is what the true chances say, and one temperature off is seen in each."""
    model, true = known
    gold, shares = counted(true)
    assert max(float((a - b).abs().max()) for a, b in zip(true, shares, strict=True)) < 2 / TIMES

    def figures(heat: float) -> dict[str, Score]:
        many = [heat * own for own in model.loglikelihoods for _ in range(TIMES)]
        seen = calibration.of_choices([choices(many, gold)])
        assert seen is not None
        return named(calibration.scores(seen, None))

    truth = expected([heat * own for own in model.loglikelihoods], shares)
    found = figures(heat)
    assert off(found, truth) == set()
    assert off(figures(1.05 * heat), truth) == set(truth)  # a planted temperature
    wrong = [own.flip(0) for own in shares]
    assert off(found, expected([heat * own for own in model.loglikelihoods], wrong)) == set(truth)
    # The suggested temperature is the one that the true chances like best, but for one step of its
    # grid: it is fitted on half of the outcomes.
    grid = calibration.CHOICE_GRID
    nll = [expected([heat * own / t for own in model.loglikelihoods], shares)["nll"] for t in grid]
    assert abs(grid.index(found["temperature"].value or 0) - int(np.argmin(nll))) <= 1
    assert (truth["ece"] < 0.05) == (heat == 1.0)
    assert (truth["overconfidence_gap"] > 0.05) == (heat > 1)
    assert (truth["overconfidence_gap"] < -0.05) == (heat < 1)


def test_what_is_said_beside_the_distance_is_over_the_true_chances(
    known: tuple[Choices, list[Tensor]],
) -> None:
    model, true = known
    surer = choices([2.5 * own for own in model.loglikelihoods], model.gold)
    detail = calibration.chances(surer, true, model).detail
    for said, logits in ((detail, surer), (detail["baseline"], model)):
        truth = expected(logits.loglikelihoods, true)
        least = expected([own.log() for own in true], true)["brier"]
        assert said["ece"] == pytest.approx(truth["ece"], abs=1e-9)
        assert said["overconfidence_gap"] == pytest.approx(truth["overconfidence_gap"], abs=1e-9)
        assert said["brier_above_least"] == pytest.approx(truth["brier"] - least, abs=1e-9)
    assert detail["ece"] > detail["baseline"]["ece"]
    exact = calibration.chances(choices([own.log() for own in true], model.gold), true).detail
    assert exact["ece"] == pytest.approx(0, abs=1e-12)
    assert exact["brier_above_least"] == pytest.approx(0, abs=1e-12)

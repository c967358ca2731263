"""Tasks that fail leave the others; what is done is kept, and used by the same command again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from unicomp.errors import UnicompError
from unicomp.evaluate.score import score
from unicomp.evaluate.scores import Report, failures
from unicomp.evaluate.tasks import harness, runs, scratch

ROWS = [
    {"prompt": f"the dog saw {n}", "choices": [" cat", " the moon"], "answer": n % 2}
    for n in range(12)
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where interrupted scores keep their results."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Path:
    """A tiny llama."""
    return tiny_model("llama")


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Questions of one's own."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def task(path: Path, name: str, functions: str, **more: str) -> Path:
    """Write a task whose functions are the given Python, and return its file."""
    (path / f"{name}_functions.py").write_text(functions)
    lines = {
        "task": name,
        "custom_dataset": "!function unicomp.evaluate.tasks.rows.load",
        "dataset_kwargs": f'{{file: "{path / "mine.jsonl"}"}}',
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "process_results": f"!function {name}_functions.process",
        "metric_list": "[{metric: acc, aggregation: mean, higher_is_better: true}]",
    } | more
    file = path / f"{name}.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return file


def accuracy(report: Report) -> dict[str, Any]:
    return {
        one.name: one for one in report.scores if one.axis == "accuracy" and one.name.count("/") > 1
    }


def test_rows_of_ones_own(llama: Path, tiny_model: Callable[..., Path], mine: Path) -> None:
    pairs = mine.with_name("pairs.jsonl")
    pairs.write_text('{"good": "the dog saw a cat", "bad": "dog cat the a"}\n' * 3)
    text = mine.with_name("text.txt")
    text.write_text("the dog saw a cat\n\nthe moon over the river\n")
    words = [str(mine), str(pairs), str(text)]
    report = score(tiny_model("llama", seed=1), llama, tasks=words, axes=["accuracy", "fidelity"])
    found = accuracy(report)
    assert set(found) == {
        "accuracy/mine/acc",
        "accuracy/mine/acc_norm",
        "accuracy/pairs/acc",
        "accuracy/text/word_perplexity",
        "accuracy/text/byte_perplexity",
        "accuracy/text/bits_per_byte",
    }
    own = found["accuracy/mine/acc"]
    assert (own.n, own.status) == (12, "measured")
    assert own.detail["retention_above_chance"]["chance"] == 0.5
    assert own.detail["version"] == "1.0"
    assert sum(own.detail["pairs"].values()) == 12
    flips = report.score("fidelity/flips")
    assert flips.n == 15
    assert flips.detail["tasks"] == ["mine", "pairs"]
    assert report.score("accuracy/perplexity").status == "skipped"
    assert report.score("fidelity/kl").detail["reason"] == "no text was given (`--text`)"
    json.dumps(report.to_json(), allow_nan=False)


def test_answers_of_ones_own_are_generated(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text('{"prompt": "the dog", "expected": "saw"}\n' * 2)
    report = score(llama, tasks=[str(file)], axes=["accuracy"])
    assert report.score("accuracy/answers/exact_match").value == 0


def test_a_task_that_fails_half_way_leaves_the_others(llama: Path, mine: Path) -> None:
    count = "def process(doc, results):\n    return {'acc': {}[doc['prompt']]}\n"
    broken = task(mine.parent, "broken", count)
    missing = task(mine.parent, "missing", count, dataset_kwargs='{file: "/nowhere/a.jsonl"}')
    report = score(llama, tasks=[str(broken), str(missing), str(mine)], axes=["accuracy"])
    found = accuracy(report)
    assert found["accuracy/mine/acc"].status == "measured"
    assert found["accuracy/broken/acc"].status == "unmeasurable"
    assert "KeyError: 'the dog saw 0'" in found["accuracy/broken/acc"].detail["reason"]
    assert "cannot read `/nowhere/a.jsonl`" in found["accuracy/missing/acc"].detail["reason"]
    failed = failures(report)
    assert sorted(failed.values()) == [["accuracy/broken/acc"], ["accuracy/missing/acc"]]
    assert {hint for _, hint in failed} == {runs.MEND, "give a `.jsonl` or `.txt` file in UTF-8"}


def test_logits_that_are_no_numbers(llama: Path, mine: Path, tmp_path: Path) -> None:
    """Argmax of NaN is the first choice, which would be a score."""
    folder = shutil.copytree(llama, tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"].fill_(torch.nan)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"prompt": "the dog", "expected": "saw"}\n')
    text = tmp_path / "text.txt"
    text.write_text("the dog saw a cat\n")
    report = score(folder, tasks=[str(mine), str(answers), str(text)], axes=["accuracy"])
    found = accuracy(report)
    assert len(found) == 3
    for one in found.values():
        assert (one.status, one.value) == ("unmeasurable", None)
        assert "NaN" in one.detail["reason"]


def test_words_that_are_no_task(llama: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"colour": "red"}\n')
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for word, said in (
        (tmp_path / "no.yaml", "no such file"),
        (odd, "`colour`"),
        (empty, "is empty"),
    ):
        with pytest.raises(UnicompError, match=said) as caught:
            score(llama, tasks=[str(word)])
        assert caught.value.hint
    with pytest.raises(UnicompError, match="unknown suite"):
        score(llama, suite="quik")


def test_an_interrupted_score_resumes_and_leaves_nothing(
    llama: Path, mine: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = mine.with_name("other.jsonl")
    other.write_text(mine.read_text())
    words = [str(mine), str(other)]
    whole = score(llama, tasks=words, axes=["accuracy"])
    assert not list(cache.rglob("*.json"))
    real, ran = harness.run, []

    def stops(lm: Any, loaded: Any, *rest: Any, **more: Any) -> Any:
        (name,) = loaded["tasks"]
        if name == "other" and stop:
            raise KeyboardInterrupt
        ran.append(name)
        return real(lm, loaded, *rest, **more)

    monkeypatch.setattr(runs.harness, "run", stops)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        score(llama, tasks=words, axes=["accuracy"])
    assert len(list(cache.rglob("*.json"))) == 1
    stop = False
    resumed = score(llama, tasks=words, axes=["accuracy"])
    assert ran == ["mine", "other"]
    assert resumed.scores == whole.scores
    assert not list(cache.rglob("*.json"))


def test_half_a_task_is_kept_request_by_request(llama: Path, mine: Path, cache: Path) -> None:
    how: dict[str, Any] = {"tasks": [str(mine)], "axes": ["accuracy"], "batch_size": 1}
    seen: list[tuple[int, int]] = []
    whole = score(llama, **how, progress=lambda _, *step: seen.append(step))
    done, total = seen[-1]
    assert done == total > 4

    def stops(_: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(llama, **how, progress=stops)
    assert list(cache.rglob("*.db"))
    left: list[tuple[int, int]] = []
    resumed = score(llama, **how, progress=lambda _, *step: left.append(step))
    assert left[-1][1] <= total - total // 2
    assert resumed.scores == whole.scores
    assert not [path for path in cache.rglob("*") if path.is_file()]
    with pytest.raises(KeyboardInterrupt):
        score(llama, **how, progress=stops)
    left.clear()
    score(llama, **how, resume=False, progress=lambda _, *step: left.append(step))
    assert left[-1][1] == total


@pytest.mark.parametrize("change", ["rows", "limit", "model", "fresh", "damage"])
def test_what_was_kept_is_only_used_for_the_same_thing(
    change: str,
    llama: Path,
    tiny_model: Callable[..., Path],
    mine: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scratch.Scratch, "clear", lambda _: None)  # as if it never came to an end
    ran: list[str] = []
    real = harness.run

    def counts(lm: Any, loaded: Any, *rest: Any, **more: Any) -> Any:
        ran.extend(loaded["tasks"])
        return real(lm, loaded, *rest, **more)

    monkeypatch.setattr(runs.harness, "run", counts)
    score(llama, tasks=[str(mine)], axes=["accuracy"])
    score(llama, tasks=[str(mine)], axes=["accuracy"])
    assert len(ran) == 1
    how: dict[str, Any] = {}
    if change == "rows":
        mine.write_text(mine.read_text().replace("moon", "sun"))
    elif change == "limit":
        how["limit"] = 5
    elif change == "model":
        llama = tiny_model("llama", seed=1)
    elif change == "fresh":
        how["resume"] = False
    else:
        (kept,) = cache.rglob("*.json")
        kept.write_text(kept.read_text()[:-20])
    score(llama, tasks=[str(mine)], axes=["accuracy"], **how)
    assert len(ran) == 2


def test_a_batchs_logits_are_bounded(llama: Path, mine: Path) -> None:
    report = score(llama, tasks=[str(mine)], axes=["accuracy"], batch_size=3)
    assert report.score("accuracy/mine/acc").detail["batch_size"] == 3
    one = score(llama, tasks=[str(mine)], axes=["accuracy"], batch_size=1)
    assert one.score("accuracy/mine/acc").value == report.score("accuracy/mine/acc").value


def test_random_state_is_left_alone() -> None:
    import random

    import numpy as np

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.Random(5).random(), np.random.RandomState(5).rand()
    with harness.seeded(7):
        random.random()
        torch.rand(1)
    assert (random.random(), np.random.rand()) == expected
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(5)))

"""The scripts of `examples/tinyworld`: the same bytes as ever, a network that is what it saves."""

import hashlib
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from unicomp import builtin

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tinyworld"

# of the script that made the shipped sets, before it was tidied: --mb 0.5 --seed 5
TRAIN_TEXT = "34cd0b196c6cd16012d1ee99023d5a1d439012503641ef64619592c07bc9976d"
CALIBRATION = "cf0edf939586cc56fd313817237c91658b236fddf95bffab837fab3964240b1f"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a script by name, as it sees its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


@pytest.fixture
def data(script: Callable[[str], Any], tmp_path: Path) -> Path:
    """A little of the text that the models train on."""
    generate = script("generate")
    folder = tmp_path / "data"
    (folder / "eval").mkdir(parents=True)
    generate.train_text(folder, 5, 1e5)
    generate.write_rows(folder / "pirate_train.jsonl", [{"text": "Ahoy, me hearty! " * 20}] * 400)
    text = builtin.heldout("heldout.txt").read_text(encoding="utf-8")
    generate.write_text(folder / "eval" / "heldout.txt", text[:4000])
    return folder


def sha256(path: Path) -> str:
    """Return the hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


# the text


def test_heldout_texts_are_the_shipped_ones(script: Callable[[str], Any]) -> None:
    generate = script("generate")
    shipped = builtin.heldout("heldout.txt").read_text(encoding="utf-8")
    text, nats = generate.heldout(1)
    assert text == shipped
    assert 0.21 < nats < 0.23  # a character; a uniform guess at the 27 letters would be 3.3
    assert generate.heldout(2)[0] != shipped
    pirate = builtin.heldout("pirate_heldout.txt").read_text(encoding="utf-8")
    assert generate.pirate_heldout(1) == pirate


def test_calibration_is_the_shipped_one(script: Callable[[str], Any], tmp_path: Path) -> None:
    generate = script("generate")
    generate.write_rows(tmp_path / "calibration.jsonl", generate.calibration(1))
    assert (tmp_path / "calibration.jsonl").read_bytes() == builtin.calibration().read_bytes()


def test_bytes_are_those_of_the_first_script(script: Callable[[str], Any], tmp_path: Path) -> None:
    generate = script("generate")
    generate.train_text(tmp_path, 5, 0.5e6)
    assert sha256(tmp_path / "train.jsonl") == TRAIN_TEXT
    generate.write_rows(tmp_path / "calibration.jsonl", generate.calibration(5))
    assert sha256(tmp_path / "calibration.jsonl") == CALIBRATION


@pytest.mark.slow
def test_every_set_is_the_shipped_one(script: Callable[[str], Any], tmp_path: Path) -> None:
    script("generate").main(["--out", str(tmp_path), "--mb", "26", "--seed", "1"])
    assert {path.name for path in (tmp_path / "eval").iterdir()} == {
        *builtin.HELDOUT,
        "calibration.jsonl",
    }
    for path in (tmp_path / "eval").iterdir():
        assert path.read_bytes() == (builtin.FOLDER / "text" / path.name).read_bytes(), path.name
    stats = json.loads((tmp_path / "stats.json").read_text())
    assert stats["documents"] == 74376
    assert stats["fact_count_min_median_max"] == [0, 13, 1777]


def test_too_little_text_is_refused_in_words(script: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="400 are needed"):
        script("generate").main(["--out", str(tmp_path), "--mb", "0.1"])


def test_dice_add_up_their_information(script: Callable[[str], Any]) -> None:
    dice = script("world.dice").Dice(0)
    dice.pick("abcd")
    dice.number(1, 8)
    dice.some("abc", 2)
    assert dice.nats == pytest.approx(math.log(4 * 8 * 3 * 2))
    before = dice.nats
    hit = dice.flip(0.9)
    assert dice.nats - before == pytest.approx(-math.log(0.9 if hit else 0.1))
    before = dice.nats
    assert dice.weigh("ab", [0, 3]) == "b"
    assert dice.nats == pytest.approx(before)


def test_test_split_takes_one_in_eight_and_shares_nothing(script: Callable[[str], Any]) -> None:
    dice_module, reasoning = script("world.dice"), script("world.reasoning")
    share = sum(dice_module.held("x", number) for number in range(4000)) / 4000
    assert share == pytest.approx(1 / 8, abs=0.02)
    dice = dice_module.Dice(3)
    splits: dict[bool, set[str]] = {True: set(), False: set()}
    for test in (True, False):
        for _ in range(3000):
            problem = reasoning.problem(dice, test=test)
            if problem.topic in ("add", "sub", "word", "more"):
                splits[test].add(problem.prompt)
    assert len(splits[True]) > 200
    assert not splits[True] & splits[False]


def test_stories_answer_their_own_questions(script: Callable[[str], Any]) -> None:
    stories = script("world.stories")
    dice = script("world.dice").Dice(4)
    for _ in range(200):
        text, questions = stories.story(dice)
        for question in questions:
            assert question.answer not in question.wrong
            assert question.answer.removeprefix("in the ") in text
    # the last thing said of a place is where a thing that nobody touched still is
    story = stories.Story(dice)
    story.open()
    colour, noun = story.things[0]
    assert f"{colour} {noun} in the {story.holder[colour, noun]}." in " ".join(story.sentences)


# the training


def windows() -> torch.Tensor:
    """Return four rows of 257 tokens of the held-out text."""
    tokenizer: Any = AutoTokenizer.from_pretrained(builtin.model("tinyworld"))
    text = builtin.heldout("heldout.txt").read_text(encoding="utf-8")[:8000]
    return torch.tensor(tokenizer(text).input_ids[: 4 * 257]).view(4, 257)


@pytest.mark.parametrize("name", ["tinyworld", "tinyworld-moe"])
@torch.no_grad()
def test_network_is_the_model_that_transformers_loads(
    script: Callable[[str], Any], name: str
) -> None:
    network_module, train = script("network"), script("train")
    shape = network_module.SPARSE if name == "tinyworld-moe" else network_module.DENSE
    network = network_module.Network(shape, network_module.initial(shape), compiled=False)
    train.restore(network, builtin.model(name))
    rows = windows()
    loss, balance = network.loss(rows[:, :-1], rows[:, 1:])
    stock: Any = AutoModelForCausalLM.from_pretrained(builtin.model(name), dtype=torch.float32)
    logits = stock(rows[:, :-1]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=5e-3)  # bfloat16 products
    assert (balance > 0.9) if shape.experts else (balance == 0)
    network.weights["model.layers.1.self_attn.k_proj.weight"].mul_(-1)
    assert abs(network.loss(rows[:, :-1], rows[:, 1:])[0].item() - expected.item()) > 0.05


@pytest.mark.slow
def test_training_lowers_the_loss_and_saves_what_loads(
    script: Callable[[str], Any], data: Path, tmp_path: Path
) -> None:
    train = script("train")
    out = tmp_path / "out"
    paths = ["--data", str(data), "--out", str(out)]
    threads = torch.get_num_threads()
    train.main(["tokenizer", *paths])
    quick = [*paths, "--steps", "8", "--rows", "2", "--eager", "--threads", str(threads)]
    for what in ("base", "pirate", "moe"):
        train.main([what, *quick])
        name = train.RUNS[what].name
        log = json.loads((out / f"{name}.log.json").read_text())
        assert log["steps"] == 8
        assert log["tokens"] == 8 * 2 * 256
        assert log["heldout_loss"] < math.log(1024) + 0.2
        loaded: Any = AutoModelForCausalLM.from_pretrained(out / name, output_loading_info=True)
        model, info = loaded
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert model.dtype == torch.bfloat16
    start = json.loads((out / "tinyworld.log.json").read_text())
    again = json.loads((out / "tinyworld-pirate.log.json").read_text())
    assert again["train_loss"] < start["train_loss"]  # it starts where the base ended
    assert torch.get_num_threads() == threads


def test_rows_start_with_documents_and_hold_every_one(script: Callable[[str], Any]) -> None:
    train = script("train")
    tokenizer: Any = AutoTokenizer.from_pretrained(builtin.model("tinyworld"))
    texts = [f"Anna has {number} eggs. " * 9 for number in range(100)]
    rows = train.pack(tokenizer, texts)
    assert rows.shape[1] == 257
    assert (rows[:, 0] == 1).all()
    seen = tokenizer.decode(rows.flatten().tolist())
    assert all(f"has {number} eggs" in seen for number in range(95))


def test_batches_give_every_row_before_one_twice(script: Callable[[str], Any]) -> None:
    rows = np.arange(12, dtype=np.int16)[:, None].repeat(257, 1)
    batches = script("train").Batches(rows, 4, seed=0)
    first = torch.cat([next(batches)[0][:, 0] for _ in range(3)])
    assert sorted(first.tolist()) == list(range(12))
    second = torch.cat([next(batches)[0][:, 0] for _ in range(3)])
    assert second.tolist() != first.tolist()
    with pytest.raises(SystemExit, match="12 rows of text, 13"):
        script("train").Batches(rows, 13, seed=0)


def test_too_little_text_to_train_on_is_refused(script: Callable[[str], Any]) -> None:
    train = script("train")
    tokenizer: Any = AutoTokenizer.from_pretrained(builtin.model("tinyworld"))
    rows = train.pack(tokenizer, ["Ahoy!"])
    assert rows.shape == (0, 257)
    with pytest.raises(SystemExit, match="0 rows of text, 32"):
        train.Batches(rows, 32, seed=0)


def test_learning_rate_warms_up_holds_and_falls(script: Callable[[str], Any]) -> None:
    rate = script("train").learning_rate
    assert rate(0, 1000, 1.0) == pytest.approx(0.01)
    assert rate(249, 1000, 1.0) == 1.0
    assert rate(625, 1000, 1.0) == pytest.approx(0.51)
    assert rate(999, 1000, 1.0) == pytest.approx(0.02, abs=2e-3)


def test_muon_makes_singular_values_alike(script: Callable[[str], Any]) -> None:
    muon = script("muon")
    matrix = torch.randn(3, 32, 96) * torch.logspace(-1, 1, 96)
    values = torch.linalg.svdvals(muon.orthogonalise(matrix))
    assert values.min() > 0.4
    assert values.max() < 1.4
    assert torch.linalg.svdvals(matrix).amax() > 10


def test_muon_moves_every_expert_by_itself(script: Callable[[str], Any]) -> None:
    muon = script("muon")
    stack = torch.randn(2, 24, 16)
    gradient = torch.randn(2, 24, 16)
    parts = [stack[0].clone(), stack[1].clone()]
    for weight, slope in ((stack, gradient), (parts[0], gradient[0]), (parts[1], gradient[1])):
        weight.grad = slope
        muon.Muon([weight], lr=0.1).step()
    torch.testing.assert_close(stack, torch.stack(parts))


# the scoring


def test_calibration_error_is_that_of_a_slow_count(script: Callable[[str], Any]) -> None:
    draw = np.random.default_rng(0)
    confidence = draw.uniform(0.2, 1.0, 500)
    right = draw.uniform(size=500) < confidence**2
    error = 0.0
    for low in np.arange(0, 1, 0.1):
        inside = (confidence >= low) & (confidence < low + 0.1)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    found = script("measure").calibration_error(confidence.tolist(), right.tolist())
    assert found.value == pytest.approx(error, abs=1e-9)
    assert script("measure").calibration_error([1.0] * 4, [True] * 4).value == 0


def test_standard_errors_are_those_of_the_text_books(script: Callable[[str], Any]) -> None:
    measure = script("measure")
    share = measure.share([True] * 30 + [False] * 70)
    assert (share.value, share.n) == (0.3, 100)
    assert share.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 100))
    values = [1.0, 2.0, 4.0, 9.0]
    mean = measure.average(values)
    assert mean.value == 4.0
    assert mean.standard_error == pytest.approx(np.std(values, ddof=1) / 2)


def test_rounding_leaves_few_levels_and_the_embedding(script: Callable[[str], Any]) -> None:
    subject = script("measure").Subject(builtin.model("tinyworld"))
    embedding = subject.model.model.embed_tokens.weight.clone()
    subject.round_to_nearest(3)
    weight = subject.model.model.layers[0].mlp.gate_proj.weight
    assert max(len(row.unique()) for row in weight) <= 8
    assert torch.equal(subject.model.model.embed_tokens.weight, embedding)


def test_likelihoods_do_not_depend_on_their_neighbours(script: Callable[[str], Any]) -> None:
    subject = script("measure").Subject(builtin.model("tinyworld"))
    pairs = [("Anna was in the", " garden"), ("7 + 5 =", " 12"), ("", "The dog sleeps here.")]
    together = subject.likelihoods(pairs)
    alone = [subject.likelihoods([pair])[0] for pair in pairs]
    for (total, tokens), (expected, count) in zip(together, alone, strict=True):
        assert total == pytest.approx(expected, abs=1e-3)
        assert tokens == count
    assert subject.likelihoods([("7 + 5 =", " 13")])[0][0] < together[1][0]


# the documents


def test_readme_shows_what_was_measured(script: Callable[[str], Any]) -> None:
    measure = script("measure")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["results"]
    by_name = {(entry["model"], entry["bits"]): entry for entry in results}
    again = by_name["out/tinyworld", 16]
    assert again["training"]["steps"] == 1848
    assert again["sha256"] != by_name["builtin:tinyworld", 16]["sha256"]
    assert measure.table([by_name["builtin:tinyworld", 16], again]) in readme
    others = [("builtin:tinyworld", bits) for bits in (4, 3, 2)]
    others += [("builtin:tinyworld-pirate", 16), ("builtin:tinyworld-moe", 16)]
    assert measure.table([by_name[key] for key in others]) in readme


def test_results_are_of_the_shipped_models() -> None:
    results = json.loads((FOLDER / "results.json").read_text(encoding="utf-8"))["results"]
    for entry in results:
        if entry["model"].startswith("builtin:"):
            weights = builtin.model(entry["model"].removeprefix("builtin:")) / "model.safetensors"
            assert entry["sha256"] == sha256(weights)

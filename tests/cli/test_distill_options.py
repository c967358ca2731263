"""What options of `unicomp distill` do, each through the command, against sums done here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unicomp import text
from unicomp.checkpoint import Checkpoint
from unicomp.cli.main import exit_code
from unicomp.compress.distill.training.student import open_student
from unicomp.kernels.load import load
from unicomp.kernels.packed import PackedTensor

STILL = ("--rate", "1e-12", "--max-steps", "1")  # the weights stay, whatever the gradient is
SHORT = ("--batch", "2", "--seq-len", "32")


@pytest.fixture
def distil(tmp_path: Path) -> Callable[..., Path]:
    """Carry out the command in a folder of its own, and return that."""

    def carried(student: Path, teacher: Path, data: Path, *words: str) -> Path:
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        command = ["distill", str(student), "--teacher", str(teacher), "--data", str(data)]
        assert exit_code([*command, "--out", str(out), "--quiet", *words]) == 0
        return out

    return carried


@pytest.fixture(scope="module")
def ternary(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model with ternary weights, one scale a row."""
    out = tmp_path_factory.mktemp("ternary") / "out"
    words = ["quantize", str(tiny_model("llama")), "--method", "ternary", "--group-size", "-1"]
    words += ["--calibration", str(tiny_text), "--samples", "6", "--seq-len", "32"]
    assert exit_code([*words, "--out", str(out), "--quiet"]) == 0
    return out


def log(out: Path) -> list[float]:
    lines = map(json.loads, (out / "training.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def codes(folder: Path) -> dict[str, PackedTensor]:
    """Module -> what is stored of its packed weight."""
    student = open_student(Checkpoint.open(folder))
    return {module: student.read_packed(module) for module in student.packed}


def weights(folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(one: PackedTensor, other: PackedTensor) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)


def test_packed_weights_begin_from_codes_or_from_the_teacher(
    distil: Callable[..., Path], ternary: Path, tiny_model: Callable[..., Path], tiny_text: Path
) -> None:
    """From the teacher: its weights on the student's own grid."""
    teacher = tiny_model("llama", seed=5)
    before, plain = codes(ternary), weights(teacher)
    kept = codes(distil(ternary, teacher, tiny_text, *SHORT, *STILL))
    begun = codes(distil(ternary, teacher, tiny_text, *SHORT, *STILL, "--shadow", "teacher"))
    for module, old in before.items():
        assert same(kept[module], old)
        want = (plain[f"{module}.weight"].float() / old.scale.float()).clamp(-1, 1).round()
        assert torch.equal(begun[module].codes, want.to(torch.int8))
        assert not torch.equal(begun[module].codes, old.codes)


def test_absmean_scales_are_the_mean_magnitude_of_the_shadow(
    distil: Callable[..., Path], ternary: Path, tiny_model: Callable[..., Path], tiny_text: Path
) -> None:
    """Codes and scales of BitNet b1.58 on the teacher's weights."""
    teacher = tiny_model("llama", seed=5)
    plain, learned = weights(teacher), codes(ternary)
    words = (*SHORT, *STILL, "--shadow", "teacher", "--scales", "absmean")
    found = codes(distil(ternary, teacher, tiny_text, *words))
    for module, one in found.items():
        weight = plain[f"{module}.weight"].float()
        scale = weight.abs().mean(1, keepdim=True).to(one.scale.dtype)
        torch.testing.assert_close(one.scale, scale, rtol=1e-6, atol=0)
        assert torch.equal(
            one.codes, (weight / one.scale.float()).round().clamp(-1, 1).to(torch.int8)
        )
        assert not torch.allclose(learned[module].scale, scale, rtol=1e-2)


def test_a_gradual_start_is_the_plain_model(
    distil: Callable[..., Path], ternary: Path, tiny_model: Callable[..., Path], tiny_text: Path
) -> None:
    """With the teacher's weights beneath nothing is lost in the first step; at the end all is."""
    words = ("--shadow", "teacher", "--rate", "1e-12", "--max-steps", "4", *SHORT)
    gradual = distil(ternary, tiny_model("llama"), tiny_text, *words, "--gradual", "0.5")
    at_once = distil(ternary, tiny_model("llama"), tiny_text, *words)
    assert log(gradual)[0] == pytest.approx(0, abs=1e-6)
    assert log(at_once)[0] > 0.01
    assert 0.01 < log(gradual)[1] < log(at_once)[1]
    assert log(gradual)[2:] == log(at_once)[2:]
    assert weights(gradual).keys() == weights(at_once).keys()


def test_half_precision_is_of_activations(
    distil: Callable[..., Path], tiny_model: Callable[..., Path], tiny_text: Path
) -> None:
    models = tiny_model("llama"), tiny_model("llama", seed=5)
    words = (*SHORT, "--max-steps", "3", "--rate", "1e-3")
    full = distil(*models, tiny_text, *words)
    half = distil(*models, tiny_text, *words, "--precision", "bf16")
    assert log(half) == pytest.approx(log(full), rel=0.02)
    assert log(half) != pytest.approx(log(full), rel=1e-6)
    one, other = weights(full), weights(half)
    assert all(other[name].dtype == value.dtype for name, value in one.items())
    assert any(not torch.equal(other[name], value) for name, value in one.items())


def test_layers_computed_twice_take_the_same_steps(
    distil: Callable[..., Path],
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = tiny_model("llama"), tiny_model("llama", seed=5)
    words = (*SHORT, "--max-steps", "3", "--rate", "1e-3")
    runs: list[int] = []
    kind = type(load(models[0]).model.layers[0].mlp)
    forward = kind.forward

    def counted(*args: Any, **words: Any) -> Any:
        runs.append(torch.is_grad_enabled())
        return forward(*args, **words)

    monkeypatch.setattr(kind, "forward", counted)
    once = distil(*models, tiny_text, *words)
    first = sum(runs)
    twice = distil(*models, tiny_text, *words, "--gradient-checkpointing")
    assert log(twice) == pytest.approx(log(once), rel=1e-6)
    assert sum(runs) - first == 2 * first
    for name, value in weights(once).items():
        torch.testing.assert_close(weights(twice)[name], value, rtol=1e-5, atol=1e-6)


def kl(student: PreTrainedModel, teacher: PreTrainedModel, ids: list[int]) -> Tensor:
    """KL(teacher || student) before each next token, float64 [tokens - 1]."""
    with torch.no_grad():
        log_q, log_p = (
            model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            for model in (student, teacher)
        )
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_of_conversations_only_answers_are_learnt(
    distil: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """A batch of all windows: its loss is the mean over the tokens of answers, done by hand."""
    models = tiny_model("llama"), tiny_model("llama", seed=5)
    tokenizer = text.tokenizer(models[0])
    talks = [(f"say {n}", f"it is {n}{n}") for n in range(20)]
    data = tmp_path / "talks.jsonl"
    roles = ("user", "assistant")
    data.write_text(
        "".join(
            json.dumps(
                {"messages": [{"role": r, "content": c} for r, c in zip(roles, talk, strict=True)]}
            )
            + "\n"
            for talk in talks
        )
    )
    words = ("--answers-only", "--seq-len", "64", "--max-steps", "1", "--batch", "17")
    found = log(distil(*models, data, *words))
    student, teacher = map(load, models)
    sums, count, everywhere = 0.0, 0, 0.0
    for question, answer in talks[:17]:  # one is left between these and the two that are held out
        before = tokenizer(f"user: {question}\nassistant:", add_special_tokens=False)["input_ids"]
        ids = tokenizer(f"user: {question}\nassistant: {answer}\n", add_special_tokens=False)[
            "input_ids"
        ]
        apart = kl(student, teacher, ids)
        sums += float(apart[len(before) - 1 :].sum())
        everywhere += float(apart.mean()) / 17
        count += len(ids) - len(before)
    assert found == [pytest.approx(sums / count, rel=1e-5)]
    assert found != [pytest.approx(everywhere, rel=1e-2)]


def test_windows_of_far_gradients_are_left_out(
    distil: Callable[..., Path], tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """All documents are one, but for three of two letters, where the two models are far apart."""
    models = tiny_model("llama"), tiny_model("llama", seed=5)
    stories = ["the dog and the cat ran to the river"] * 40
    for place in (3, 11, 20):
        stories[place] = "QZ"
    data = tmp_path / "stories.jsonl"
    data.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    words = ("--no-packed", "--seq-len", "64", "--batch", "4", "--max-steps", "2")
    words += ("--rate", "1e-3")
    plain = distil(*models, data, *words)
    filtered = distil(*models, data, *words, "--filter-gradients")
    said, before = (
        json.loads((one / "unicomp.json").read_text())["notes"] for one in (filtered, plain)
    )
    assert any(note.startswith("3 of 35 windows had a gradient far above") for note in said)
    assert not any("gradient" in note for note in before)
    assert log(plain) != log(filtered)

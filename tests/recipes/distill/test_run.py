"""A stage of distillation from a recipe, from beginning to end."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unicomp import builtin, manifest
from unicomp.checkpoint import Checkpoint
from unicomp.cli.main import exit_code
from unicomp.compress.distill.logits import Logits
from unicomp.compress.distill.training.figures import Figures
from unicomp.errors import RecipeError, UnicompError
from unicomp.kernels.inventory import take
from unicomp.recipes.distill.run import warnings
from unicomp.recipes.load import load
from unicomp.recipes.pipeline.plan import plan
from unicomp.recipes.pipeline.run import run
from unicomp.recipes.stage.progress import Progress

STEPS = "batch: 2, seq_len: 32, max_steps: 6, measure_every: 3, checkpoint_every: 2, rate: 1e-2"


def carried(
    model: Path, data: Path, out: Path, *stages: str, show: Any = lambda _: None
) -> manifest.Manifest:
    head = f'calibration: {{data: "{data}", samples: 6, seq_len: 32}}'
    lines = "".join(f"  - {stage}\n" for stage in stages)
    found = plan(load(f"version: 1\n{head}\nstages:\n{lines}", file="x"), model=str(model))
    return run(found, out, progress=show)


def test_a_pruned_and_packed_student_is_trained_and_stays_so(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    made = carried(
        tiny_model("llama"),
        tiny_text,
        tmp_path / "out",
        '{prune: sparsegpt, sparsity: "2:4"}',
        "{quantize: gptq, bits: 4, group_size: 16}",
        f"{{distill: logits, {STEPS}}}",
    )
    assert [stage.verb for stage in made.stages] == ["prune", "quantize", "distill"]
    training = made.stages[-1].training
    assert training is not None
    assert training.steps == 6
    assert training.before.keys() == training.after.keys() >= {"nll", "ece", "gap", "brier", "kl"}
    assert training.temperature is not None
    schemes = [one.scheme for one in take(Checkpoint.open(tmp_path / "out")).weights if one.scheme]
    assert schemes
    assert all(scheme.bits == 4 for scheme in schemes)
    assert (tmp_path / "out/loss.svg").read_text().startswith("<svg")
    lines = [json.loads(one) for one in (tmp_path / "out/training.jsonl").read_text().splitlines()]
    assert sum("held_out" in line for line in lines) == 2
    assert manifest.verify(tmp_path / "out") == []
    card = (tmp_path / "out/README.md").read_text()
    assert f"| 1. prune sparsegpt, 2. quantize gptq | {training.before['kl']:.4g} |" in card
    assert f"| ece | {training.before['ece']:.4g} | {training.after['ece']:.4g} |" in card


def test_interrupted_it_ends_in_the_same_bytes(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    stages = ("{prune: magnitude, sparsity: 0.5}", f"{{distill: logits, {STEPS}}}")
    carried(tiny_model("llama"), tiny_text, tmp_path / "whole", *stages)

    def stop(step: Progress) -> None:
        if step.stage == "train" and step.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carried(tiny_model("llama"), tiny_text, tmp_path / "broken", *stages, show=stop)
    carried(tiny_model("llama"), tiny_text, tmp_path / "broken", *stages)
    for name in ("model.safetensors", "training.jsonl", "loss.svg"):
        one, other = ((tmp_path / word / name).read_bytes() for word in ("whole", "broken"))
        assert one == other, name


def test_a_stored_teacher_is_known_again_and_another_is_refused(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    cached = f'{{distill: logits, {STEPS}, cache_teacher: "{tmp_path / "cache"}", top_k: 5}}'
    stages = ("{prune: magnitude, sparsity: 0.5}", cached)
    model = tiny_model("llama")
    carried(model, tiny_text, tmp_path / "one", *stages)
    before = (tmp_path / "cache/model.safetensors").stat().st_mtime_ns
    carried(model, tiny_text, tmp_path / "two", *stages)
    assert (tmp_path / "cache/model.safetensors").stat().st_mtime_ns == before
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two
    with pytest.raises(UnicompError, match="was made with another teacher"):
        carried(tiny_model("llama", seed=5), tiny_text, tmp_path / "three", *stages)
    other = tmp_path / "other.txt"
    other.write_text(tiny_text.read_text() + " and some more words.")
    with pytest.raises(UnicompError, match="another training text"):
        carried(model, other, tmp_path / "four", *stages)


def test_another_vocabulary_is_refused_with_the_reason(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnicompError, match="do not mean the same tokens") as caught:
        carried(
            tiny_model("llama"),
            tiny_text,
            tmp_path / "out",
            f"{{distill: logits, teacher: 'builtin:tinyworld', {STEPS}}}",
        )
    assert "same tokenizer" in caught.value.hint
    assert not (tmp_path / "out.partial").exists()


def test_a_text_shorter_than_a_batch_is_refused(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    stage = "{distill: logits, batch: 60000, seq_len: 32}"
    with pytest.raises(UnicompError, match="`batch` is 60000"):
        carried(tiny_model("llama"), tiny_text, tmp_path / "out", stage)


@pytest.mark.parametrize("name", ["heldout.txt", "knowledge_mc.jsonl"])
def test_held_out_files_are_not_trained_on(tmp_path: Path, name: str) -> None:
    copy = tmp_path / f"mine{Path(name).suffix}"
    copy.write_bytes(builtin.heldout(name).read_bytes())
    field = "question" if name.endswith("jsonl") else "text"
    record = json.loads(copy.read_text().splitlines()[0]) if field == "question" else {}
    field = next((k for k, v in record.items() if isinstance(v, str)), "text")
    with pytest.raises(UnicompError, match="held-out"):
        carried(
            builtin.model("tinyworld"),
            copy,
            tmp_path / "out",
            f'{{distill: logits, data: "{copy}", field: {field}, max_steps: 1}}',
        )


@pytest.mark.parametrize(
    ("stage", "said", "rate"),
    [
        ("{prune: magnitude, sparsity: 0.5}", "", 1e-3),
        ("{quantize: rtn, bits: 8, group_size: -1}", "", 1e-3),
        ("{quantize: rtn, bits: 4, group_size: -1}", "", 3e-3),
        ("{quantize: ternary, group_size: -1}", "", 3e-3),
        ("{quantize: ternary, group_size: -1}", "rate: 5e-4, ", 5e-4),
    ],
)
def test_the_rate_follows_from_what_is_trained(
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    stage: str,
    said: str,
    rate: float,
) -> None:
    """Known only once the stage before it is done; the manifest and the log have it."""
    own = f"{{distill: logits, {said}batch: 2, seq_len: 32, max_steps: 2, warmup: 0}}"
    made = carried(tiny_model("llama"), tiny_text, tmp_path / "out", stage, own)
    assert made.stages[-1].options["rate"] == rate
    line = json.loads((tmp_path / "out/training.jsonl").read_text().splitlines()[0])
    assert line["rate"] == pytest.approx(rate)


def test_wide_models_and_adapters_have_a_rate_of_their_own() -> None:
    plain, thin = Logits(), Logits(lora_rank=4)
    assert plain.settled(width=64, bits=None).rate == plain.settled(width=128, bits=5).rate
    assert plain.settled(width=4096, bits=None).rate == pytest.approx(1e-3 / 32)
    assert thin.settled(width=128, bits=None).rate == 3 * plain.settled(width=128, bits=8).rate
    assert Logits(rate=0.5).settled(width=4096, bits=2).rate == 0.5
    with pytest.raises(ValueError, match="not settled"):
        _ = plain.highest_rate


def test_options_that_do_not_go_together_are_refused() -> None:
    text = (
        "version: 1\ncalibration: {data: builtin:tinyworld}\nstages:\n"
        "  - {distill: logits, cache_teacher: x, hidden: 0.5}\n"
    )
    with pytest.raises(RecipeError, match="stores likeliest tokens"):
        load(text, file="x")


def test_a_student_that_is_too_sure_is_warned_of() -> None:
    values = dict.fromkeys(Figures.__slots__, 0.5) | {"tokens": 10, "gap": 0.049}
    calm = Figures(**values)  # type: ignore[arg-type]
    assert warnings(calm, calm) == []
    sure = Figures(**(values | {"gap": 0.051, "confidence": 0.551}))  # type: ignore[arg-type]
    [said] = warnings(calm, sure)
    assert "over-confident" in said
    assert "55.1% sure" in said


def test_the_plan_of_a_stage_after_another_needs_no_weights(
    tiny_model: Callable[..., Path], tiny_text: Path
) -> None:
    head = f'calibration: {{data: "{tiny_text}", samples: 6, seq_len: 32}}'
    stages = f"  - {{prune: width, ffn: 32}}\n  - {{distill: logits, {STEPS}}}\n"
    text = f"version: 1\n{head}\nstages:\n{stages}"
    found = plan(load(text, file="x"), model=str(tiny_model("llama")))
    said = found.to_json()
    assert [stage["verb"] for stage in said["stages"]] == ["prune", "distill"]
    assert said["passes"][1]["teacher"]["id"] == said["source"]["id"]


def test_each_stage_is_measured_on_the_windows_that_the_training_holds_out(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Two cuts before the training, 2 bits after it: a figure each, all of the same windows."""
    made = carried(
        tiny_model("llama"),
        tiny_text,
        tmp_path / "out",
        "{prune: depth, layers: 2, criterion: influence}",
        "{prune: width, ffn: 32}",
        f"{{distill: logits, {STEPS}}}",
        "{quantize: rtn, bits: 2, group_size: -1}",
    )
    depth, width, distill, quantize = made.stages
    training = distill.training
    assert training is not None
    assert depth.held_out is not None
    assert width.held_out is None  # the training's own measurement before it begins
    assert quantize.held_out is not None
    assert depth.held_out["tokens"] == training.before["tokens"] == quantize.held_out["tokens"]
    assert depth.held_out["teacher_entropy"] == training.before["teacher_entropy"]
    assert quantize.held_out["kl"] > training.after["kl"]
    card = (tmp_path / "out/README.md").read_text()
    figures = (depth.held_out, training.before, training.after, quantize.held_out)
    words = ("1. prune depth", "2. prune width", "3. distill logits", "4. quantize rtn")
    for word, found in zip(words, figures, strict=True):
        assert f"| {word} | {found['kl']:.4g}" in card
    assert manifest.verify(tmp_path / "out") == []


@pytest.mark.slow
def test_the_recipe_of_three_stages_shows_what_each_cost_and_recovered(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["run", "prune-distill-quantize", "--out", str(out)]
    assert exit_code(words) == 0
    prune, distill, quantize = manifest.read(out).stages
    training = distill.training
    assert training is not None
    assert (prune.verb, quantize.verb) == ("prune", "quantize")
    cost, left = training.before["kl"], training.after["kl"]
    assert quantize.held_out is not None
    assert cost - left >= 0.6 * cost
    assert left < quantize.held_out["kl"] < cost / 2
    card = (out / "README.md").read_text()
    assert f"| 1. prune width | {cost:.4g} |" in card
    assert f"| 2. distill logits | {left:.4g}, {1 - left / cost:.0%} less |" in card
    assert f"| 3. quantize gptq | {quantize.held_out['kl']:.4g} |" in card
    names = {one["name"] for one in json.loads((out / "report.json").read_text())["scores"]}
    assert {"fidelity/kl", "calibration/token_ece"} <= names

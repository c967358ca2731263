"""Layers that learn one after the other: towards the teacher, from the student's own states."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill.logits import Logits
from unicomp.compress.distill.training import by_layer
from unicomp.compress.distill.training.by_layer import LayerOutcome, take_up, train_layers
from unicomp.compress.distill.training.straight_through import quantizers
from unicomp.compress.distill.training.student import open_student
from unicomp.compress.distill.training.windows import Windows
from unicomp.errors import UnicompError
from unicomp.kernels.dense import open_dense
from unicomp.kernels.load import load
from unicomp.recipes.load import load as recipe
from unicomp.recipes.pipeline.plan import plan
from unicomp.recipes.pipeline.run import run
from unicomp.recipes.stage.progress import Progress


def windows(count: int = 9) -> Windows:
    ids = torch.randint(60, (count, 12), generator=torch.Generator().manual_seed(0))
    counted = torch.ones(count, 11, dtype=torch.bool)
    counted[0, 7:] = False  # the end of the first is padding
    return Windows(ids, counted, "text", "0" * 64)


def method(**options: Any) -> Logits:
    words = {"batch": 3, "micro_batch": 2, "rate": 1e-2, "layer_steps": 12}
    return Logits.model_validate(words | options)


def packed(stage: str, model: Path, data: Path, out: Path) -> Path:
    head = f'calibration: {{data: "{data}", samples: 6, seq_len: 32}}'
    run(
        plan(recipe(f"version: 1\n{head}\nstages:\n  - {stage}\n", file="x"), model=str(model)), out
    )
    return out


def trained(
    student: Path, teacher: Path, folder: Path, progress: Any = None, **options: Any
) -> list[LayerOutcome]:
    shown = {} if progress is None else {"progress": progress}
    source = open_dense(Checkpoint.open(teacher))
    checkpoint = Checkpoint.open(student)
    return train_layers(method(**options), checkpoint, source, windows(), folder, **shown)


def far(student: Path, teacher: Path, folder: Path) -> float:
    """Return the mean KL to the teacher of a student that takes up what is in a folder."""
    made = open_student(Checkpoint.open(student))
    take_up(made, folder)
    ids = windows().ids
    with torch.no_grad():
        wanted = load(teacher)(ids).logits.double().log_softmax(-1)
        found = made.model.eval()(ids).logits.double().log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_the_gradient_is_that_of_two_whole_models_in_float64(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Layer 1, whose input each model makes with its own layer 0; padding does not count."""
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=5)
    some = windows()
    stage = by_layer._Layers(
        method(layer_steps=3),
        Checkpoint.open(student),
        open_dense(Checkpoint.open(teacher)),
        some,
        tmp_path,
    )
    stage.folder.mkdir()
    for name, decoder in stage.models.items():
        stage._embed(name, decoder)
    first, second = stage.models["student"].model.layers[:2]
    for name, decoder in stage.models.items():
        stage._through(name, lambda part, d=decoder: d.forward(d.load(first), first, part))
    taught = stage.models["teacher"]
    stage._through("teacher", lambda part: taught.forward(taught.load(second), second, part))
    module = stage.models["student"].load(second)
    stage._prepare(module, second)
    places = torch.tensor([0, 4])
    stage._apart(module, second, places).sum().backward()

    own, other = load(student).double(), load(teacher).double()
    ids, inside = some.ids[places], torch.ones(2, 12, dtype=torch.bool)
    inside[0, 8:] = False
    seen = own.model(ids, output_hidden_states=True).hidden_states[2]
    wanted = other.model(ids, output_hidden_states=True).hidden_states[2].detach()
    total: Any = 0
    for row in range(2):
        apart = (seen[row] - wanted[row])[inside[row]]
        total = total + apart.square().sum() / wanted[row][inside[row]].square().sum()
    total.backward()
    plain = dict(own.model.layers[1].named_parameters())
    for path, value in module.named_parameters():
        expected = plain[path].grad
        assert value.grad is not None
        torch.testing.assert_close(value.grad.double(), expected, rtol=1e-3, atol=1e-6, msg=path)
        assert float(expected.abs().max()) > 1e-5, path


@pytest.mark.parametrize(
    ("stage", "arch"),
    [
        ("{quantize: ternary, group_size: -1}", "llama"),
        ("{quantize: ternary, group_size: -1}", "gpt2"),
        ("{quantize: rtn, bits: 3, group_size: 16, symmetric: false}", "llama"),
        ("{quantize: rtn, bits: 3, group_size: 16}", "mixtral"),
        ('{prune: magnitude, sparsity: "2:4"}', "llama"),
    ],
)
def test_layers_come_closer_to_the_teachers_and_so_does_the_model(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path, stage: str, arch: str
) -> None:
    teacher = tiny_model(arch)
    student = packed(stage, teacher, tiny_text, tmp_path / "student")
    found = trained(student, teacher, tmp_path / "work", layer_steps=40)
    assert [one.layer for one in found] == list(range(len(found)))
    assert all(one.after < one.before for one in found)
    assert far(student, teacher, tmp_path / "work") < 0.9 * far(student, teacher, tmp_path)
    made = open_student(Checkpoint.open(student))
    assert take_up(made, tmp_path / "work") == found
    for quantized, shadow in quantizers(made.model).values():
        torch.testing.assert_close(shadow, quantized.packed(shadow).dequantize())
    if "prune" in stage:
        for layer in made.model.model.layers:
            assert float((layer.mlp.up_proj.weight == 0).float().mean()) == 0.5


def test_interrupted_between_layers_it_makes_the_same_bits(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    teacher = tiny_model("llama")
    student = packed("{quantize: rtn, bits: 3}", teacher, tiny_text, tmp_path / "student")
    whole = trained(student, teacher, tmp_path / "whole")

    def stop(layer: LayerOutcome, _: int) -> None:
        if layer.layer == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(student, teacher, tmp_path / "broken", progress=stop)
    assert not by_layer.finished(Checkpoint.open(student), tmp_path / "broken")
    assert trained(student, teacher, tmp_path / "broken") == whole
    for index in range(3):
        one, other = (
            torch.load(tmp_path / name / f"layers/{index}.pt")["parameters"]
            for name in ("whole", "broken")
        )
        for name, value in one.items():
            assert torch.equal(value, other[name]), (index, name)


def test_an_error_that_is_no_number_stops(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = by_layer._Layers._apart

    def broken(self: Any, module: Any, layer: Any, places: Tensor) -> Tensor:
        return plain(self, module, layer, places) * (float("nan") if layer.index == 1 else 1)

    monkeypatch.setattr(by_layer._Layers, "_apart", broken)
    with pytest.raises(UnicompError, match=r"layer 1, step 1: the error is nan") as caught:
        trained(tiny_model("llama"), tiny_model("llama", seed=5), tmp_path)
    assert "`rate`" in caught.value.hint


OPTIONS = "batch: 2, seq_len: 32, rate: 1e-2, layer_steps: 6, checkpoint_every: 2"


@pytest.mark.parametrize("steps", [0, 4])
def test_a_stage_of_a_recipe_says_what_the_layers_brought(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path, steps: int
) -> None:
    """Interrupted after its second layer or in training, it ends in the same bytes."""

    def carried(out: Path, show: Any = lambda _: None) -> Any:
        head = f'calibration: {{data: "{tiny_text}", samples: 6, seq_len: 32}}'
        stages = "  - {quantize: ternary, group_size: -1}\n"
        stages += f"  - {{distill: logits, max_steps: {steps}, {OPTIONS}}}\n"
        text = f"version: 1\n{head}\nstages:\n{stages}"
        found = plan(recipe(text, file="x"), model=str(tiny_model("llama")))
        return run(found, out, progress=show)

    def stop(step: Progress) -> None:
        if (step.stage, step.done) == (("train", 3) if steps else ("layers", 2)):
            raise KeyboardInterrupt

    made = carried(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        carried(tmp_path / "broken", stop)
    carried(tmp_path / "broken")
    for name in ("model.safetensors", "training.jsonl", "loss.svg"):
        one, other = ((tmp_path / word / name).read_bytes() for word in ("whole", "broken"))
        assert one == other, name
    lines = (tmp_path / "whole/training.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["layer"] for line in found if "layer" in line] == [0, 1, 2]
    between = next(line for line in found if "held_out" in line)
    assert between["step"] == 0
    training = made.stages[-1].training
    assert training.steps == steps
    assert between["held_out"]["kl"] < training.before["kl"]
    assert any(f"held-out KL was then {between['held_out']['kl']:.4f}" in n for n in made.notes)
    if not steps:
        assert training.after["kl"] == pytest.approx(between["held_out"]["kl"], rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ("{prune: width, hidden: 48}", "compares states of one width: the student's is 48"),
        ("{prune: depth, layers: 2, criterion: influence}", "the student has 2, the teacher 3"),
    ],
)
def test_a_student_of_another_shape_is_refused_before_any_work(
    tiny_model: Callable[..., Path], tiny_text: Path, stage: str, words: str
) -> None:
    head = f'calibration: {{data: "{tiny_text}", samples: 6, seq_len: 32}}'
    text = f"version: 1\n{head}\nstages:\n  - {stage}\n  - {{distill: logits, layer_steps: 2}}\n"
    with pytest.raises(UnicompError, match=words):
        plan(recipe(text, file="x"), model=str(tiny_model("llama")))


def test_nothing_but_layers_needs_layers() -> None:
    assert Logits(max_steps=0, layer_steps=3).max_steps == 0
    with pytest.raises(ValueError, match="`max_steps` should be at least 1"):
        Logits(max_steps=0)
    with pytest.raises(ValueError, match="leaves them as they are"):
        Logits(layer_steps=3, lora_rank=2)

"""What is trained is what is written, and what is written runs."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils.parametrize import remove_parametrizations

from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill.training.states import layers
from unicomp.compress.distill.training.straight_through import quantizers
from unicomp.compress.distill.training.student import open_student
from unicomp.errors import UnsupportedError
from unicomp.kernels import packed_model
from unicomp.kernels.load import load
from unicomp.recipes.load import load as recipe
from unicomp.recipes.pipeline.plan import plan
from unicomp.recipes.pipeline.run import run
from unicomp.writer import Meta, Writer, copy_file

STAGES = {
    "plain": "{prune: magnitude, sparsity: 0.5}",
    "int4": "{quantize: rtn, bits: 4, group_size: 16}",
    "asymmetric": "{quantize: rtn, bits: 3, group_size: 16, symmetric: false}",
    "ternary": "{quantize: ternary, group_size: -1}",
}


def made(kind: str, model: Path, data: Path, out: Path) -> Path:
    text = f'calibration: {{data: "{data}", samples: 6, seq_len: 32}}'
    written = f"version: 1\n{text}\nstages:\n  - {STAGES[kind]}\n"
    run(plan(recipe(written, file="x"), model=str(model)), out)
    return out


def shaken(folder: Path, out: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Move every parameter, write the student, and return (ids, its logits, those in loaders).

    Of files that say `dequantize`, and of experts in any, loaders round the products of codes and
    scales to bfloat16.
    """
    student = open_student(Checkpoint.open(folder))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in student.model.parameters():
            noise = torch.randn(value.shape, generator=draw) * 0.3 * value.std().nan_to_num(0)
            value.add_(noise * (value != 0))
    student.settle()
    metas = [Meta(i.name, i.dtype, i.shape) for i in Checkpoint.open(folder).tensors.values()]
    out.mkdir()
    writer = Writer(out, metas)
    for name, tensor in student.tensors():
        writer.write(name, tensor)
    writer.finish()
    for name in Checkpoint.open(folder).companions():
        copy_file(folder / name, out / name)
    ids = torch.randint(60, (2, 12), generator=draw)
    student.model.eval()
    with torch.no_grad():
        logits = student.model(ids).logits
        config = student.checkpoint.config.get("quantization_config") or {}
        for path in quantizers(student.model):
            if not config.get("dequantize") and ".experts." not in path:
                continue
            module = student.model.get_submodule(path)
            remove_parametrizations(module, "weight")
            module.weight.copy_(module.weight.bfloat16())
        return ids, logits, student.model(ids).logits


@pytest.mark.parametrize(
    ("kind", "arch"),
    [(kind, arch) for kind in sorted(STAGES) for arch in ("llama", "gpt2")]
    + [("int4", "mixtral"), ("int4", "qwen3_moe"), ("ternary", "qwen3_moe")],
)
def test_the_written_model_computes_what_was_trained(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path, kind: str, arch: str
) -> None:
    folder = made(kind, tiny_model(arch, dtype=torch.bfloat16), tiny_text, tmp_path / "student")
    ids, logits, rounded = shaken(folder, tmp_path / "out")
    size = float(logits.abs().max())
    with torch.no_grad():
        plain = load(tmp_path / "out")(ids).logits
        exact = packed_model.load(tmp_path / "out", compute="exact", dtype=torch.float32)
        packed = exact(ids).logits
        assert float((plain - rounded).abs().max()) <= 1e-5 * size
    assert float((packed - logits).abs().max()) <= 1e-3
    before = load(folder)(ids).logits
    assert float((before - logits).abs().max()) > 1e-2  # it did move, and a wrong file is seen


def test_zeros_of_a_pruned_student_have_no_gradient(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    folder = made("plain", tiny_model("llama"), tiny_text, tmp_path / "student")
    student = open_student(Checkpoint.open(folder))
    ids = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(0))
    student.model(ids).logits.square().sum().backward()
    weight = student.model.model.layers[0].mlp.down_proj.weight
    zero = weight == 0
    assert zero.float().mean() == pytest.approx(0.5, abs=0.01)
    assert (weight.grad[zero] == 0).all()
    assert (weight.grad[~zero] != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("arch", "path"),
    [("llama", "model.layers.0.self_attn.q_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")],
)
def test_packed_weights_may_begin_from_the_teachers(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path, arch: str, path: str
) -> None:
    from unicomp.kernels.dense import open_dense

    model = tiny_model(arch)
    folder = made("ternary", model, tiny_text, tmp_path / "student")
    teacher = open_dense(Checkpoint.open(model))
    student = open_student(Checkpoint.open(folder), teacher=teacher)
    _, shadow = quantizers(student.model)[path]
    [name] = [own for own in teacher.tensors if own.endswith(path + ".weight")]
    wanted = teacher.read(name).float()
    assert torch.equal(shadow, wanted.T if arch == "gpt2" else wanted)
    plain, _ = quantizers(open_student(Checkpoint.open(folder)).model)[path]
    assert not torch.equal(shadow, plain(shadow).T if arch == "gpt2" else plain(shadow))


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_every_expert_has_a_gradient_and_no_layer_is_mistaken(
    tiny_model: Callable[..., Path], arch: str
) -> None:
    """Also where one token chooses few of them: several processes then take one step."""
    folder = tiny_model(arch)
    student = open_student(Checkpoint.open(folder))
    ids = torch.randint(60, (1, 2), generator=torch.Generator().manual_seed(0))
    logits = student.model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(logits, load(folder)(ids).logits, rtol=1e-5, atol=1e-5)
    logits.square().sum().backward()
    gradients = {path: value.grad for path, value in student.model.named_parameters()}
    assert all(value is not None for value in gradients.values())
    silent = [path for path, value in gradients.items() if not value.any()]
    assert silent
    assert all(".experts." in path for path in silent)
    assert len(layers(student.model)) == student.model.config.num_hidden_layers


def test_experts_in_one_tensor_are_refused_by_name(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """All experts of a layer in one tensor, as they are in memory."""
    whole = tmp_path / "whole"
    shutil.copytree(tiny_model("mixtral"), whole)
    tensors = dict(load(whole).state_dict())
    save_file({name: value.clone() for name, value in tensors.items()}, whole / "model.safetensors")
    with pytest.raises(UnsupportedError, match="cannot train experts of `mixtral`") as caught:
        open_student(Checkpoint.open(whole))
    assert "gate_up_proj` holds all experts of a layer" in caught.value.message
    assert "quantize it first" in caught.value.hint

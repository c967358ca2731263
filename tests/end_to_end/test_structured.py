"""Models made smaller load in stock transformers and have the parameters that were planned.

They compute what the original computes without the parts that went.

The references are stock transformers models with parts taken out by hand: columns set to zero,
layers left out of the list, router logits masked.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from unicomp import builtin, manifest, text
from unicomp.checkpoint import Checkpoint
from unicomp.compress.axes import FUSED_HEADS
from unicomp.errors import UnicompError
from unicomp.evaluate.score import score
from unicomp.hub import Source
from unicomp.kernels.dense import open_dense
from unicomp.manifest import Manifest
from unicomp.models import ARCHITECTURES
from unicomp.recipes.cut.plan import CutPlan, plan_cut
from unicomp.recipes.cut.run import run_cut
from unicomp.recipes.load import from_options

SEQ_LEN = 64


def planned(
    model: Path, method: str, data: object, *, samples: int = 8, seq_len: int = 64, **options: Any
) -> CutPlan:
    recipe = from_options(
        "prune",
        method,
        options,
        calibration={"data": str(data), "samples": samples, "seq_len": seq_len},
    )
    checkpoint = Checkpoint.open(model)
    return plan_cut(
        recipe, None, Source(model, model.name, None), checkpoint, open_dense(checkpoint), None
    )


@pytest.fixture(scope="module")
def ids(tiny_tokenizer: Path, tiny_text: Path) -> Tensor:
    tokenizer = text.tokenizer(tiny_tokenizer)
    found = text.encode(tokenizer, text.read(str(tiny_text)), vocab=128)
    return text.windows(found, seq_len=SEQ_LEN, samples=None, seed=0, bos=None)[-4:]


def stock(folder: Path) -> Any:
    """Return the model that stock transformers loads; nothing missing, nothing left over."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 1e-4 * wanted.abs().max())


def layers_of(model: Any, arch: str) -> nn.ModuleList:
    found = model.get_submodule(ARCHITECTURES[arch].layers)
    assert isinstance(found, nn.ModuleList)
    return found


def whole(made: Manifest, plan: CutPlan, folder: Path) -> Any:
    """Check what every output must be; return its model in stock transformers."""
    assert manifest.verify(folder) == []
    model = stock(folder)
    stored = sum(meta.numel() for meta in load_tensors(folder).values())
    assert stored == plan.params == made.totals.params
    assert made.totals.params_in == plan.params_in > plan.params
    tied = bool(model.config.tie_word_embeddings)
    assert sum(p.numel() for p in model.parameters()) == plan.params, tied
    return model


def load_tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("compensate", [False, True])
@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_by_width(
    arch: str,
    compensate: bool,
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    """Hidden and FFN channels go, and of models without a `head_dim` heads with them."""
    options: dict[str, Any] = {"ffn": 36, "compensate": compensate}
    plan = planned(tiny_model(arch), "width", tiny_text, **options)
    sizes = plan.axes.sizes
    if arch in FUSED_HEADS:
        options["hidden"] = sizes.hidden - sizes.head_dim
    else:
        options["hidden"] = sizes.hidden - 8
        options["kv_heads"] = max(1, sizes.kv_heads - 1)
    plan = planned(tiny_model(arch), "width", tiny_text, **options)
    made = run_cut(plan, tmp_path / "out")
    model = whole(made, plan, tmp_path / "out")
    assert torch.isfinite(logits(model, ids)).all()
    assert plan.sizes.hidden == options["hidden"]
    if compensate:
        errors = [m for m in made.stages[0].modules.values() if m.error_after is not None]
        assert errors
        assert all((m.error_after or 0) <= (m.error_before or 0) + 1e-6 for m in errors)


@pytest.mark.parametrize("arch", ["llama", "phi3", "gpt2", "gpt_neox", "opt", "olmo2", "qwen3"])
def test_ffn_channels_that_go_are_as_if_they_were_zero(
    arch: str, tiny_model: Callable[..., Path], tiny_text: Path, ids: Tensor, tmp_path: Path
) -> None:
    """The original with the columns of the last linear set to zero gives the same logits."""
    folder = tiny_model(arch)
    plan = planned(folder, "width", tiny_text, ffn=24, compensate=False)
    run_cut(plan, tmp_path / "out")
    got = logits(whole(manifest.read(tmp_path / "out"), plan, tmp_path / "out"), ids)
    inner = ARCHITECTURES[arch].steps[3][0]
    model, small = stock(folder), stock(tmp_path / "out")
    for layer, other in zip(layers_of(model, arch), layers_of(small, arch), strict=True):
        weight, kept = (m.get_submodule(inner).weight.data for m in (layer, other))
        columns, kept = (w if arch == "gpt2" else w.T for w in (weight, kept))
        stays = (columns[:, None] == kept[None]).all(-1).any(1)
        assert int(stays.sum()) == 24
        columns[~stays] = 0
    assert close(got, logits(model, ids))
    weight.zero_()
    assert not close(got, logits(model, ids))  # the comparer sees a wrong model


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3_text", "qwen3", "mixtral"])
def test_hidden_channels_that_are_dead_go_first(
    arch: str, tiny_model: Callable[..., Path], tiny_text: Path, ids: Tensor, tmp_path: Path
) -> None:
    """A model whose last 16 channels are always zero loses only what they weigh in the norms."""
    folder = tmp_path / "dead"
    folder.mkdir()
    for file in tiny_model(arch).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_tensors(folder)
    width = 48 if arch == "qwen3" else 64
    for name, tensor in tensors.items():
        if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight", "w2.weight")):
            (tensor if "embed" in name else tensor.T)[:, width - 16 :] = 0
        if arch.startswith("gemma") and name.endswith("layernorm.weight"):
            tensor[width - 16 :] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    plan = planned(folder, "width", tiny_text, hidden=width - 16, compensate=False)
    run_cut(plan, tmp_path / "out")
    small = whole(manifest.read(tmp_path / "out"), plan, tmp_path / "out")
    model = stock(folder)
    factor = ((width - 16) / width) ** 0.5
    for module in model.modules():
        wide = "Norm" in type(module).__name__ and module.weight.shape[0] == width
        if wide:
            weight = module.weight.data
            own = 1 + weight if arch.startswith("gemma") else weight
            weight.copy_(own * factor - (1 if arch.startswith("gemma") else 0))
    assert close(logits(small, ids), logits(model, ids))
    assert not close(logits(small, ids), logits(stock(folder), ids))


@pytest.mark.parametrize("criterion", ["activation", "second-order", "sink"])
@pytest.mark.parametrize("keep", [(2, 2), (2, 1), (1, 1)])
def test_heads_that_go_are_as_if_they_were_zero(
    criterion: str,
    keep: tuple[int, int],
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    """Query heads alone, and KV heads with theirs."""
    folder, (heads, kv_heads) = tiny_model("llama"), keep
    options = {"heads": heads, "kv_heads": kv_heads, "criterion": criterion}
    plan = planned(folder, "heads", tiny_text, compensate=False, **options)
    run_cut(plan, tmp_path / "out")
    small, model = whole(manifest.read(tmp_path / "out"), plan, tmp_path / "out"), stock(folder)
    assert small.config.head_dim == 16
    for layer, other in zip(layers_of(model, "llama"), layers_of(small, "llama"), strict=True):
        columns = layer.self_attn.o_proj.weight.data.T
        kept = other.self_attn.o_proj.weight.data.T
        stays = (columns[:, None] == kept[None]).all(-1).any(1)
        assert int(stays.sum()) == heads * 16
        columns[~stays] = 0
    assert close(logits(small, ids), logits(model, ids))


def test_sink_heads_go_first(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """The head with most attention to the first token, by stock eager attention, is gone."""
    folder = tiny_model("qwen3", num_key_value_heads=4)
    plan = planned(folder, "heads", tiny_text, heads=3, kv_heads=3, criterion="sink")
    run_cut(replace_compensate(plan), tmp_path / "out")
    tokenizer = text.tokenizer(folder)
    found = text.encode(tokenizer, text.read(str(tiny_text)), vocab=128)
    windows = text.windows(found, seq_len=64, samples=8, seed=0, bos=text.bos_token(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        seen = model.eval()(input_ids=windows, output_attentions=True).attentions
    small = stock(tmp_path / "out")
    for layer, other, weights in zip(model.model.layers, small.model.layers, seen, strict=True):
        most = int(weights[:, :, 1:, 0].mean((0, 2)).argmax())
        rows = layer.self_attn.q_proj.weight.reshape(4, 16, -1)
        kept = other.self_attn.q_proj.weight.reshape(3, 16, -1)
        gone = [i for i in range(4) if not any(torch.equal(rows[i], k) for k in kept)]
        assert gone == [most]


def replace_compensate(plan: CutPlan) -> CutPlan:
    method = plan.method.model_copy(update={"compensate": False})
    return replace(plan, method=method)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3_text", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("criterion", ["influence", "loss"])
def test_layers_that_go_are_left_out(
    arch: str,
    criterion: str,
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    """The original without the same layers and their types is the same model."""
    folder = tiny_model(arch)
    have = len(layers_of(stock(folder), arch))
    options: dict[str, Any] = {"layers": have - 1, "criterion": criterion, "compensate": False}
    plan = planned(folder, "depth", tiny_text, **options)
    made = run_cut(plan, tmp_path / "out")
    small = whole(made, plan, tmp_path / "out")
    assert made.stages[0].shape is not None
    kept = made.stages[0].shape.kept["layers"]
    assert len(kept) == have - 1

    def without(kept: list[int]) -> Tensor:
        model = stock(folder)
        layers = layers_of(model, arch)
        parent, _, leaf = ARCHITECTURES[arch].layers.rpartition(".")
        setattr(model.get_submodule(parent), leaf, nn.ModuleList([layers[i] for i in kept]))
        model.config.num_hidden_layers = len(kept)
        if getattr(model.config, "layer_types", None):
            model.config.layer_types = [model.config.layer_types[i] for i in kept]
        with torch.no_grad():
            found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    assert close(logits(small, ids), without(kept))
    others = [[i for i in range(have) if i != gone] for gone in range(have)]
    assert sum(close(logits(small, ids), without(other)) for other in others) == 1


def test_a_dense_layer_among_sparse_ones_stays(
    tiny_model: Callable[..., Path], tiny_text: Path, ids: Tensor, tmp_path: Path
) -> None:
    """Of qwen3_moe only layers with experts go, and config.json still says which is dense."""
    plan = planned(tiny_model("qwen3_moe"), "depth", tiny_text, layers=2)
    made = run_cut(plan, tmp_path / "out")
    model = whole(made, plan, tmp_path / "out")
    assert model.config.mlp_only_layers == [0]
    assert torch.isfinite(logits(model, ids)).all()
    with pytest.raises(UnicompError, match="can stay"):
        planned(tiny_model("qwen3_moe"), "depth", tiny_text, layers=3)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("arch", "stay"), [("mixtral", 3), ("mixtral", 1), ("qwen3_moe", 4)])
def test_experts_that_go_are_as_if_they_had_no_probability(
    arch: str,
    stay: int,
    fused: bool,
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    ids: Tensor,
    tmp_path: Path,
) -> None:
    """The original with those experts' router logits at minus infinity gives the same logits."""
    folder = tiny_model(arch, fused_experts=fused)
    plan = planned(folder, "experts", tiny_text, experts=stay, compensate=False)
    run_cut(plan, tmp_path / "out")
    small = whole(manifest.read(tmp_path / "out"), plan, tmp_path / "out")
    top = min(2, stay)
    assert small.config.num_experts_per_tok == top <= stay

    def masked(wrong: bool) -> Tensor:
        model = stock(folder)
        for layer, other in zip(layers_of(model, arch), layers_of(small, arch), strict=True):
            if not hasattr(layer.mlp, "gate"):
                continue
            weight, kept = layer.mlp.gate.weight.data, other.mlp.gate.weight.data
            assert kept.shape == (stay, weight.shape[1])
            stays = (weight[:, None] == kept[None]).all(-1).any(1)
            assert int(stays.sum()) == stay
            gone = stays.roll(1) if wrong else stays
            layer.mlp.gate.top_k = top
            layer.mlp.gate.forward = router(layer.mlp.gate, gone)
        return logits(model, ids)

    assert close(logits(small, ids), masked(False))
    assert not close(logits(small, ids), masked(True))


def router(gate: Any, stays: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Return a router that never chooses an expert that does not stay."""

    def forward(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = states.reshape(-1, states.shape[-1]) @ gate.weight.T
        found = found.masked_fill(~stays, -torch.inf)
        value, index = found.float().softmax(-1).topk(gate.top_k, -1)
        if getattr(gate, "norm_topk_prob", True):
            value = value / value.sum(-1, keepdim=True)
        return found, value, index

    return forward


def divergence(model: Path, held_out: str, folder: Path) -> float:
    report = score(folder, model, axes=["fidelity"], text=held_out, seq_len=256, bos=False)
    found = report.score("fidelity/kl").value
    assert found is not None
    return found


def hold_the_gain(model: Path, calibration: str, held_out: str, tmp_path: Path) -> None:
    """A quarter smaller by width and depth; refitting takes at least a quarter of the KL away."""
    for method in ("width", "depth"):
        found = {}
        for compensate in (True, False):
            out = tmp_path / f"{method}-{compensate}"
            options = {"sparsity": 0.25, "compensate": compensate}
            plan = planned(model, method, calibration, samples=128, seq_len=256, **options)
            whole(run_cut(plan, out), plan, out)
            assert plan.params <= 0.75 * plan.params_in
            found[compensate] = divergence(model, held_out, out)
        assert found[True] <= 0.75 * found[False], (method, found)


@pytest.mark.slow
def test_refitting_pays_on_tinyworld(tmp_path: Path) -> None:
    held_out = str(builtin.heldout("heldout.txt"))
    hold_the_gain(builtin.model("tinyworld"), "builtin:tinyworld", held_out, tmp_path)


@pytest.mark.slow
def test_refitting_pays_on_template_gpt(assets: Path, tmp_path: Path) -> None:
    texts = assets / "text/tinystories"
    calibration, held_out = str(texts / "train800.jsonl"), str(texts / "valid.txt")
    hold_the_gain(assets / "models/templateGPT-llama3-1M", calibration, held_out, tmp_path)

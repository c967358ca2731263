"""Models on packed weights: equal to the dense reference, whatever wrote the checkpoint."""

import copy
import json
import math
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unicomp
from unicomp import builtin, text
from unicomp.checkpoint import Checkpoint
from unicomp.errors import CheckpointError, UnsupportedError
from unicomp.kernels import attention, backend, cpu
from unicomp.kernels.dense import open_dense
from unicomp.kernels.linear import DenseLinear, PackedLinear
from unicomp.kernels.load import load as load_dense
from unicomp.kernels.norm import RMSNorm
from unicomp.kernels.packed_experts import PackedExperts
from unicomp.kernels.packed_model import loaded
from unicomp.kernels.stored import Stored
from unicomp.models import ARCHITECTURES
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options

pytestmark = pytest.mark.filterwarnings("ignore::unicomp.kernels.backend.MissingKernelWarning")

Tiny = Callable[..., Path]
IDS = torch.arange(4, 68).view(2, 32)


def quantize(
    model: Path, out: Path, method: str = "rtn", data: Path | None = None, **options: Any
) -> Path:
    """Quantize, with calibration if there is text for it, and return the folder."""
    form = options.pop("form", "compressed-tensors")
    text = None if data is None else {"data": str(data), "samples": 8, "seq_len": 64}
    recipe = from_options(
        "quantize", method, {"group_size": 16} | options, calibration=text, format=form
    )
    run(plan(recipe, model=str(model)), out)
    return out


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, **more: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, **more).logits
    return found.float()


def close(got: Tensor, wanted: Tensor, limit: float = 1e-4) -> bool:
    """Tell whether logits are equal to a part of their range."""
    return bool((got - wanted).abs().max() <= limit * wanted.abs().max())


def distance(got: Tensor, wanted: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence of the next-token distributions, in nats."""
    p, q = wanted.double().log_softmax(-1), got.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def packed_layers(model: torch.nn.Module) -> list[PackedLinear]:
    return [module for module in model.modules() if isinstance(module, PackedLinear)]


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_equals_the_dense_load(
    arch: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    folder = quantize(tiny_model(arch), tmp_path / "out", group_size=32)
    model = unicomp.load(folder, compute="exact")
    dense = load_dense(folder)
    assert close(logits(model), logits(dense))
    how = loaded(model)
    assert how.packed == len(packed_layers(model)) > 0
    assert how.packed_bytes == sum(layer.packed.numel() for layer in packed_layers(model))
    assert not how.dequantized
    assert not [name for name in model.state_dict() if name.endswith("gate_up_proj")]
    rounded = logits(unicomp.load(folder))
    quantized = distance(logits(dense), logits(load_dense(tiny_model(arch))))
    assert 0 < distance(rounded, logits(dense)) < 0.1 * quantized
    assert type(model) is type(dense)
    assert not model.training


def test_the_comparer_rejects_a_dropped_layer(tiny_model: Tiny, tmp_path: Path) -> None:
    model = unicomp.load(quantize(tiny_model("llama"), tmp_path / "out"), compute="exact")
    wanted = logits(model)
    layer = packed_layers(model)[-1]
    layer.packed.zero_()
    assert not close(logits(model), wanted, 1e-2)


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_widths_and_zero_points(
    arch: str, bits: int, symmetric: bool, tiny_model: Tiny, tmp_path: Path
) -> None:
    options = {"bits": bits, "symmetric": symmetric, "group_size": 32}
    folder = quantize(tiny_model(arch), tmp_path / "out", **options)
    model = unicomp.load(folder, compute="exact")
    assert close(logits(model), logits(load_dense(folder)))
    assert {layer.scheme.bits for layer in packed_layers(model)} == {bits}


@pytest.mark.parametrize("group", [-1, 32])
def test_three_values(group: int, tiny_model: Tiny, tiny_text: Path, tmp_path: Path) -> None:
    folder = quantize(tiny_model("llama"), tmp_path / "out", "ternary", tiny_text, group_size=group)
    model = unicomp.load(folder, compute="exact")
    assert {layer.kind for layer in packed_layers(model)} == {"trit5"}
    assert close(logits(model), logits(load_dense(folder)))


@pytest.mark.parametrize("arch", ["qwen2", "gpt2"])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_gptq_folder_gives_the_same(
    arch: str, bits: int, tiny_model: Tiny, tmp_path: Path
) -> None:
    source = tiny_model(arch, dtype=torch.float16, **SQUARE[arch])
    options = {"bits": bits, "group_size": 32}
    found = []
    for form in ("gptq", "compressed-tensors"):
        folder = quantize(source, tmp_path / form, form=form, **options)
        model = unicomp.load(folder, compute="exact", dtype=torch.float32)
        assert packed_layers(model)
        assert not loaded(model).dequantized
        found.append(logits(model))
    assert torch.equal(*found)


# Widths that gptq's words take.
SQUARE: dict[str, dict[str, int]] = {
    "qwen2": {"hidden_size": 64, "intermediate_size": 96},
    "gpt2": {"n_embd": 64, "n_inner": 96},
}


def test_an_order_of_columns_runs_dense(tiny_model: Tiny, tmp_path: Path) -> None:
    source = tiny_model("qwen2", dtype=torch.float16, **SQUARE["qwen2"])
    folder = quantize(source, tmp_path / "out", form="gptq", group_size=32)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.g_idx"
    tensors[name] = tensors[name].flip(0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = unicomp.load(folder, compute="exact", dtype=torch.float32)
    assert list(loaded(model).dequantized.values()) == [1]
    assert close(logits(model), logits(load_dense(folder)))


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe"])
def test_mixtures_in_every_format_and_dtype(
    arch: str, form: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    wide = {"intermediate_size": 64, **({} if arch == "mixtral" else {"moe_intermediate_size": 64})}
    source = tiny_model(arch, dtype=torch.float16, **wide)
    folder = quantize(source, tmp_path / "out", form=form, group_size=32)
    model = unicomp.load(folder, compute="exact", dtype=torch.float32)
    dense = load_dense(folder)
    experts = [own for own in model.modules() if isinstance(own, PackedExperts)]
    assert len(experts) == sum(own is not None for own in mixtures(dense)) > 0
    assert distance(logits(model), logits(dense)) < 1e-6
    half = unicomp.load(folder, compute="exact")
    stock = distance(logits(load_dense(folder, dtype=torch.float16)), logits(dense))
    assert distance(logits(half), logits(dense)) < 2 * stock + 1e-6
    experts[0].gate[1].packed.zero_()  # a token is sent to each, so this shows
    assert distance(logits(model), logits(dense)) > 1e-5


def mixtures(model: Any) -> list[Any]:
    """Return the experts of each layer, None where it has none."""
    return [getattr(layer.mlp, "experts", None) for layer in model.model.layers]


def test_a_layer_with_one_dense_expert_is_dense(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = quantize(tiny_model("mixtral"), tmp_path / "out", group_size=-1)
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.1.block_sparse_moe.experts.2.w3"
    packed = {name for name in tensors if name.startswith(f"{module}.weight")}
    weight = open_dense(Checkpoint.open(folder)).read(f"{module}.weight")
    tensors = {name: own for name, own in tensors.items() if name not in packed}
    tensors[f"{module}.weight"] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = unicomp.load(folder, compute="exact")
    first, second = mixtures(model)
    assert isinstance(first, PackedExperts)
    assert not isinstance(second, PackedExperts)
    assert list(loaded(model).dequantized.values()) == [11]
    assert close(logits(model), logits(load_dense(folder)))


M = "model.layers.0.mlp.fc"
ONE = torch.zeros(6, 1, dtype=torch.int32)
WORDS = {
    "weight_packed": torch.zeros(6, 4, dtype=torch.int32),
    "weight_scale": torch.ones(6, 1),
    "weight_shape": torch.tensor([6, 32]),
}
CHANNEL = {"num_bits": 4, "strategy": "channel"}


@pytest.mark.parametrize(
    ("weights", "more", "tensors", "module", "reason"),
    [
        (CHANNEL, {}, {}, M, None),
        ({"num_bits": 4, "group_size": -1, "strategy": None}, {}, {}, M, None),
        (CHANNEL, {}, {}, "model.layers.0.mlp.experts.0.up_proj", "not all"),
        (CHANNEL, {}, {"weight_g_idx": torch.zeros(32, dtype=torch.int32)}, M, "another order"),
        (CHANNEL, {"targets": ["re:never"]}, {}, M, "no target"),
        ({"num_bits": 4, "strategy": "tensor"}, {}, {"weight_scale": torch.ones(1)}, M, "share"),
        ({"num_bits": 4, "strategy": None}, {}, {"weight_scale": torch.ones(1)}, M, "share"),
        (
            {"num_bits": 4, "strategy": "block", "block_structure": [2, 32]},
            {},
            {"weight_scale": torch.ones(3, 1)},
            M,
            "share",
        ),
        ({"num_bits": 1, "strategy": "channel"}, {}, {"weight_packed": ONE}, M, "2 to 8 bits"),
        (
            {"num_bits": 3, "strategy": "channel"},
            {"version": "0.12.2"},
            {"weight_packed": torch.zeros(6, 4, dtype=torch.int32)},
            M,
            "before 0.18",
        ),
    ],
)
def test_what_kernels_do_not_take_is_dense_for_a_reason(
    weights: dict[str, Any],
    more: dict[str, Any],
    tensors: dict[str, Tensor],
    module: str,
    reason: str | None,
    tmp_path: Path,
) -> None:
    group = {"targets": more.pop("targets", ["Linear"]), "format": "pack-quantized"}
    group["weights"] = {"type": "int", "symmetric": True, **weights}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    config |= {"version": "0.20.0", "config_groups": {"group_0": group}, **more}
    stored = {f"{module}.{name}": tensor for name, tensor in (WORDS | tensors).items()}
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = {"model_type": "llama", "dtype": "float32", "quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    found = Stored(open_dense(Checkpoint.open(tmp_path)))
    if reason is None:
        assert found.linears == [f"{module}.weight"]
        assert not found.dense
        assert found.read(f"{module}.weight").codes.shape == (6, 32)
    else:
        assert not found.any
        ((said, count),) = found.dense.items()
        assert reason in said
        assert count == 1


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_plain_checkpoint_loads_as_it_is(arch: str, tiny_model: Tiny) -> None:
    folder = tiny_model(arch, dtype=torch.bfloat16)
    model = unicomp.load(folder)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(load_dense(folder, dtype=torch.bfloat16)))
    assert not packed_layers(model)
    assert loaded(model).backend is None


def test_names_of_models_are_taken_everywhere() -> None:
    model = unicomp.load("builtin:tinyworld")
    assert loaded(model).id == "builtin:tinyworld"
    with pytest.raises(CheckpointError, match="no-such-folder"):
        unicomp.load("./no-such-folder")


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_a_dense_head_keeps_its_weight_and_its_tie(
    arch: str, tiny_model: Tiny, tmp_path: Path
) -> None:
    model = unicomp.load(quantize(tiny_model(arch, dtype=torch.bfloat16), tmp_path / "out"))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert type(head) is DenseLinear
    assert (head.weight is table.weight) == (arch == "qwen2")
    one = IDS[:1, :1]
    whole = logits(model)[:1, :1]
    assert close(logits(model, one), whole, 2e-2)


@pytest.mark.parametrize(("arch", "norms"), [("llama", 7), ("qwen3", 9), ("gemma2", 0)])
def test_norms_of_llama_are_one_call_with_the_same_bits(
    arch: str, norms: int, tiny_model: Tiny, tmp_path: Path
) -> None:
    if backend.missing() is not None:
        pytest.skip("there is no C extension")
    model = unicomp.load(quantize(tiny_model(arch, dtype=torch.bfloat16), tmp_path / "out"))
    found, names = logits(model), set(model.state_dict())
    stock = type(model)(model.config)
    places = [name for name, own in model.named_modules() if isinstance(own, RMSNorm)]
    assert len(places) == norms
    for place in places:
        other: Any = stock.get_submodule(place)
        other.weight = model.get_submodule(place).weight
        model.set_submodule(place, other)
    assert torch.equal(logits(model), found)
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tiny_model: Tiny, tmp_path: Path) -> None:
    folder = quantize(tiny_model("llama", dtype=dtype), tmp_path / "out")
    model = unicomp.load(folder, compute="exact")
    assert model.dtype == dtype
    assert {module.dtype for module in model.parameters()} == {dtype}
    wanted = logits(load_dense(folder))
    stock = distance(logits(load_dense(folder, dtype=dtype)), wanted)
    assert 0 < distance(logits(model), wanted) < 1.5 * stock
    exact = unicomp.load(folder, compute="exact", dtype=torch.float32)
    assert close(logits(exact), wanted)
    exact.to(dtype)
    assert 0 < distance(logits(exact), wanted) < 1.5 * stock


@pytest.fixture(scope="module")
def tinyworld(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model in 4 bits."""
    out = tmp_path_factory.mktemp("tinyworld") / "out"
    return quantize(builtin.model("tinyworld"), out, group_size=32)


def prompts() -> tuple[Tensor, Tensor]:
    """Return ids [2, tokens], padded on the left, and their mask."""
    tokenizer = text.tokenizer(builtin.model("tinyworld"))
    rows = [tokenizer(words)["input_ids"] for words in ("There is a cat in the", "The opposite")]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


def test_generation_is_that_of_the_dense_model(tinyworld: Path) -> None:
    """Greedy, in a batch with padding, with the cache and without: token by token."""
    ids, mask = prompts()
    dense: Any = load_dense(tinyworld)
    model: Any = unicomp.load(tinyworld, compute="exact", dtype=torch.float32)
    words = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    wanted = dense.generate(input_ids=ids, attention_mask=mask, **words)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **words), wanted)
    slow = model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **words)
    assert torch.equal(slow, wanted)
    assert wanted.shape[1] > ids.shape[1]
    alone = ids[1:, mask[1].argmax() :]
    own = model.generate(input_ids=alone, attention_mask=torch.ones_like(alone), **words)
    end = alone.shape[1] + min(own.shape[1] - alone.shape[1], wanted.shape[1] - ids.shape[1])
    begin = int(mask[1].argmax())
    assert torch.equal(own[0, :end], wanted[1, begin : begin + end])


def test_copies_of_a_model(tinyworld: Path) -> None:
    model = unicomp.load(tinyworld)
    ids, mask = prompts()
    wanted = logits(model, ids, attention_mask=mask)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids, attention_mask=mask), wanted)
        assert loaded(other) == loaded(model)
        assert other.config._attn_implementation == attention.NAME
    harmed = unicomp.load(tinyworld)
    for layer in packed_layers(harmed):
        layer.packed.zero_()
    assert not torch.equal(logits(harmed, ids, attention_mask=mask), wanted)
    harmed.load_state_dict(model.state_dict())
    assert torch.equal(logits(harmed, ids, attention_mask=mask), wanted)
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        model.save_pretrained("anywhere")
    with pytest.raises(ValueError, match="not loaded by unicomp"):
        loaded(load_dense(tinyworld))


def test_a_short_step_leaves_torch_one_thread(tinyworld: Path) -> None:
    if backend.missing() is not None:
        pytest.skip("there is no C extension")
    model: Any = unicomp.load(tinyworld)
    seen = []

    def note(*_: object) -> None:
        seen.append((torch.get_num_threads(), cpu.threads()))
        if fail:
            raise RuntimeError("in the middle of a step")

    before, fail = torch.get_num_threads(), False
    torch.set_num_threads(3)
    try:
        for own in (pickle.loads(pickle.dumps(copy.deepcopy(model))), model):
            packed_layers(own)[0].register_forward_pre_hook(note)
            logits(own, torch.ones(1, 1, dtype=torch.int64))
            assert torch.get_num_threads() == 3
        logits(model, torch.ones(1, 9, dtype=torch.int64))
        assert seen == [(1, 3), (1, 3), (3, 3)]
        fail = True
        with pytest.raises(RuntimeError, match="in the middle"):
            logits(model, torch.ones(1, 1, dtype=torch.int64))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def perplexity(model: Any, windows: Tensor) -> float:
    """Return the perplexity of windows [n, tokens]."""
    total, count = 0.0, 0
    for rows in windows.split(8):
        found = logits(model, rows)[:, :-1].double().log_softmax(-1)
        total -= float(found.gather(-1, rows[:, 1:, None]).sum())
        count += rows[:, 1:].numel()
    return math.exp(total / count)


def differences(folder: Path, windows: Tensor) -> dict[str, float]:
    """Return by what part packed perplexity differs from that of the dequantized weights."""
    wanted = perplexity(load_dense(folder), windows)
    models = {
        compute: unicomp.load(folder, compute=compute, dtype=torch.float32)
        for compute in ("int8", "exact")
    }
    return {name: abs(perplexity(own, windows) / wanted - 1) for name, own in models.items()}


def test_perplexity_of_tinyworld(tinyworld: Path) -> None:
    found = text.read(str(builtin.heldout("heldout.txt")))
    ids = text.encode(text.tokenizer(tinyworld), found, vocab=1 << 16)
    windows = text.windows(ids, seq_len=128, samples=32, seed=0, bos=None)
    differ = differences(tinyworld, windows)
    assert differ["exact"] < 1e-4, differ
    assert 0 < differ["int8"] < 2e-3, differ


def test_perplexity_of_stories(assets: Path, tmp_path: Path) -> None:
    folder = quantize(assets / "models/stories260K", tmp_path / "out", group_size=32)
    found = text.read(str(assets / "text/tinystories/valid.txt"))
    ids = text.encode(text.tokenizer(folder), found, vocab=1 << 16)
    windows = text.windows(ids, seq_len=128, samples=32, seed=0, bos=None)
    differ = differences(folder, windows)
    assert differ["exact"] < 1e-4, differ
    assert 0 < differ["int8"] < 2e-3, differ


GROWTH = """
import re, sys
from pathlib import Path
from unicomp.kernels import load, packed_model

def peak():  # of this program: what getrusage says begins with the process that started it
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

which = {"packed": packed_model.load, "dense": load.load}[sys.argv[1]]
which(sys.argv[2])  # what the libraries take once
before = peak()
model = which(sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own count")
def test_loading_takes_little_more_than_the_file(tiny_model: Tiny, tmp_path: Path) -> None:
    """16 million weights: 62 MB in float32, 8 MB packed."""
    wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    folder = quantize(tiny_model("llama", **wide), tmp_path / "out", group_size=128)
    small = quantize(tiny_model("llama"), tmp_path / "small")
    size = (folder / "model.safetensors").stat().st_size
    assert 7e6 < size < 10e6
    growth = {}
    for which in ("packed", "dense"):
        command = [sys.executable, "-c", GROWTH, which, str(small), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        growth[which] = int(done.stdout)
    assert growth["packed"] < size + 16e6, growth
    assert growth["dense"] > 50e6, growth  # so that the figure above means something


def rewrite(source: Path, folder: Path, **tensors: Tensor) -> Path:
    """Copy a checkpoint with tensors replaced."""
    shutil.copytree(source, folder)
    found = load_file(folder / "model.safetensors")
    save_file(found | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_truncated_file_is_refused_by_name(tinyworld: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tinyworld, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        unicomp.load(folder)


MODULE = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight_packed", lambda t: t[:-1].clone()),
        ("weight_packed", lambda t: t[:, :-1].clone()),
        ("weight_scale", lambda t: t[:, :-1].clone()),
        ("weight_scale", lambda t: t * float("nan")),
        ("weight_shape", lambda t: t * 16),
        ("weight_shape", lambda t: -t),
    ],
)
def test_a_lying_file_is_refused_by_name(
    name: str, change: Callable[[Tensor], Tensor], tiny_model: Tiny, tmp_path: Path
) -> None:
    source = quantize(tiny_model("llama"), tmp_path / "out")
    tensor = load_file(source / "model.safetensors")[f"{MODULE}.{name}"]
    folder = rewrite(source, tmp_path / "lie", **{f"{MODULE}.{name}": change(tensor)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj"):
        unicomp.load(folder)


def test_a_config_that_lies_is_refused_by_name(tiny_model: Tiny, tmp_path: Path) -> None:
    folder = quantize(
        tiny_model("qwen2", **SQUARE["qwen2"]), tmp_path / "out", form="gptq", group_size=32
    )
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["group_size"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: own for name, own in tensors.items() if not name.endswith("g_idx")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.\d\."):
        unicomp.load(folder)


def test_wrong_words(tinyworld: Path) -> None:
    with pytest.raises(UnsupportedError, match="`fast`"):
        unicomp.load(tinyworld, compute="fast")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="`cuda`"):
        unicomp.load(tinyworld, device="cuda")
    with pytest.raises(UnsupportedError, match="`gpu`"):
        unicomp.load(tinyworld, backend="gpu")
    with pytest.raises(UnsupportedError, match="int8"):
        unicomp.load(tinyworld, dtype=torch.int8)


def test_a_whole_model_compiles(tinyworld: Path) -> None:
    model = unicomp.load(tinyworld)
    ids, _ = prompts()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        found = compiled(input_ids=ids, use_cache=False).logits
    # Compiled, torch attends; our attention in bfloat16 rounds some values to the other side.
    model.set_attn_implementation("sdpa")
    assert torch.equal(found.float(), logits(model, ids, use_cache=False))

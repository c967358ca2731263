"""Tiny models, tiny texts and the shared assets: what every test may ask for by name.

Test files cannot import one another (`--import-mode=importlib`, no `__init__.py`), so whatever two
of them need is a fixture here. `tiny_model` makes a random checkpoint for each architecture that
unicomp names, with the thing that makes that architecture hard, and with weights spread widely
enough that a dropped, swapped or transposed tensor shows in the logits (`test_tiny_models.py`
holds that).
"""

import json
import os
import random
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

VOCAB = 128
PAD, BOS, EOS, UNK = range(4)

# Sliding windows are shorter than any sequence that a test feeds (32 tokens or more).
WINDOW = 16

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}

ARCHITECTURES: Mapping[str, Mapping[str, Any]] = {
    # A width that neither a group of 32 nor a word of 8 codes divides; grouped KV heads.
    "llama": _DECODER | {"intermediate_size": 44, "num_hidden_layers": 3},
    # One KV head; a head dimension that is not hidden / heads; every layer slides.
    "mistral": _DECODER
    | {
        "intermediate_size": 52,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "sliding_window": WINDOW,
    },
    # Biases on q, k and v; a tied head; only the last layer slides.
    "qwen2": _DECODER
    | {
        "hidden_size": 48,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 2,
    },
    # Norms on q and k; a free head dimension; a tied head.
    "qwen3": _DECODER
    | {"hidden_size": 48, "intermediate_size": 52, "head_dim": 16, "tie_word_embeddings": True},
    # Norms scaled by 1 + weight, four of them in a layer; softcaps; alternating windows; tied head.
    "gemma2": _DECODER
    | {
        "intermediate_size": 44,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    # As gemma2, with norms on q and k and another rope base in the sliding layers.
    "gemma3_text": _DECODER
    | {
        "intermediate_size": 52,
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "num_hidden_layers": 3,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    # One projection holds q, k and v, another gate and up; windows everywhere.
    "phi3": _DECODER | {"intermediate_size": 44, "sliding_window": WINDOW},
    # Conv1D weights lie [in, out]; learnt positions; biases; q, k and v fused; a tied head.
    "gpt2": {
        "vocab_size": VOCAB,
        "n_positions": 256,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 52,
        "tie_word_embeddings": True,
    },
    # q, k and v fused head by head; biases; parallel residual; rope on a quarter of each head.
    "gpt_neox": {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 52,
        "max_position_embeddings": 256,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    },
    # Positions offset by two; biases; ReLU (many dead inputs); a tied head.
    "opt": {
        "vocab_size": VOCAB,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 52,
        "word_embed_proj_dim": 48,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    },
    # Norms after attention and MLP, and on the whole of q and k.
    "olmo2": _DECODER | {"intermediate_size": 44},
    # Experts (one 3-D tensor in memory, one file tensor per expert on disk) and a router.
    "mixtral": _DECODER
    | {"intermediate_size": 44, "num_local_experts": 4, "num_experts_per_tok": 2},
    # As mixtral, with norms on q and k; the first layer is dense and of another width.
    "qwen3_moe": _DECODER
    | {
        "num_hidden_layers": 3,
        "intermediate_size": 52,
        "moe_intermediate_size": 44,
        "head_dim": 16,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}

_WORDS = (
    "the a one little big old red green happy sad dog cat bird fish boy girl man tree house river "
    "saw took found lost made ate ran to went sat and but then so because with under over near in "
    "on day night sun moon rain said hello friend mother father play sing jump help very again"
).split()

_MERGES = (
    "t h|th e|Ġ th|Ġ a|h e|i n|e r|o n|a n|an d|Ġ s|Ġ b|Ġ f|e d|o u|r e|l l|o r|Ġ m|Ġ d|Ġ w|a t|i t"
).split("|")


@pytest.fixture(scope="session")
def assets() -> Path:
    """The shared models and texts: `$UNICOMP_ASSETS`, else `../shared/assets` by the repository.

    Skips where they are absent, and fails where the environment variable CI is set.
    """
    folder = Path(os.environ.get("UNICOMP_ASSETS") or ROOT / "../shared/assets").resolve()
    if not folder.is_dir():
        reason = f"no shared assets at `{folder}` (set UNICOMP_ASSETS)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(autouse=True)
def seeds() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def architectures() -> list[str]:
    """Every architecture that `tiny_model` makes."""
    return list(ARCHITECTURES)


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a byte-level BPE tokenizer of 128 ids that covers ASCII text.

    `<pad>`, `<s>`, `</s>`, `<unk>` are 0 to 3; encoding adds none of them; it has a chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<pad>", "<s>", "</s>", "<unk>", "Ċ", "Ġ", *map(chr, range(33, 127))]
    tokens += [merge.replace(" ", "") for merge in _MERGES]
    tokens += [f"<extra_{i}>" for i in range(VOCAB - len(tokens))]
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in _MERGES)]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `.jsonl` of 240 seeded stories (`text`) of some 60 words: 128 windows of 256 tokens."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(240):
            words = [rng.choice(_WORDS) for _ in range(rng.randrange(40, 80))]
            text = " ".join(words).capitalize() + ".\n"
            file.write(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_model(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path
) -> Callable[..., Path]:
    """A factory of tiny random checkpoints, each made once in a session; copy before harming one.

    `tiny_model(arch, dtype=torch.float32, shard_size="1GB", seed=0, fused_experts=False,
    **overrides)` returns the folder. `overrides` are fields of the architecture's config;
    `fused_experts` keeps 3-D expert tensors on disk as they are in memory.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(
        arch: str,
        *,
        dtype: torch.dtype = torch.float32,
        shard_size: str = "1GB",
        seed: int = 0,
        fused_experts: bool = False,
        **overrides: Any,
    ) -> Path:
        key = repr((arch, dtype, shard_size, seed, fused_experts, sorted(overrides.items())))
        if key in made:
            return made[key]
        config = AutoConfig.for_model(arch, **ARCHITECTURES[arch] | _IDS | overrides)
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _spread(model, seed)
        folder = tmp_path_factory.mktemp(arch)
        model.to(dtype).save_pretrained(
            folder, max_shard_size=shard_size, save_original_format=not fused_experts
        )
        for file in tiny_tokenizer.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        made[key] = folder
        return folder

    return make


@torch.no_grad()
def _spread(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter by its name, so that each matters and none depends on another's draw.

    Linear inputs are correlated (a low-rank embedding) and some columns are outliers: the case
    that separates a calibrated quantizer from round-to-nearest.
    """
    gemma = type(model).__name__.startswith("Gemma")
    for path, module in model.named_modules():
        kind = type(module).__name__
        for name, parameter in module.named_parameters(recurse=False):
            draw = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{path}.{name}".encode()))
            noise = torch.randn(parameter.shape, generator=draw)
            if "Norm" in kind and name == "weight":
                parameter.copy_(0.3 * noise + (0.0 if gemma else 1.0))
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "Embedding" in kind:
                parameter.copy_(_correlated(noise, draw))
            else:
                parameter.copy_(_with_outliers(noise, draw, rows=kind == "Conv1D"))


def _correlated(noise: Tensor, draw: torch.Generator) -> Tensor:
    """Return [vocab, hidden] with most of its variance in a few directions."""
    rank = noise.shape[1] // 6
    mix = torch.randn(rank, noise.shape[1], generator=draw)
    return 0.4 * noise[:, :rank] @ mix / rank**0.5 + 0.15 * noise


def _with_outliers(noise: Tensor, draw: torch.Generator, *, rows: bool) -> Tensor:
    """Return a weight of deviation 0.2 with two input columns three times as large."""
    axis = 0 if rows else noise.ndim - 1
    loud = torch.randperm(noise.shape[axis], generator=draw)[:2]
    weight = 0.2 * noise
    weight.index_copy_(axis, loud, 3 * weight.index_select(axis, loud))
    return weight


@pytest.fixture(scope="session")
def killed() -> Callable[[list[str], Path, int], None]:
    """Return the function that kills a command, by `kill -9`, so many times at random moments.

    The command lacks the folder, which is its last word; afterwards it may go on to its end. Where
    a process was done before its moment came, the next begins anew.
    """

    def run(command: list[str], out: Path, times: int) -> None:
        whole = subprocess.run(
            [*command, str(out)], check=True, stderr=subprocess.PIPE, text=True
        ).stderr
        shutil.rmtree(out)
        draw, lines, kills = random.Random(0), len(whole.splitlines()), 0
        for _ in range(4 * times):
            process = subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, text=True)
            moment = draw.randrange(1, lines)
            with process:
                assert process.stderr is not None
                for number, _line in enumerate(process.stderr, start=1):
                    if number == moment:
                        time.sleep(draw.random() / 20)
                        process.send_signal(signal.SIGKILL)
            if process.returncode == -signal.SIGKILL and not out.exists():
                kills += 1
            elif out.exists():
                shutil.rmtree(out)
            if kills == times:
                break
        assert kills == times
        subprocess.run([*command, str(out)], check=True)

    return run

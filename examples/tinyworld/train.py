"""Train the tokenizer and the models of tinyworld on the CPU, from the text of `generate.py`.

    python train.py tokenizer
    python train.py base
    python train.py pirate
    python train.py moe

Each command writes OUT/NAME in Hugging Face layout and OUT/NAME.log.json. The defaults are those of
the shipped models. Training stops after `--steps`, not by the clock, so a busy machine gives the
same training, later.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from muon import Muon
from network import (
    BOS,
    CONTEXT,
    DENSE,
    EOS,
    EPSILON,
    HEAD_DIM,
    PAD,
    SPARSE,
    THETA,
    VOCAB,
    Network,
    Shape,
    initial,
)
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"]
SPLIT = r"'[a-z]+| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+"  # every digit by itself
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|eos|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WARM_UP = 100  # steps
FLAT = 0.25  # share of the training at the full learning rate
BALANCE = 0.02  # weight of the balance loss
SAVE_SECONDS = 150


@dataclass(frozen=True, slots=True)
class Run:
    """What is trained, and the defaults it is trained with."""

    name: str
    shape: Shape
    steps: int
    lr: float
    init: str | None = None


RUNS = {
    "base": Run("tinyworld", DENSE, steps=1848, lr=5e-3),
    "pirate": Run("tinyworld-pirate", DENSE, steps=205, lr=1e-3, init="tinyworld"),
    "moe": Run("tinyworld-moe", SPARSE, steps=638, lr=5e-3),
}


def read_texts(path: Path) -> list[str]:
    """Return the `text` of every row of a JSON Lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


def make_tokenizer(data: Path, folder: Path) -> None:
    """Train the byte-level BPE tokenizer on a sixth of the text and some of the pirate register."""

    def texts() -> Iterator[str]:
        for name, every in (("train.jsonl", 6), ("pirate_train.jsonl", 40)):
            for text in read_texts(data / name)[::every]:
                for token in SPECIAL:
                    text = text.replace(token, "\n")
                yield text

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", BOS)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(), trainer)
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    print("vocabulary", len(tokenizer))


def pack(tokenizer: Any, texts: Sequence[str]) -> NDArray[np.int16]:
    """Return rows of one token more than the context, each starting with a new document.

    The last document of a row may be cut; one that would begin in its last 40 tokens fills it up
    and stands again, whole, at the start of the next. A row that is not full then is left out.
    """
    width = CONTEXT + 1
    rows: list[list[int]] = []
    row: list[int] = []
    for start in range(0, len(texts), 4096):
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts[start : start + 4096]):
            ids = [*encoding.ids, EOS]
            if len(row) + 40 > width:
                rows.append((row + ids)[:width])
                row = []
            row = row + ids
            if len(row) >= width:
                rows.append(row[:width])
                row = []
    whole = [row for row in rows if len(row) == width]
    return np.array(whole, dtype=np.int16).reshape(-1, width)


def save(network: Network, tokenizer: Any, folder: Path) -> None:
    """Write the model in Hugging Face layout, in bfloat16."""
    shape = network.shape
    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPSILON,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "dtype": "bfloat16",
    }
    model: Any
    if shape.experts:
        sizes["num_local_experts"] = shape.experts
        sizes["num_experts_per_tok"] = shape.experts_per_token
        model = MixtralForCausalLM(MixtralConfig(sliding_window=None, **sizes))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes))
    weights = {name: weight.detach().clone() for name, weight in network.weights.items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False, max_new_tokens=64
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restore(network: Network, folder: Path) -> None:
    """Start from a saved model."""
    state = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    with torch.no_grad():
        for name, weight in network.weights.items():
            weight.copy_(state[name])


class Batches:
    """Batches without end: every row once, in random order, then again in another."""

    def __init__(self, data: NDArray[np.int16], rows: int, seed: int) -> None:
        if len(data) < rows:
            raise SystemExit(f"error: {len(data)} rows of text, {rows} are needed for one batch")
        self._data = data
        self._rows = rows
        self._random = np.random.default_rng(seed)
        self._order: list[int] = []

    def first(self) -> tuple[Tensor, Tensor]:
        """Return the first rows, which do not count: for compiling."""
        return self._split(list(range(self._rows)))

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets, int64 [rows, tokens]."""
        if len(self._order) < self._rows:
            self._order = self._random.permutation(len(self._data)).tolist()
        return self._split([self._order.pop() for _ in range(self._rows)])

    def _split(self, chosen: list[int]) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(self._data[chosen].astype(np.int64))
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class Optimizers:
    """Muon for the matrices of a model from scratch, AdamW for all else; one learning rate."""

    def __init__(self, network: Network, *, scratch: bool) -> None:
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, weight in network.weights.items():
            # embedding and router are matrices by shape only: their rows stand for themselves
            listed = name.endswith(("embed_tokens.weight", "mlp.gate.weight"))
            by_muon = scratch and weight.dim() > 1 and not listed
            (matrices if by_muon else rest).append(weight)
        self._weights = matrices + rest
        self._muon = Muon(matrices, lr=0.0)
        self._adamw = torch.optim.AdamW(
            rest, weight_decay=0.0, lr=0.0, betas=(0.9, 0.97), eps=1e-9, fused=True
        )

    def step(self, lr: float) -> None:
        """Clip the gradients, use them, and drop them."""
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._muon.lr = lr
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._muon.step()
        for weight in self._weights:
            weight.grad = None


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Return the learning rate of a step: warm-up, a flat quarter, then a line down to 2%."""
    falling = max(0.0, (step / steps - FLAT) / (1 - FLAT))
    return highest * min(1.0, (step + 1) / WARM_UP) * (1 - 0.98 * falling)


@torch.no_grad()
def heldout_loss(network: Network, tokenizer: Any, path: Path) -> float:
    """Return the loss on consecutive windows of a text, in nats a token."""
    ids = tokenizer.backend_tokenizer.encode(path.read_text(encoding="utf-8")).ids
    count = (len(ids) - 1) // CONTEXT
    inputs = torch.tensor(ids[: count * CONTEXT]).view(count, CONTEXT)
    targets = torch.tensor(ids[1 : count * CONTEXT + 1]).view(count, CONTEXT)
    eager = Network(network.shape, network.weights, compiled=False)
    total = sum(
        eager.loss(inputs[row : row + 1], targets[row : row + 1])[0].item() for row in range(count)
    )
    return total / count


def train(run: Run, options: argparse.Namespace) -> None:
    """Train one model, saving it now and then and at the end."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    folder: Path = options.out / run.name
    tokenizer = AutoTokenizer.from_pretrained(options.out / "tokenizer")
    data = pack(tokenizer, read_texts(options.data / "train.jsonl"))
    if options.what == "pirate":
        pirate = pack(tokenizer, read_texts(options.data / "pirate_train.jsonl"))
        data = np.concatenate([pirate, data[: int(len(pirate) * options.keep)]])
    network = Network(run.shape, initial(run.shape), compiled=not options.eager)
    if run.init is not None:
        restore(network, options.init or options.out / run.init)
    start = {name: weight.detach().clone() for name, weight in network.weights.items()}
    optimizers = Optimizers(network, scratch=run.init is None)
    batches = Batches(data, options.rows, options.seed)
    parameters = sum(weight.numel() for weight in network.weights.values())
    print(f"{run.name}: {parameters:,} parameters, {data.size:,} tokens to train on", flush=True)

    began = time.monotonic()
    network.loss(*batches.first())[0].backward()
    for weight in network.weights.values():
        weight.grad = None
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)

    steps = options.steps or run.steps
    highest = options.lr or run.lr
    losses: list[float] = []
    began = told = saved = time.monotonic()
    for step in range(steps):
        inputs, targets = next(batches)
        loss, balance = network.loss(inputs, targets)
        (loss + BALANCE * balance).backward()
        optimizers.step(learning_rate(step, steps, highest))
        losses.append(loss.item())
        now = time.monotonic()
        if now - told > 15:
            told = now
            left = (now - began) / (step + 1) * (steps - step - 1)
            recent = float(np.mean(losses[-60:]))
            print(f"step {step + 1}/{steps}  loss {recent:.4f}  {left:.0f} s left", flush=True)
        if now - saved > SAVE_SECONDS:
            saved = now
            save(network, tokenizer, folder)
    save(network, tokenizer, folder)

    moved = sum((w.detach() - start[n]).pow(2).sum().item() for n, w in network.weights.items())
    log = {
        "name": run.name,
        "parameters": parameters,
        "seed": options.seed,
        "threads": options.threads,
        "steps": steps,
        "tokens": steps * options.rows * CONTEXT,
        "seconds": round(time.monotonic() - began, 1),
        "train_loss": round(float(np.mean(losses[-200:])), 4),
        "heldout_loss": round(
            heldout_loss(network, tokenizer, options.data / "eval" / "heldout.txt"), 4
        ),
        "relative_delta": round(
            math.sqrt(moved / sum(w.pow(2).sum().item() for w in start.values())), 4
        ),
    }
    (options.out / f"{run.name}.log.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log))


def main(arguments: Sequence[str]) -> None:
    """Train the tokenizer or one of the models."""
    parser = argparse.ArgumentParser(description="Train the tokenizer and models of tinyworld.")
    parser.add_argument("what", choices=["tokenizer", *RUNS])
    parser.add_argument("--data", type=Path, default=Path("data"), help="what generate.py wrote")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the models")
    parser.add_argument("--steps", type=int, help="default: as the shipped model")
    parser.add_argument("--rows", type=int, default=32, help="rows of 256 tokens a step")
    parser.add_argument("--lr", type=float, help="highest learning rate; default: as shipped")
    parser.add_argument("--init", type=Path, help="pirate: the model to start from")
    parser.add_argument(
        "--keep", type=float, default=0.15, help="pirate: ordinary rows for each pirate row"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args(arguments)
    if options.what == "tokenizer":
        make_tokenizer(options.data, options.out / "tokenizer")
    else:
        train(RUNS[options.what], options)


if __name__ == "__main__":
    main(sys.argv[1:])

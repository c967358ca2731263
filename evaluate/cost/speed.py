"""How fast a model, or one product, runs here, and how near that is to what memory gives.

A decode step reads every weight that it multiplies with once, so that memory sets its speed: bytes
of those weights times tokens per second is the rate achieved, and its share of a plain read of
memory, measured between the same rounds on as many threads, says what is left to gain. Prefill is
bound by arithmetic and measured apart. Each figure is the median of rounds, with their range.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from unicomp import machine
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.kernels import backend as backends
from unicomp.kernels.blocked import Blocked, Compute, Kind
from unicomp.kernels.linear import PackedLinear, check_compute
from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.kernels.packed_experts import PackedExperts
from unicomp.kernels.packed_model import load, loaded

MODEL_SCHEMA = "unicomp.bench.model/1"
KERNELS_SCHEMA = "unicomp.bench.kernels/1"
READ_BYTES = 256 << 20
READ_METHOD = f"sum of int64 by torch over {READ_BYTES >> 20} MiB in pages as weights have them"
COLD_BYTES = 512 << 20
"""Bytes of distinct weights between two products with the same one: more than caches hold."""

Progress = Callable[[int, int], None]

SCHEMES: dict[Kind, Scheme] = {
    "int8": Scheme(8, -1),
    "int4": Scheme(4, 128),
    "int2": Scheme(2, 128),
    "trit5": Scheme(2, -1),
}
"""Kind -> the scheme that `kernels` measures it with."""


def model(
    path: str,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    rounds: int = 5,
    threads: int | None = None,
    compute: Compute = "int8",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure loading, prefill and greedy decode of a model, as `generate` runs it.

    path           a folder, a Hub id or `builtin:NAME`
    prompt_tokens  of random ids; prefill is the time to the first token after them
    new_tokens     each decoded alone, the first left out of the rate: prefill made it
    threads        None: as many as torch uses
    progress       called with the rounds done and the rounds in all

    Raises UnicompError where the tokens do not fit the model's context.
    """
    if new_tokens < 2:
        raise UnicompError(f"{new_tokens} new tokens give no rate", hint="use 2 or more")
    with _threads(threads) as count:
        network: Any = load(path, compute=compute)
        after_load = machine.peak_rss_bytes()
        context = getattr(network.config, "max_position_embeddings", None)
        if context is not None and prompt_tokens + new_tokens > context:
            raise UnicompError(
                f"{prompt_tokens} + {new_tokens} tokens do not fit the context of {context}",
                hint="use a smaller `--prompt-tokens` or `--new-tokens`",
            )
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(network.config.vocab_size, (1, prompt_tokens), generator=draw)
        generate(network, ids, new_tokens)  # what is set up once
        peak = machine.peak_rss_bytes()
        memory = _Memory()
        prefill, decode = [], []
        for done in range(rounds):
            memory.read()
            times = generate(network, ids, new_tokens)
            prefill.append(prompt_tokens / (times[1] - times[0]))
            decode.append((new_tokens - 1) / (times[-1] - times[1]))
            if progress is not None:
                progress(done + 1, rounds)
    weights = bytes_per_token(network)
    rate, reading = spread(decode), memory.result()
    achieved = weights * rate["median"] / 1e9
    return {
        "schema": MODEL_SCHEMA,
        "loaded": loaded(network).to_json(),
        "threads": count,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "prefill_tokens_per_s": spread(prefill),
        "decode_tokens_per_s": rate,
        "weight_bytes_per_token": weights,
        "decode_gb_per_s": achieved,
        "share_of_read": achieved / reading["gb_per_s"]["median"],
        "read": reading,
        "peak_rss_bytes": {"load": after_load, "run": peak},
        "machine": machine.describe(),
        "versions": machine.versions(),
    }


def bytes_per_token(network: PreTrainedModel) -> int:
    """Return the bytes of weights that decoding one token reads.

    All linears and the head, packed or not; of experts, those that a token is sent to; neither an
    embedding's table, of which a token reads a row, nor the cache of keys and values.
    """
    config: Any = network.config
    total = 0
    for path, module in network.named_modules():
        if isinstance(module, PackedExperts):
            every = sum(buffer.nbytes for buffer in module.buffers())
            total += every * int(config.num_experts_per_tok) // module.num_experts
        elif isinstance(module, PackedLinear):
            total += 0 if ".experts." in path else module.packed.nbytes
        elif isinstance(module, nn.Linear | Conv1D):
            total += module.weight.nbytes
        elif path.endswith(".experts"):
            for weight in module.parameters(recurse=False):
                total += weight.nbytes * int(config.num_experts_per_tok) // weight.shape[0]
    return total


def kernels(
    shapes: Sequence[tuple[int, int]],
    kinds: Sequence[Kind],
    tokens: Sequence[int],
    *,
    rounds: int = 7,
    threads: int | None = None,
    compute: Compute = "int8",
    backend: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure products of bfloat16 activations with random packed weights of every shape and kind.

    shapes  (out, in) of each weight
    tokens  rows of activations in a product

    The weights take turns, copies of one, so that each comes from memory as it does in a model.
    """
    check_compute(compute)
    unknown = [kind for kind in kinds if kind not in get_args(Kind)]
    if unknown:
        raise UnsupportedError(
            f"unknown kind `{unknown[0]}`", hint=f"use some of {', '.join(get_args(Kind))}"
        )
    chosen = backends.choose(backend)
    cases = [(shape, kind) for shape in shapes for kind in kinds]
    rows: list[dict[str, Any]] = []
    with _threads(threads) as count:
        memory = _Memory()
        for done, (shape, kind) in enumerate(cases):
            weight = backends.block(_random(shape, kind), kind)
            size = weight.data.nbytes
            copies = [weight, *(_copy(weight) for _ in range(min(COLD_BYTES // size, 512)))]
            for amount in tokens:
                memory.read()
                seconds = spread(_products(copies, amount, rounds, compute, chosen))
                median = seconds["median"]
                rows.append(
                    {
                        "out": shape[0],
                        "in": shape[1],
                        "kind": kind,
                        "tokens": amount,
                        "bytes": size,
                        "copies": len(copies),
                        "seconds": seconds,
                        "gb_per_s": size / median / 1e9,
                        "gflop_per_s": 2 * amount * shape[0] * shape[1] / median / 1e9,
                    }
                )
            del copies, weight
            if progress is not None:
                progress(done + 1, len(cases))
    reading = memory.result()
    for row in rows:
        row["share_of_read"] = row["gb_per_s"] / reading["gb_per_s"]["median"]
    return {
        "schema": KERNELS_SCHEMA,
        "backend": chosen,
        "isa": backends.isa(chosen),
        "missing": backends.missing(),
        "compute": compute,
        "threads": count,
        "rounds": rounds,
        "products": rows,
        "read": reading,
        "machine": machine.describe(),
        "versions": machine.versions(),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median, the range and the values of some rounds."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": list(values),
    }


class _Memory:
    """Reads a block of memory between the rounds of something else."""

    def __init__(self) -> None:
        self.block = backends.allocate(READ_BYTES).fill_(1).view(torch.int64)
        self.rates: list[float] = []

    def read(self) -> None:
        """Add the best of three reads."""
        best = float("inf")
        for _ in range(3):
            began = time.perf_counter()
            self.block.sum()
            best = min(best, time.perf_counter() - began)
        self.rates.append(READ_BYTES / best / 1e9)

    def result(self) -> dict[str, Any]:
        """Return what was read, in GB/s, and how."""
        return {"gb_per_s": spread(self.rates), "how": READ_METHOD}


class _Clock:
    """A streamer that notes when each token came; the prompt is the first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Do nothing more."""


def generate(network: Any, ids: Tensor, count: int) -> list[float]:
    """Return the times at which the prompt went in and each of exactly `count` tokens came."""
    clock = _Clock()
    with torch.inference_mode():
        network.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
            streamer=clock,
        )
    return clock.times


@contextmanager
def _threads(count: int | None) -> Iterator[int]:
    """Compute on this many threads, in torch and in the kernels, and yield how many that is."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
        backends.set_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
        if count is not None:
            backends.set_threads(None)


def _random(shape: tuple[int, int], kind: Kind) -> PackedTensor:
    """Return random codes that fill a kind, seeded."""
    draw = torch.Generator().manual_seed(0)
    scheme = SCHEMES[kind]
    low, high = (-1, 1) if kind == "trit5" else scheme.code_range
    codes = torch.randint(low, high + 1, shape, dtype=torch.int8, generator=draw)
    scale = torch.rand((shape[0], scheme.groups(shape[1])), generator=draw) + 0.5
    return PackedTensor(codes, scale.to(torch.bfloat16), None, scheme)


def _copy(weight: Blocked) -> Blocked:
    data = backends.allocate(weight.data.numel()).copy_(weight.data)
    return Blocked(data, weight.kind, weight.shape, weight.scheme, weight.scale_dtype)


def _products(
    copies: Sequence[Blocked], tokens: int, rounds: int, compute: Compute, backend: str
) -> list[float]:
    """Return the seconds of a product in each round, a round being a tour of the copies."""
    x = torch.randn(tokens, copies[0].shape[1], dtype=torch.bfloat16)
    seconds = []
    with torch.inference_mode():
        backends.multiply(x, copies[0], None, compute=compute, backend=backend)
        for _ in range(rounds):
            began, count = time.perf_counter(), 0
            for weight in copies:
                backends.multiply(x, weight, None, compute=compute, backend=backend)
                count += 1
                if time.perf_counter() - began > 0.5:
                    break  # a slow one is not cached between two rounds either
            seconds.append((time.perf_counter() - began) / count)
    return seconds

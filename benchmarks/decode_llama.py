"""How much faster does a packed model decode than the bfloat16 model in transformers?

One question, several sides, one machine, one run: a random Llama of 1.1 billion parameters
(hidden 2048, FFN 5632, 22 layers, 32 heads on 4 of keys and values, vocabulary 32000, untied head)
as bfloat16 in stock transformers (`bf16`), and the same model run packed by `unicomp.load`: 4 bits
in groups of 128 (`int4`), and its layers' weights as -1, 0 and 1 with a scale a row (`ternary`).
Round-to-nearest makes them: speed does not ask how codes were found, and a random model is worth
nothing anyway.

Every side is a process of its own, so that its peak memory is its own; all are alive at once and
take turns, round by round, each resting while another computes. A round is `generate` as a user
calls it: a prompt of 512 random tokens, then 64 tokens one by one. Prefill is the time to the first
token, decode the rate of the others. Right before, a side generates two tokens untimed: a virtual
machine takes back the pages of a process that rests.

The timings count only if the products are right. With exact activations, each packed side's logits
of a prompt may differ from those of its own dequantized weights in float32 little more than the
same weights in stock bfloat16 do; with rounded ones, as timed, each product may differ from the
exact one by what rounding costs.

Run:  python benchmarks/decode_llama.py --threads 2 --rounds 5
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from quantize_llama import commit

HERE = Path(__file__).resolve().parent
SIDES = ("bf16", "int4", "ternary")
SIZES = {
    "full": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    "small": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4},
}
VOCAB = 32000
PROMPT, NEW, CHECKED, STEPS = 512, 64, 32, 16  # tokens
WRONG_LOGITS = 1.5
"""Times the error of bfloat16 alone: from there on a side's logits, and timings, do not count."""
WRONG_PRODUCT = 0.02
"""Relative error of a product by rounding activations from which nothing counts; 0.007 is usual."""


def make_model(folder: Path, size: str) -> None:
    """Write a seeded random Llama in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=VOCAB,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **SIZES[size],
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def quantize(model: Path, out: Path, *options: str) -> None:
    """Quantize by plain rounding."""
    command = [sys.executable, "-m", "unicomp", "quantize", str(model), "--out", str(out)]
    subprocess.run(
        [
            *command,
            "--method",
            "rtn",
            "--scale-search",
            "minmax",
            *options,
            "--overwrite",
            "--quiet",
        ],
        check=True,
    )


def make_ternary(folder: Path) -> None:
    """Turn the codes of a 2-bit checkpoint from -2..1 into -1..1, in place."""
    from safetensors.torch import load_file, save_file

    from unicomp.kernels.packed import pack_words, unpack_words

    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, words in tensors.items():
            if name.endswith(".weight_packed"):
                columns = int(tensors[name.removesuffix("packed") + "shape"][1])
                tensors[name] = pack_words(unpack_words(words, 2, columns).clamp(min=-1), 2)
        save_file(tensors, shard, metadata={"format": "pt"})
    (folder / "unicomp.json").unlink(missing_ok=True)  # its hashes are another file's


def prompt(count: int) -> Any:
    """Return int64 [1, count] random ids."""
    import torch

    return torch.randint(VOCAB, (1, count), generator=torch.Generator().manual_seed(1))


def dequantized_logits(folder: Path, to: Path) -> None:
    """Write the logits of a checkpoint's dequantized weights, in float32 and in bfloat16."""
    import torch

    from unicomp.kernels.load import load

    with torch.inference_mode():
        model = load(folder)
        wide = model(prompt(CHECKED)).logits
        narrow = model.to(torch.bfloat16)(prompt(CHECKED)).logits
    torch.save({"float32": wide, "bfloat16": narrow.float()}, to)


def check(model: Any, reference: str) -> dict[str, float]:
    """Return relative errors of a packed model: of its logits, and the largest of a product.

    Two weights that have each other's place must show: `swapped_logits` is what they make of it.
    """
    import torch

    from unicomp.kernels.linear import PackedLinear

    wanted = torch.load(reference)
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    draw = torch.Generator().manual_seed(2)

    def error(got: Any, wanted: Any) -> float:
        return float((got.float() - wanted).norm() / wanted.norm())

    found = {"bfloat16_logits": error(wanted["bfloat16"], wanted["float32"]), "product": 0.0}
    with torch.inference_mode():
        found["logits"] = error(model(prompt(CHECKED)).logits, wanted["float32"])
        for layer in layers:
            layer.compute = "exact"
        found["exact_logits"] = error(model(prompt(CHECKED)).logits, wanted["float32"])
        one, other = [layer for layer in layers if layer.in_features > layer.out_features][:2]
        one.packed, other.packed = other.packed, one.packed
        found["swapped_logits"] = error(model(prompt(CHECKED)).logits, wanted["float32"])
        one.packed, other.packed = other.packed, one.packed
        for layer in layers:
            x = torch.randn(1, layer.in_features, generator=draw)
            exact = layer(x)
            layer.compute = "int8"
            found["product"] = max(found["product"], error(layer(x), exact))
    return found


def profile(model: Any, ids: Any) -> dict[str, Any]:
    """Return where a decode step after a prompt spends its time, in milliseconds.

    step         a whole one, and of it
    linears      all linears of the layers, by a clock around each
    head         the last linear
    operators    of torch, by its profiler, those that take most; inside linears too
    """
    import torch
    from torch import nn
    from torch.profiler import ProfilerActivity

    from unicomp.kernels.linear import PackedLinear

    spent: dict[str, float] = {"linears": 0.0, "head": 0.0}
    began = 0.0

    def before(*_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(module: nn.Module, *_: object) -> None:
        part = "head" if module is model.lm_head else "linears"
        spent[part] += time.perf_counter() - began

    with torch.inference_mode():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

        def step(count: int) -> float:
            began = time.perf_counter()
            for _ in range(count):
                model(ids[:, :1], past_key_values=cache, use_cache=True)
            return 1e3 * (time.perf_counter() - began) / count

        step(2)
        found: dict[str, Any] = {"step": step(STEPS)}
        hooks = []
        for module in model.modules():
            if isinstance(module, nn.Linear | PackedLinear):
                hooks.append(module.register_forward_pre_hook(before))
                hooks.append(module.register_forward_hook(after))
        step(STEPS)
        for hook in hooks:
            hook.remove()
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as seen:
            step(STEPS)
    found |= {part: 1e3 * seconds / STEPS for part, seconds in spent.items()}
    own = {one.key: one.self_cpu_time_total / 1e3 / STEPS for one in seen.key_averages()}
    most = sorted(own, key=lambda key: -own[key])[:10]
    return found | {"operators": {key: own[key] for key in most}}


def serve(pipe: Connection, side: str, folder: str, threads: int, reference: str) -> None:
    """Hold one side's model and answer `check`, `round`, `profile` and `memory`."""
    import torch

    from unicomp import machine
    from unicomp.evaluate.cost.speed import generate

    torch.set_num_threads(threads)
    began = time.perf_counter()
    about: dict[str, Any] = {}
    if side == "bf16":
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    else:
        from unicomp.kernels.packed_model import load, loaded

        model = load(folder)
        about = loaded(model).to_json()
    pipe.send({"load_s": time.perf_counter() - began, "loaded": about})
    ids = prompt(PROMPT)
    while (asked := pipe.recv()) is not None:
        if asked == "check":
            pipe.send(check(model, reference))
        elif asked == "round":
            generate(model, ids[:, :8], 2)  # pages that lay idle are read again, untimed
            times = generate(model, ids, NEW)
            prefill = PROMPT / (times[1] - times[0])
            pipe.send({"prefill": prefill, "decode": (NEW - 1) / (times[-1] - times[1])})
        elif asked == "profile":
            pipe.send(profile(model, ids))
        elif asked == "memory":
            pipe.send(machine.peak_rss_bytes())


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a process of its own, so that this one stays small."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def read_rate(threads: int) -> float:
    """Return GB/s of a plain read of memory, best of a few."""
    import torch

    from unicomp.kernels import backend

    torch.set_num_threads(threads)
    block = backend.allocate(512 << 20).fill_(1).view(torch.int64)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - began)
    return block.nbytes / best / 1e9


def prepare(work: Path, size: str, sides: list[str]) -> dict[str, Path]:
    """Make what each side needs, once, and return its folder."""
    folders = {"bf16": work / "model", "int4": work / "int4", "ternary": work / "ternary"}
    if not (folders["bf16"] / "config.json").exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        apart(make_model, folders["bf16"], size)
    if "int4" in sides and not folders["int4"].exists():
        quantize(folders["bf16"], folders["int4"], "--bits", "4", "--group-size", "128")
    if "ternary" in sides and not folders["ternary"].exists():
        quantize(folders["bf16"], work / "two", "--bits", "2", "--group-size", "-1")
        apart(make_ternary, work / "two")
        (work / "two").rename(folders["ternary"])
    for side in sides:
        if side != "bf16" and not (work / f"{side}.pt").exists():
            apart(dequantized_logits, folders[side], work / f"{side}.pt")
    return folders


def measure(options: argparse.Namespace, work: Path, folders: dict[str, Path]) -> dict[str, Any]:
    """Start the sides, check them, let them take turns, and return what each gave."""
    from unicomp.evaluate.cost.speed import spread

    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    sides: dict[str, dict[str, Any]] = {}
    processes = []
    try:
        for side in options.sides:
            pipes[side], theirs = context.Pipe()
            arguments = (theirs, side, str(folders[side]), options.threads, f"{work / side}.pt")
            processes.append(context.Process(target=serve, args=arguments, daemon=True))
            processes[-1].start()
            sides[side] = pipes[side].recv()

        def ask(side: str, what: str) -> Any:
            pipes[side].send(what)
            return pipes[side].recv()

        for side in options.sides:
            if side != "bf16":
                errors = sides[side]["relative_errors"] = ask(side, "check")
                print(f"{side}: relative errors {errors}", file=sys.stderr)
                most = WRONG_LOGITS * errors["bfloat16_logits"]
                if not (errors["exact_logits"] < most and errors["product"] < WRONG_PRODUCT):
                    raise SystemExit(f"{side} computes something else")
                if not errors["swapped_logits"] > most:
                    raise SystemExit(f"{side}: two weights in the wrong place do not show")
            ask(side, "round")
        rounds: dict[str, list[dict[str, float]]] = {side: [] for side in options.sides}
        for number in range(1, options.rounds + 1):
            for side in options.sides:
                rounds[side].append(ask(side, "round"))
                time.sleep(options.pause)
                found = rounds[side][-1]
                print(
                    f"{number} {side}: prefill {found['prefill']:.0f}, "
                    f"decode {found['decode']:.1f} tokens/s",
                    file=sys.stderr,
                )
        for side in options.sides:
            for what in ("prefill", "decode"):
                values = [one[what] for one in rounds[side]]
                sides[side][f"{what}_tokens_per_s"] = spread(values)
            sides[side]["peak_rss_bytes"] = ask(side, "memory")
            sides[side]["profile_ms"] = ask(side, "profile")
            pipes[side].send(None)
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return sides


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="of each side, in turn")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.5, help="seconds after each round")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--work", type=Path, default=Path("build/decode_llama"))
    parser.add_argument("--out", type=Path, help="JSON file; default: in benchmarks/results")
    return parser.parse_args()


def main() -> None:
    """Measure all sides in turn and store the figures."""
    options = parse()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    work = options.work.absolute() / options.size
    folders = prepare(work, options.size, options.sides)
    before = apart(read_rate, options.threads)
    sides = measure(options, work, folders)
    from unicomp import machine

    result: dict[str, Any] = {
        "schema": "unicomp.benchmark/1",
        "benchmark": "decode_llama",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "threads": options.threads,
        "model": SIZES[options.size] | {"vocab_size": VOCAB, "dtype": "bfloat16"},
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "codes": "by plain rounding (`rtn`): the weights are random, and speed does not ask",
        "read_gb_per_s": {"before": before, "after": apart(read_rate, options.threads)},
        "sides": sides,
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    if "bf16" in sides:
        base = sides["bf16"]
        result["times_bf16"] = {
            side: {
                key: found[key]["median"] / base[key]["median"]
                for key in ("prefill_tokens_per_s", "decode_tokens_per_s")
            }
            for side, found in sides.items()
            if side != "bf16"
        }
        print(json.dumps(result["times_bf16"], indent=1))
    name = "decode_llama.json" if options.size == "full" else f"decode_llama_{options.size}.json"
    out = options.out or HERE / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()

"""How long, and in how much memory, does GPTQ quantize a model here and with llm-compressor?

One question, two tools, one machine, one run: a random Llama (hidden 1024, FFN 2816, 12 layers,
163 million parameters, bfloat16) is quantized to 4 bits in groups of 128, symmetric, calibrated on
32 x 512 tokens, by `unicomp quantize` and by llm-compressor in a virtual environment of its own,
in turn. Each is a whole process as its user would start it, watched from outside: wall seconds,
processor seconds and peak resident memory as the kernel counts them. `README.md` says how each
side is set up and why. Before each of its turns a side's libraries are imported once, untimed:
while the other side has its turn this machine may forget them, and disks are not the question.

The timings count only if the results are right, so the outputs of both are loaded by stock
transformers and compared with the original in float32 first: relative error of the logits, of
each layer's output, and KL divergence, on tokens that neither side has seen.

Run:  python benchmarks/quantize_llama.py --rounds 3
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEER = ("torch==2.13.0", "llmcompressor==0.14.0.1")
SAMPLES, SEQ_LEN, HELDOUT = 32, 512, 8
SIZES = {
    "full": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12},
    "small": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2},
}
VOCAB = 4096
# The peer's algorithm, and what our users get: also made up for are the input's drift, and by one
# sweep of coordinate descent what nearest plane left.
OUR_MODULES = "unicomp.recipes.layers.run, unicomp.cli.main"
OURS = {"ours": ["--drift", "0", "--sweeps", "0"], "ours-default": []}


def make_model(folder: Path, size: str, dtype: str) -> None:
    """Write a seeded random Llama, its tokenizer, and texts of the tokens both sides will see.

    Default initialisation gives activations that are nearly white, where every quantizer looks
    alike. So the embedding gets a decaying spectrum and the norms get spread gains with a few
    large channels, as trained models have, and the text is a Markov chain over a Zipf law.
    """
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **SIZES[size],
    )
    model = LlamaForCausalLM(config)
    hidden = config.hidden_size
    with torch.no_grad():
        spectrum = torch.arange(1, hidden + 1).float().rsqrt()
        basis = torch.linalg.qr(torch.randn(hidden, hidden))[0]
        embedding = torch.randn(VOCAB, hidden) * spectrum @ basis
        model.model.embed_tokens.weight.copy_(0.02 * embedding / embedding.std())
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                gain = torch.exp(0.4 * torch.randn(hidden))
                gain[torch.randperm(hidden)[: hidden // 100]] *= 8
                parameter.copy_(gain)
    model.to(getattr(torch, dtype)).save_pretrained(folder)

    words = {f"w{i:04}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0000"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)

    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, VOCAB + 1)
    common = random.choice(VOCAB, size=1 << 16, p=weights / weights.sum())
    followers = random.choice(common, size=(VOCAB, 8))
    ids = [0]
    for _ in range((SAMPLES + HELDOUT) * SEQ_LEN - 1):
        row = followers[ids[-1]]
        ids.append(int(random.choice(row) if random.random() < 0.7 else random.choice(common)))
    windows = np.array(ids).reshape(-1, SEQ_LEN)
    np.save(folder.parent / "calibration.npy", windows[:SAMPLES])
    np.save(folder.parent / "heldout.npy", windows[SAMPLES:])
    text = "\n".join(" ".join(f"w{i:04}" for i in row) for row in windows[:SAMPLES])
    (folder.parent / "calibration.txt").write_text(text)


def run_peer(model_folder: str, out: str, tokens: str, batch_size: int, dtype: str) -> None:
    """Quantize as llm-compressor's own examples do; runs in the peer's environment."""
    import numpy as np
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids = np.load(tokens)
    data = Dataset.from_dict(
        {"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()}
    )
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        batch_size=batch_size,
        pipeline="sequential",
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def compare(original: Path, quantized: Path, tokens: Path) -> dict[str, Any]:
    """Measure the output error of a quantized folder, loaded by stock transformers, in float32.

    returns  relative errors (norm of the difference by norm of the original's), KL in nats
    """
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(np.load(tokens))
    expected = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    actual, info = AutoModelForCausalLM.from_pretrained(
        quantized, dtype=torch.float32, output_loading_info=True
    )
    wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys") if info[key]}
    if wrong:
        raise SystemExit(f"{quantized.name} does not load whole: {wrong}")
    actual.eval()
    layers = expected.config.num_hidden_layers
    above, below, kl = torch.zeros(layers + 2), torch.zeros(layers + 2), 0.0
    with torch.no_grad():
        for row in ids:
            outs = [model(row[None], output_hidden_states=True) for model in (expected, actual)]
            pairs = list(zip(outs[0].hidden_states, outs[1].hidden_states, strict=True))
            pairs.append((outs[0].logits, outs[1].logits))
            above += torch.stack([(b - a).square().sum() for a, b in pairs])
            below += torch.stack([a.square().sum() for a, _ in pairs])
            p, q = (out.logits[0].log_softmax(-1) for out in outs)
            kl += (p.exp() * (p - q)).sum(-1).mean().item() / len(ids)
    error = (above / below).sqrt().tolist()
    # hidden_states: the embedding, then each layer; the last one has passed the final norm.
    return {"logits": error[-1], "layers": error[1:-1], "kl_nats": kl}


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a process of its own.

    A child's peak memory, as Linux counts it, starts from that of the process that started it, so
    this one must stay small.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measured(command: list[str], log: Path) -> dict[str, float]:
    """Run a whole process and return what the kernel says of it."""
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
    wall = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{log.read_text(errors='replace')[-3000:]}")
    unit = 1 if platform.system() == "Darwin" else 1024
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * unit,
    }


def warm(side: str, command: list[str]) -> None:
    """Bring into the page cache what a side is going to import."""
    modules = "llmcompressor, llmcompressor.modifiers.gptq" if side == "peer" else OUR_MODULES
    start = f"import {modules}, transformers.models.llama.modeling_llama"
    subprocess.run([command[0], "-c", start], check=True, capture_output=True)


def peer_python(venv: Path) -> Path:
    """Return the Python of the peer's environment, made on demand."""
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"making {venv} for {PEER[1]}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        # torch first and alone: the pin keeps what comes after from bringing another build of it.
        subprocess.run([*pip, PEER[0]], check=True)
        subprocess.run([*pip, *PEER], check=True)
    return python


def peer_versions(python: Path) -> dict[str, str]:
    """Return the releases in the peer's environment that decide its result."""
    names = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [str(python), "-c", code, *names], check=True, capture_output=True, text=True
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def commit() -> str:
    """Return the commit measured, with `+` where tracked files differ from it."""
    git = ["git", "-C", str(HERE)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True, check=False)
    return (head.stdout.strip() or "unknown") + ("+" if dirty.returncode else "")


def summary(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Return median and range of each figure over the rounds, and the rounds themselves."""
    figures: dict[str, Any] = {}
    for key in rounds[0]:
        values = [figures_of_round[key] for figures_of_round in rounds]
        figures[key] = {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
        }
    return figures | {"rounds": rounds}


def commands(options: argparse.Namespace, work: Path) -> dict[str, list[str]]:
    """Return the command line of each side."""
    model, sides = work / "model", {}
    if "peer" in options.sides:
        sides["peer"] = [
            str(peer_python(options.peer_venv)),
            str(Path(__file__).resolve()),
            "--as-peer",
            str(model),
            str(work / "peer"),
            str(work / "calibration.npy"),
            str(options.peer_batch_size),
            options.peer_dtype,
        ]
    for side, more in OURS.items():
        if side in options.sides:
            sides[side] = [
                *(sys.executable, "-m", "unicomp", "quantize", str(model)),
                *("--out", str(work / side), "--method", "gptq", "--bits", "4"),
                *("--group-size", "128", "--calibration", str(work / "calibration.txt")),
                *("--samples", str(SAMPLES), "--seq-len", str(SEQ_LEN), "--overwrite"),
                *more,
            ]
    return sides


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--work", type=Path, default=Path("build/quantize_llama"))
    parser.add_argument("--peer-venv", type=Path, default=Path("build/peer-venv"))
    parser.add_argument("--sides", nargs="+", choices=["peer", *OURS], default=["peer", *OURS])
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--peer-batch-size", type=int, default=1)
    parser.add_argument("--peer-dtype", default="auto", help="what the peer loads the model as")
    parser.add_argument("--out", type=Path, help="JSON file; default: in benchmarks/results")
    return parser.parse_args()


def main() -> None:
    """Measure both sides in turn and store the figures."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a side is ended, not orphaned
    work = options.work.absolute() / f"{options.size}-{options.dtype}"
    if not (work / "calibration.txt").exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        apart(make_model, work / "model", options.size, options.dtype)
    sides = commands(options, work)
    rounds: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    errors: dict[str, Any] = {}
    for number in range(1, options.rounds + 1):
        for side, command in sides.items():
            for left in (work / side, work / f"{side}.partial"):  # a resumed run would be no run
                shutil.rmtree(left, ignore_errors=True)
            warm(side, command)
            load = os.getloadavg()[0]
            figures = measured(command, work / f"{side}.log")
            rounds[side].append(figures | {"load_before": load})
            print(
                f"{number} {side}: {figures['wall_s']:.1f} s, {figures['cpu_s']:.1f} s of "
                f"processor, {figures['peak_rss_bytes'] / 1e9:.2f} GB",
                file=sys.stderr,
            )
            if side not in errors:
                errors[side] = apart(compare, work / "model", work / side, work / "heldout.npy")
                print(
                    f"  {side}: relative error of the logits {errors[side]['logits']:.5f}, "
                    f"KL {errors[side]['kl_nats']:.6f} nats",
                    file=sys.stderr,
                )
    result: dict[str, Any] = {
        "schema": "unicomp.benchmark/1",
        "benchmark": "quantize_llama",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "model": SIZES[options.size] | {"vocab_size": VOCAB, "dtype": options.dtype},
        "calibration": {"samples": SAMPLES, "seq_len": SEQ_LEN},
        "heldout": {"samples": HELDOUT, "seq_len": SEQ_LEN},
        "our_options": OURS,
        "sides": {side: summary(rounds[side]) | {"error": errors[side]} for side in sides},
    }
    from unicomp import machine

    result |= {"machine": machine.describe(), "versions": machine.versions()}
    if "peer" in sides:
        result["peer"] = {
            "versions": peer_versions(peer_python(options.peer_venv)),
            "batch_size": options.peer_batch_size,
            "dtype": options.peer_dtype,
        }
    for side in OURS:
        if side in sides and "peer" in sides:
            one, other = result["sides"][side], result["sides"]["peer"]
            result[f"{side}_by_peer"] = {
                key: one[key]["median"] / other[key]["median"]
                for key in ("wall_s", "cpu_s", "peak_rss_bytes")
            } | {key: errors[side][key] / errors["peer"][key] for key in ("logits", "kl_nats")}
    text = json.dumps(result, indent=2)
    path = options.out or HERE / "results" / f"quantize_llama-{options.size}-{options.dtype}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-peer"]:
        run_peer(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), sys.argv[6])
    else:
        main()

"""What does it cost to serve many fine-tunes over one base, and are the answers right?

A synthetic base of 300 million parameters (hidden 1024, FFN 2816, 21 layers, vocabulary 16000,
untied, bfloat16) and four fine-tunes of it (`--tuned`): noise and a part of low rank. With more
deltas than that, each is loaded again as one of its own, so that memory is that of as many.

Checked first, in float32: each row of a batch on another delta, and one on the base, against models
whose weights are the base plus the decoded delta. Then, in the models' own bfloat16 and each in a
process of its own: memory of the base alone and of the base with deltas; tokens per second of a
batch whose rows are all on different deltas; and the same requests one after the other on whole
models, each of which is loaded when its turn comes.

    python benchmarks/delta_serving.py --work FOLDER --make        # 3 GB, kept
    python benchmarks/delta_serving.py --work FOLDER --method dqrelo --compress
    python benchmarks/delta_serving.py --work FOLDER --method dqrelo --check
    python benchmarks/delta_serving.py --work FOLDER --method dqrelo --serve 0 1 4 16 --whole

Each part replaces its own earlier figures in the results and leaves the others.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from delta_large import RESULTS, Size, about, make, store
from torch import Tensor

from unicomp import load, load_deltas
from unicomp.kernels.blocked import Compute
from unicomp.kernels.delta_folder import open_delta
from unicomp.kernels.delta_product import DeltaProduct
from unicomp.kernels.deltas import choose
from unicomp.kernels.load import load as load_dense

NAME = "delta_serving"
MIDDLE = Size(hidden=1024, ffn=2816, layers=21, heads=16, kv=16, vocab=16000)
TUNED, PROMPT, TOKENS, RATIO = 4, 32, 32, 0.125
LOGITS = 1e-3  # largest difference of logits allowed, absolute


def prompts(rows: int, tokens: int = PROMPT) -> Tensor:
    """Return int64 [rows, tokens]."""
    draw = torch.Generator().manual_seed(7)
    return torch.randint(0, MIDDLE.vocab, (rows, tokens), generator=draw)


def resident() -> int:
    """Return the bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Return the most bytes that this process held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.inference_mode()
def generate(model: Any, rows: int) -> float:
    """Return the seconds that `TOKENS` new tokens a row take, the prompt included."""
    ids = prompts(rows)
    words = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
    began = time.monotonic()
    model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **words)
    return time.monotonic() - began


def serve(base: Path, deltas: list[Path]) -> dict[str, Any]:
    """Load the base with deltas, and let each row of a batch go on with its own."""
    began = time.monotonic()
    model = load_deltas(base, deltas)
    loaded, seconds, count = resident(), time.monotonic() - began, len(deltas)
    held = {own for own in model.modules() if isinstance(own, DeltaProduct)}
    choose(model, list(range(count)) if count else [-1])
    rows = max(count, 1)
    generate(model, rows)
    times = sorted(generate(model, rows) for _ in range(3))
    return {
        "deltas": count,
        "distinct": len({*deltas}),
        "load_seconds": seconds,
        "delta_bytes": sum(own.nbytes for own in held),
        "resident_bytes": loaded,
        "peak_rss_bytes": peak(),
        "seconds": times,
        "tokens_per_s": rows * TOKENS / times[1],
    }


def whole(folders: list[Path]) -> dict[str, Any]:
    """Load one whole model after the other, and let each answer one request."""
    loads, answers = [], []
    for folder in folders * 2:
        began = time.monotonic()
        model = load(folder)
        loads.append(time.monotonic() - began)
        answers.append(generate(model, 1))
        del model
    loads, answers = loads[len(folders) :], answers[len(folders) :]  # the first round warms
    each = sum(loads + answers) / len(folders)
    return {
        "load_seconds": loads,
        "answer_seconds": answers,
        "tokens_per_s_loaded_in_turn": TOKENS / each,
        "tokens_per_s_all_in_memory": TOKENS * len(folders) / sum(answers),
    }


@torch.inference_mode()
def check(base: Path, deltas: list[Path]) -> dict[str, Any]:
    """Compare each row's logits with those of the base plus the decoded delta, in float32.

    Raises RuntimeError where `exact` differs by more than `LOGITS`.
    """
    rows = [*range(len(deltas)), -1]
    ids = prompts(len(rows), 64)
    wanted = []
    for row, index in enumerate(rows):
        model = load_dense(base)
        if index >= 0:
            opened = open_delta(deltas[index])
            for name, own in opened.manifest.tensors.items():
                parameter = model.get_parameter(name)
                if own.kind == "delta":
                    parameter += opened.deltas(name)[0].decode()
                elif own.kind == "exact":
                    parameter.copy_(opened.read(name))
        wanted.append(model(ids[row : row + 1]).logits[0])
        del model
    truth = torch.stack(wanted)
    ways: tuple[Compute, ...] = ("exact", "int8")
    found: dict[str, Any] = {"rows": rows, "tokens": ids.shape[1]}
    found["largest_logit"] = float(truth.abs().max())
    for compute in ways:
        model = load_deltas(base, deltas, compute=compute, dtype=torch.float32)
        choose(model, rows)
        rest = model(ids).logits - truth
        apart = (rest.square().sum() / truth.square().sum()).sqrt()
        moved = (truth[:-1] - truth[1:]).abs().amax((1, 2))
        found[compute] = {
            "largest_difference": float(rest.abs().max()),
            "relative_error": float(apart),
            "same_likeliest_token": float(
                (model(ids).logits.argmax(2) == truth.argmax(2)).double().mean()
            ),
        }
        found["least_difference_of_two_rows"] = float(moved.min())
        del model
    if found["exact"]["largest_difference"] > LOGITS:
        raise RuntimeError(f"served logits are wrong: {found}")
    if found["least_difference_of_two_rows"] < 100 * LOGITS:
        raise RuntimeError(f"the rows are too alike to tell a wrong delta: {found}")
    return found


def apart(arguments: argparse.Namespace, *words: str) -> dict[str, Any]:
    """Do one part in a process of its own."""
    command = [sys.executable, __file__, "--work", str(arguments.work), *words]
    command += ["--method", arguments.method, "--tuned", str(arguments.tuned)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def compress(work: Path, method: str, tuned: int) -> None:
    """Compress and restore every fine-tune that is not yet."""
    for index in range(tuned):
        out, again = work / f"{method}-{index}", work / f"{method}-{index}-restored"
        common = ["--base", str(work / "base"), "--quiet", "--overwrite"]
        words = ["--method", method, "--ratio", str(RATIO), "--out", str(out)]
        if not out.exists():
            unicomp("compress", str(work / f"tuned{index}"), *words, *common)
        if not again.exists():
            unicomp("restore", str(out), "--out", str(again), *common)


def unicomp(*words: str) -> None:
    """Run a command of `unicomp delta`."""
    subprocess.run(
        [sys.executable, "-m", "unicomp", "delta", *words], stdout=subprocess.DEVNULL, check=True
    )


def main() -> None:
    """Do the parts that were asked for, and store what they measured."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the models")
    parser.add_argument("--method", default="dqrelo")
    parser.add_argument("--tuned", type=int, default=TUNED, help="fine-tunes that there are")
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--compress", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--serve", type=int, nargs="*", default=[])
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work, method = arguments.work, arguments.method
    deltas = [work / f"{method}-{index}" for index in range(arguments.tuned)]
    if arguments.worker is not None:
        if arguments.worker == "whole":
            folders = [own.with_name(f"{own.name}-restored") for own in deltas]
            print(json.dumps(whole(folders)))
        else:
            count = int(arguments.worker)
            print(json.dumps(serve(work / "base", (deltas * count)[:count])))
        return
    if arguments.make:
        make(MIDDLE, [work / "base", *(work / f"tuned{i}" for i in range(arguments.tuned))])
    if arguments.compress:
        compress(work, method, arguments.tuned)
    if arguments.check:
        keep(method, "logits", about() | check(work / "base", deltas))
    for count in arguments.serve:
        keep(method, f"served {count}", about() | apart(arguments, "--worker", str(count)))
    if arguments.whole:
        keep(method, "whole models", about() | apart(arguments, "--worker", "whole"))


def keep(method: str, name: str, part: dict[str, Any]) -> None:
    """Put what was measured among the results, and work out shares of the limit again."""
    file, base = RESULTS / f"{NAME}.json", 2 * MIDDLE.parameters()
    known = json.loads(file.read_text()) if file.is_file() else {}
    facts = {
        "parameters": MIDDLE.parameters(),
        "base_bytes_16": base,
        "prompt_tokens": PROMPT,
        "new_tokens": TOKENS,
    }
    methods = known.get("methods", {})
    own = methods.setdefault(method, {})
    own[name] = part
    for found in own.values():
        if found.get("deltas") and "served 0" in own:
            more = found["resident_bytes"] - own["served 0"]["resident_bytes"]
            room = found["deltas"] * RATIO * base
            found["share_of_limit"] = more / room
            found["share_of_limit_with_base"] = (base + more) / (base + room)
    store(NAME, facts | {"methods": methods})


if __name__ == "__main__":
    main()

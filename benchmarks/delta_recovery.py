"""How much of a fine-tune's gain survives each delta method at each ratio.

A pair is a base, its fine-tune and text of the fine-tune's kind. The gain is the fall of the mean
negative log-likelihood of a token, in windows of 256; what a delta keeps of it is

    recovery = (base - restored) / (base - fine-tune)

    python benchmarks/delta_recovery.py --assets ../shared/assets    # ten minutes on one core

"Trained" (at 1/16) are scales trained on text, that of the calibration: for the embedded pair the
plain one (`builtin:tinyworld`, not of the fine-tune's kind), for the others Shakespeare up to where
the held-out part begins. The pair `... over 4 bits` has the same fine-tune, and as its base the
embedded model rounded to 4 bits in groups of 32, as it is on disk: the delta then holds the
rounding too. "Made over the unrounded base" are deltas over the embedded model itself, served over
its rounded form, whose rounding then stays. Figures of quality: a busy machine does not change
them. The embedded pairs need no assets; `--pair` takes one pair, and leaves the figures of the
others.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from quantize_llama import commit
from torch import Tensor

from unicomp import builtin, hub, machine, text
from unicomp.compress import methods
from unicomp.kernels.delta_folder import Totals
from unicomp.kernels.deltas import load_deltas
from unicomp.kernels.load import load
from unicomp.recipes.delta.plan import plan_delta
from unicomp.recipes.delta.restore import restore
from unicomp.recipes.delta.run import compress
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options
from unicomp.recipes.schema import Calibration

RESULTS = Path(__file__).resolve().parent / "results/delta_recovery.json"
WINDOW, WINDOWS, BATCH = 256, 100, 25
RATIOS = (1 / 16, 1 / 8, 1 / 4)

# name -> method and options; a ratio below what a method reaches is declined, and recorded so.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bitdelta": ("bitdelta", {}),
    "bitdelta, trained": ("bitdelta", {"trained": True}),
    "svd": ("svd", {}),
    "svd, int8, one budget": ("svd", {"factors": "int8", "allocation": "model"}),
    "dqrelo": ("dqrelo", {}),
    "dqrelo, low rank first": ("dqrelo", {"first": "low-rank"}),
    "dqrelo-plus, one plane": ("dqrelo-plus", {"planes": 1}),
    "dqrelo-plus, ratio for each weight": ("dqrelo-plus", {"allocation": "tensor"}),
    "dqrelo-plus, early 0.5": ("dqrelo-plus", {"early": 0.5}),
    "dqrelo-plus": ("dqrelo-plus", {}),
    "dqrelo-plus, trained": ("dqrelo-plus", {"trained": True}),
}
OVER_4_BITS = "tinyworld-pirate over 4 bits"
SERVED = ("bitdelta", "dqrelo", "dqrelo-plus")
WORLD, PIRATE = "builtin:tinyworld", "builtin:tinyworld-pirate"
Pair = tuple[str, str, Path, str]


def pairs(assets: Path | None, work: Path) -> dict[str, Pair]:
    """Return name -> base, fine-tune, text to score on, text to train scales on.

    work  a folder for what is made on the way
    """
    held = builtin.heldout("pirate_heldout.txt")
    found: dict[str, Pair] = {
        "tinyworld-pirate": (WORLD, PIRATE, held, WORLD),
        OVER_4_BITS: (str(work / "w4"), PIRATE, held, WORLD),
    }
    for name in ("stories260K", "templateGPT-llama3-1M"):
        if assets is not None:
            base = assets / "models" / name
            tuned = assets / "models" / f"{name}-ft-shakespeare"
            texts = assets / "text/tinyshakespeare"
            train = work / "train.txt"
            whole, scored = ((texts / own).read_text("utf-8") for own in ("input.txt", "val.txt"))
            train.write_text(whole[: whole.index(scored)], "utf-8")
            found[name] = (str(base), str(tuned), texts / "val.txt", str(train))
    return found


def rounded(out: Path) -> None:
    """Write the embedded model at 4 bits."""
    options = {"bits": 4, "group_size": 32, "ignore": []}
    run(plan(from_options("quantize", "rtn", options, model=WORLD)), out)


def windows(model: str, file: Path) -> Tensor:
    """Return int64 [windows, 256] of a text in a model's tokens."""
    tokenizer = text.tokenizer(hub.resolve(model).folder)
    ids = torch.tensor(tokenizer(file.read_text("utf-8"), add_special_tokens=False)["input_ids"])
    count = min(len(ids) // WINDOW, WINDOWS)
    return ids[: count * WINDOW].view(count, WINDOW)


def nll(model: str | Path, ids: Tensor) -> float:
    """Return `nll_of` a checkpoint."""
    return nll_of(load(hub.resolve(str(model)).folder), ids)


@torch.no_grad()
def nll_of(network: Any, ids: Tensor) -> float:
    """Return the mean negative log-likelihood of every token of a window but its first, in nats."""
    total = 0.0
    for batch in ids.split(BATCH):
        logits = network(batch).logits[:, :-1].log_softmax(-1)
        total -= float(logits.gather(2, batch[:, 1:, None]).sum(dtype=torch.float64))
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def point(
    name: str, ratio: float, made: Totals, found: float, low: float, full: float
) -> dict[str, Any]:
    """Return what is stored of one contender, once its bytes are seen to keep the ratio.

    found, low, full  negative log-likelihoods with the delta, of the base and of the fine-tune
    """
    share, recovery = made.payload / made.matrix_bytes_16, (low - found) / (low - full)
    if share > ratio * 1.01:
        raise RuntimeError(f"{name} takes {share} of {ratio}")
    print(f"  {ratio:.4f} {name}: {recovery:.4f}", file=sys.stderr, flush=True)
    return {
        "contender": name,
        "ratio": ratio,
        "payload_share": share,
        "file_bytes": made.file,
        "file_share": made.file / made.matrix_bytes_16,
        "error": made.error,
        "nll": found,
        "recovery": recovery,
    }


def served(pair: Pair, low: float, full: float) -> list[dict[str, Any]]:
    """Compress over the embedded model, and score the deltas over its rounded form.

    pair  its base is the rounded form
    """
    base, tuned, file, _ = pair
    ids, points = windows(tuned, file), []
    for method in SERVED:
        kind = methods.find("delta", method)
        for ratio in RATIOS[:1] if method == "bitdelta" else RATIOS:
            known: Any = kind.model_validate({"base": WORLD, "ratio": ratio})
            with tempfile.TemporaryDirectory() as folder:
                delta = Path(folder, "delta")
                made = compress(plan_delta(tuned, method, known), delta).totals
                network = load_deltas(base, [delta], compute="exact", dtype=torch.float32)
                found = nll_of(network, ids)
            name = f"{method}, made over the unrounded base"
            points.append(point(name, ratio, made, found, low, full))
    return points


def measure(pair: Pair, contenders: list[str]) -> dict[str, Any]:
    """Compress, restore and score one pair with each method at each ratio."""
    base, tuned, file, train = pair
    ids = windows(tuned, file)
    low, full = nll(base, ids), nll(tuned, ids)
    points = []
    for name in contenders:
        method, options = CONTENDERS[name]
        options = dict(options)
        calibration = Calibration(data=train, seq_len=128) if options.pop("trained", 0) else None
        once = method == "bitdelta" or calibration is not None
        for ratio in RATIOS[:1] if once else RATIOS:
            kind = methods.find("delta", method)
            known: Any = kind.model_validate({"base": base, "ratio": ratio} | options)
            planned = plan_delta(tuned, method, known, calibration)
            with tempfile.TemporaryDirectory() as folder:
                delta, again = Path(folder, "delta"), Path(folder, "restored")
                made = compress(planned, delta).totals
                restore(delta, base, again)
                found = nll(again, ids)
            points.append(point(name, ratio, made, found, low, full))
    return {
        "commit": commit(),
        "nll_base": low,
        "nll_tuned": full,
        "windows": len(ids),
        "points": points,
    }


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--assets", type=Path, help="folder of the shared models and texts")
    parser.add_argument("--pair", action="append", help="only this one; may be given again")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"pairs": {}}
    result: dict[str, Any] = {
        "question": "how much of a fine-tune's gain survives each delta method",
        "machine": machine.describe(),
        "versions": machine.versions(),
        "window": WINDOW,
        "pairs": known["pairs"] if arguments.pair else {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, pair in pairs(arguments.assets, Path(folder)).items():
            if arguments.pair and name not in arguments.pair:
                continue
            print(name, file=sys.stderr)
            if name == OVER_4_BITS:
                rounded(Path(pair[0]))
            result["pairs"][name] = measure(pair, list(CONTENDERS))
            if name == OVER_4_BITS:
                own = result["pairs"][name]
                own["points"] += served(pair, own["nll_base"], own["nll_tuned"])
    written = json.dumps(result, indent=1) + "\n"
    arguments.out.write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()

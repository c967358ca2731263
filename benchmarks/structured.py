"""What does a smaller shape cost, by width and by depth, and how much faster is it?

    python benchmarks/structured.py kl                     # the embedded model
    python benchmarks/structured.py kl --model DIR --calibration FILE.jsonl --held-out FILE.txt
    python benchmarks/structured.py make --folder DIR      # a random model of 300 M, and cuts of it
    python benchmarks/structured.py speed --folder DIR     # all three in turn

`kl` cuts a model to three quarters, plainly and refitted, then by width to what depth left, and
stores KL divergence to it in nats per token of a held-out text (windows of 256 tokens, no BOS).
`make` has the embedded model's proportions (FFN 2.75 times the hidden size, KV heads half of the
heads, a tied head); speed does not depend on what the weights are. `speed` lets each cut and the
twin take turns round by round; of the rounds' ratios it stores the median, the range, and an
interval that has the true median with a probability of 95% or more whatever their distribution.
"""

import argparse
import json
import math
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from quantize_llama import commit

from unicomp import builtin, machine
from unicomp.checkpoint import Checkpoint
from unicomp.evaluate.cost.gain import beside
from unicomp.evaluate.score import score
from unicomp.hub import Source
from unicomp.kernels.dense import open_dense
from unicomp.recipes.cut.plan import CutPlan, plan_cut
from unicomp.recipes.cut.run import run_cut
from unicomp.recipes.load import from_options

RESULTS = Path(__file__).resolve().parent / "results/structured.json"
TWIN = {
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}


def planned(
    model: Path, method: str, options: dict[str, Any], calibration: str, samples: int, seq_len: int
) -> CutPlan:
    """Return the plan of one cut."""
    text = {"data": calibration, "samples": samples, "seq_len": seq_len}
    recipe = from_options("prune", method, options, calibration=text)
    checkpoint = Checkpoint.open(model)
    source = Source(model, model.name, None)
    return plan_cut(recipe, None, source, checkpoint, open_dense(checkpoint), None)


def divergences(model: Path, calibration: str, held_out: str) -> list[dict[str, Any]]:
    """Carry out every cut and score it."""
    rows: list[dict[str, Any]] = []

    def one(method: str, **options: Any) -> CutPlan:
        with tempfile.TemporaryDirectory() as scratch:
            plan = planned(model, method, options, calibration, 128, 256)
            made = run_cut(plan, Path(scratch) / "out")
            report = score(
                Path(scratch) / "out", model, axes=["fidelity"], text=held_out, seq_len=256,
                bos=False,
            )  # fmt: skip
        kl = report.score("fidelity/kl")
        shape = made.stages[0].shape
        rows.append(
            {"method": method, "options": options, "kl": kl.value, "kl_ci95": kl.ci95}
            | {"params_in": plan.params_in, "params": plan.params}
            | {"shape": plan.sizes.to_json(), "layers": shape and shape.kept["layers"]}
        )
        said = ", ".join(f"{key} {value}" for key, value in options.items())
        print(f"{method:6s} {said:55s} KL {kl.value:.4f}, {plan.params} parameters", flush=True)
        return plan

    for criterion in ("activation", "second-order"):
        for compensate in (False, True):
            one("width", sparsity=0.25, criterion=criterion, compensate=compensate)
    for criterion in ("influence", "loss"):
        for compensate in (False, True):
            deep = one("depth", sparsity=0.25, criterion=criterion, compensate=compensate)
    for compensate in (False, True):
        one("width", target_params=deep.params, compensate=compensate)
    return rows


def make(folder: Path) -> None:
    """Make the random twin, and of it a quarter smaller ones by width and by depth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TWIN)).bfloat16().save_pretrained(folder / "twin")
    for file in builtin.model("tinyworld").iterdir():  # ids of its tokenizer are in the vocabulary
        if file.name.startswith(("tokenizer", "special_tokens")):
            (folder / "twin" / file.name).write_bytes(file.read_bytes())
    for method, options in (("width", {}), ("depth", {"criterion": "influence"})):
        options |= {"sparsity": 0.25, "compensate": False}
        plan = planned(folder / "twin", method, options, "builtin:tinyworld", 4, 64)
        run_cut(plan, folder / method, overwrite=True)
        print(f"{method}: {plan.params_in} -> {plan.params} parameters, {plan.sizes}", flush=True)


def median_interval(values: list[float]) -> list[float]:
    """Return two of the values that have the median between them in 95 of 100 samples or more.

    Between the k-th least and the k-th greatest of n values it lies but for the probability that
    fewer than k of n fair coins fall on one side, twice. Of fewer than 6 values the range has less.
    """
    values, count, beyond, k = sorted(values), len(values), 0.0, 0
    while k < (count - 1) // 2:
        beyond += 2 * math.comb(count, k) / 2**count
        if beyond > 0.05:
            break
        k += 1
    k = max(k - 1, 0)
    return [values[k], values[count - 1 - k]]


def speeds(folder: Path, method: str, rounds: int) -> dict[str, Any]:
    """Measure the twin and one of its cuts in turn."""
    gain = beside(folder / method, folder / "twin", rounds=rounds)
    made = json.loads((folder / method / "unicomp.json").read_text())
    found: dict[str, Any] = {
        "params_in": made["totals"]["params_in"],
        "params": made["totals"]["params"],
        "shape": made["stages"][0]["shape"],
        "threads": torch.get_num_threads(),
        **gain.to_json(),
    }
    for name, rates in (("prefill", gain.prefill), ("decode", gain.decode)):
        ratios = [ours / theirs for ours, theirs in zip(rates.model, rates.baseline, strict=True)]
        interval = median_interval(ratios)
        found[f"{name}_tokens_per_s"]["gain_ci95"] = interval
        middle, least, most = rates.gain
        print(
            f"{method} {name}: {middle:.3f} times, median of {rounds} rounds, 95% interval "
            f"{interval[0]:.3f} to {interval[1]:.3f}, range {least:.3f} to {most:.3f}",
            flush=True,
        )
    return found


def store(name: str, rows: Any) -> None:
    """Put one model's results into the file; the others' stay."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found[name] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kl", "make", "speed"))
    parser.add_argument("--model", type=Path, default=builtin.model("tinyworld"))
    parser.add_argument("--calibration", default="builtin:tinyworld")
    parser.add_argument("--held-out", default=str(builtin.heldout("heldout.txt")))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=15, help="of `speed`")
    options = parser.parse_args()
    if options.what != "kl" and options.folder is None:
        parser.error("--folder is missing")
    if options.what == "make":
        make(options.folder)
    elif options.what == "kl":
        rows = divergences(options.model, options.calibration, options.held_out)
        store(options.model.name, rows)
    else:
        cuts: dict[str, Any] = {}
        for method in ("width", "depth"):
            cuts[method] = speeds(options.folder, method, options.rounds)
            store("speed of a random twin", {"twin": TWIN, "cuts": cuts})


if __name__ == "__main__":
    main()

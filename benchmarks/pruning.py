"""What do zeros cost: by which criterion, alone and together with 4-bit weights?

Runs recipes on a model, scores each against the model, and stores KL divergence to it in nats per
token of a held-out text (windows of 256 tokens without BOS), with the share of zeros that the
output really has. `builtin:tinyworld` needs nothing; for others give a model, a calibration text
and a held-out text. `--sparsity` chooses a piece, which leaves the others' figures as they are.

    python benchmarks/pruning.py
    python benchmarks/pruning.py --model DIR --calibration FILE.jsonl --held-out FILE.txt
"""

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize_llama import commit

from unicomp import builtin, machine
from unicomp.checkpoint import Checkpoint
from unicomp.evaluate.score import score
from unicomp.kernels.dense import open_dense
from unicomp.models import describe
from unicomp.recipes.load import load
from unicomp.recipes.plan import plan
from unicomp.recipes.run import run

RESULTS = Path(__file__).resolve().parent / "results/pruning.json"
QUANTIZE = "{quantize: gptq, bits: 4, group_size: -1%s}"
ALONE = (", drift: 0", ", drift: 0, sweeps: 0")  # the walk, with no second stream of activations


def recipe(calibration: str, samples: int, *stages: str) -> str:
    """Return a recipe's text."""
    text = f'{{data: "{calibration}", samples: {samples}, seq_len: 256}}'
    return f"version: 1\ncalibration: {text}\nstages:\n" + "".join(f"  - {s}\n" for s in stages)


def zeros(folder: Path) -> float:
    """Return the share of zeros in the linears of the layers."""
    dense = open_dense(Checkpoint.open(folder))
    none = total = 0
    for linear in describe(dense.config, dense.tensors).linears():
        weight = dense.read(linear.part.tensor)
        none, total = none + int((weight == 0).sum()), total + weight.numel()
    return none / total


def measure(
    model: Path, calibration: str, samples: int, held_out: str, sparsity: str
) -> list[dict[str, Any]]:
    """Carry out every recipe with one pattern of zeros and score it."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:

        def one(name: str, source: Path, *stages: str) -> Path:
            out = Path(scratch) / f"{len(rows)}"
            run(
                plan(load(recipe(calibration, samples, *stages), file=name), model=str(source)), out
            )
            report = score(out, model, axes=["fidelity"], text=held_out, seq_len=256, bos=False)
            kl = report.score("fidelity/kl")
            rows.append(
                {"name": name, "sparsity": sparsity, "stages": stages, "samples": samples}
                | {"kl": kl.value, "kl_ci95": kl.ci95, "zeros": zeros(out)}
            )
            print(f"{name:44s} KL {kl.value:.4f}, zeros {rows[-1]['zeros']:.4f}", flush=True)
            return out

        def prune(method: str, more: str = "") -> str:
            return f'{{prune: {method}, sparsity: "{sparsity}"{more}}}'

        for method in ("magnitude", "wanda", "sparsegpt"):
            pruned = one(f"{method} {sparsity}", model, prune(method))
            if method != "magnitude" and ":" not in sparsity:
                shared = prune(method, ", allocation: sensitivity")
                one(f"{method} {sparsity}, shares by sensitivity", model, shared)
            if method == "sparsegpt":
                one(f"{method} {sparsity}, then 4 bits", pruned, QUANTIZE % "")
                one(f"{method} {sparsity} with 4 bits", model, prune(method), QUANTIZE % "")
                first, second = prune(method, ALONE[0]), QUANTIZE % ALONE[1]
                pruned = one(f"{method} {sparsity}, walk alone", model, first)
                one(f"{method} {sparsity}, then 4 bits, walk alone", pruned, second)
                one(f"{method} {sparsity} with 4 bits, walk alone", model, first, second)
    return rows


def main() -> None:
    """Measure, print and store; results of other models stay in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=builtin.model("tinyworld"))
    parser.add_argument("--calibration", default="builtin:tinyworld")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--held-out", default=str(builtin.heldout("heldout.txt")))
    parser.add_argument("--sparsity", nargs="+", default=["0.5", "2:4"])
    options = parser.parse_args()
    for sparsity in options.sparsity:
        rows = measure(
            options.model, options.calibration, options.samples, options.held_out, sparsity
        )
        found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        before = found.get(options.model.name, {"rows": []})["rows"]
        found[options.model.name] = {
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "machine": machine.describe(),
            "versions": machine.versions(),
            "rows": [row for row in before if row["sparsity"] != sparsity] + rows,
        }
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

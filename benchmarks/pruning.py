"""What do zeros cost: by which criterion, alone and together with 4-bit weights?

Runs recipes on a model, scores each against the model, and stores KL divergence to it in nats per
token of a held-out text (windows of 256 tokens without BOS), with the share of zeros that the
output really has. `builtin:tinyworld` needs nothing; for others give a model, a calibration text
and a held-out text.

A row is stored as soon as it is measured, and one with the same settings is not measured again, so
that an interrupted run goes on where it stopped; `--again` measures rows anew.

    python benchmarks/pruning.py
    python benchmarks/pruning.py --model DIR --calibration FILE.jsonl --held-out FILE.txt
"""

import argparse
import json
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize_llama import commit

from unicomp import builtin, machine
from unicomp.checkpoint import Checkpoint
from unicomp.evaluate.score import score
from unicomp.kernels.dense import open_dense
from unicomp.models import describe
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import load

RESULTS = Path(__file__).resolve().parent / "results/pruning.json"
QUANTIZE = "{quantize: gptq, bits: 4, group_size: -1%s}"
ALONE = (", drift: 0", ", drift: 0, sweeps: 0")  # the walk, with no second stream of activations
SETTINGS = ("name", "stages", "samples", "calibration", "held_out")  # what makes two rows one


def recipe(calibration: str, samples: int, stages: tuple[str, ...]) -> str:
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


@dataclass(frozen=True, slots=True)
class Work:
    """A row to measure.

    passes  the stages of each run, one on what the other made; those of one run go together
    """

    name: str
    sparsity: str
    passes: tuple[tuple[str, ...], ...]


def rows(sparsity: str) -> list[Work]:
    """Return what is measured with one pattern of zeros."""

    def prune(method: str, more: str = "") -> str:
        return f'{{prune: {method}, sparsity: "{sparsity}"{more}}}'

    found: list[tuple[str, tuple[tuple[str, ...], ...]]] = []
    for method in ("magnitude", "wanda", "sparsegpt"):
        found.append((f"{method} {sparsity}", ((prune(method),),)))
        if method != "magnitude" and ":" not in sparsity:
            shared = prune(method, ", allocation: sensitivity")
            found.append((f"{method} {sparsity}, shares by sensitivity", ((shared,),)))
    method = "sparsegpt"
    for said, first, second in (
        ("", prune(method), QUANTIZE % ""),
        (", walk alone", prune(method, ALONE[0]), QUANTIZE % ALONE[1]),
    ):
        if said:
            found.append((f"{method} {sparsity}{said}", ((first,),)))
        found.append((f"{method} {sparsity}, then 4 bits{said}", ((first,), (second,))))
        found.append((f"{method} {sparsity} with 4 bits{said}", ((first, second),)))
    return [Work(name, sparsity, passes) for name, passes in found]


@dataclass(slots=True)
class Bench:
    """One model with its texts, and the folder in which its outputs lie.

    made  what was carried out already: passes -> folder
    """

    model: Path
    calibration: str
    samples: int
    held_out: str
    scratch: Path
    made: dict[tuple[tuple[str, ...], ...], Path] = field(default_factory=dict)

    def settings(self, work: Work) -> dict[str, Any]:
        """Return what says which row it is; of texts their names alone."""
        return {
            "name": work.name,
            "sparsity": work.sparsity,
            "stages": [stage for one in work.passes for stage in one],
            "samples": self.samples,
            "calibration": _name(self.calibration),
            "held_out": _name(self.held_out),
        }

    def make(self, passes: tuple[tuple[str, ...], ...]) -> Path:
        """Carry out passes; those that another row has in common are carried out once."""
        if not passes:
            return self.model
        if passes not in self.made:
            source, out = self.make(passes[:-1]), self.scratch / str(len(self.made))
            text = recipe(self.calibration, self.samples, passes[-1])
            run(plan(load(text, file="recipe"), model=str(source)), out)
            self.made[passes] = out
        return self.made[passes]

    def measure(self, work: Work) -> dict[str, Any]:
        """Return a row."""
        out = self.make(work.passes)
        report = score(
            out, self.model, axes=["fidelity"], text=self.held_out, seq_len=256, bos=False
        )
        kl = report.score("fidelity/kl")
        figures = {"kl": kl.value, "kl_ci95": kl.ci95, "zeros": zeros(out)}
        when = datetime.now(UTC).isoformat(timespec="seconds")
        print(f"{work.name:44s} KL {kl.value:.4f}, zeros {figures['zeros']:.4f}", flush=True)
        return self.settings(work) | figures | {"when": when, "commit": commit()}


def _name(text: str) -> str:
    """Return a text's name; its folder is the machine's own."""
    return text if text.startswith("builtin:") else Path(text).name


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Tell whether two rows have the same settings."""
    return all(left.get(key) == right.get(key) for key in SETTINGS)


def store(model: str, row: dict[str, Any], order: list[str]) -> None:
    """Put one row into the file, in place of the one it measures again.

    order  names of rows as they are measured
    """
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    others = [one for one in found.get(model, {}).get("rows", []) if one["name"] != row["name"]]
    found[model] = {
        "machine": machine.describe(),
        "versions": machine.versions(),
        "rows": sorted([*others, row], key=lambda one: order.index(one["name"])),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    """Measure, print and store; results of other models stay in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=builtin.model("tinyworld"))
    parser.add_argument("--calibration", default="builtin:tinyworld")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--held-out", default=str(builtin.heldout("heldout.txt")))
    parser.add_argument("--sparsity", nargs="+", default=["0.5", "2:4"])
    parser.add_argument("--again", nargs="*", metavar="NAME", help="rows to measure anew")
    options = parser.parse_args()
    every = [work for sparsity in ("0.5", "2:4") for work in rows(sparsity)]
    order = [work.name for work in every]
    if unknown := set(options.again or ()) - set(order):
        parser.error(f"no such rows: {', '.join(sorted(unknown))}; there are: {', '.join(order)}")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            options.model, options.calibration, options.samples, options.held_out, Path(scratch)
        )
        for work in every:
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            known = found.get(options.model.name, {}).get("rows", [])
            wanted = work.sparsity in options.sparsity and (
                work.name in (options.again or ())
                or not any(same(row, bench.settings(work)) for row in known)
            )
            if wanted:
                store(options.model.name, bench.measure(work), order)


if __name__ == "__main__":
    main()

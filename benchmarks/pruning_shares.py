"""How far may shares of zeros differ, and over what change is their cost measured?

`allocation: sensitivity` has two settings of its own: `WITHIN`, by how much a linear's share may
differ from the common one, and `CHANGE`, the step over which zeros are seen to cost something. They
are chosen here on text that is neither calibrated nor reported on: the first four fifths of a
calibration text are calibrated on, the last fifth is scored (KL to the model, windows of 256 tokens
without BOS). What the choice then does to held-out text, `pruning.py` measures. A row is stored as
it is measured, and not measured again.

    python benchmarks/pruning_shares.py
    python benchmarks/pruning_shares.py --model DIR --text FILE.jsonl
"""

import argparse
import itertools
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from quantize_llama import commit

from unicomp import builtin, machine
from unicomp.compress import method, sensitivity
from unicomp.evaluate.score import score
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options

RESULTS = Path(__file__).resolve().parent / "results/pruning_shares.json"
CHANGES = (0.1, 0.05, 0.2)
BOUNDS = (0.05, 0.1, 0.025)
METHODS = ("wanda",)  # whose criterion the costs are measured by


def divide(text: Path, folder: Path) -> tuple[Path, Path]:
    """Write the first four fifths of the lines, and the last fifth."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    at = len(lines) * 4 // 5
    found = folder / "calibrate.jsonl", folder / "choose.jsonl"
    for path, some in zip(found, (lines[:at], lines[at:]), strict=True):
        path.write_text("".join(some), encoding="utf-8")
    return found


def divergence(model: Path, name: str, texts: tuple[Path, Path], folder: Path, kind: str) -> float:
    """Prune a model by half, and return KL to it on the text to choose by."""
    calibrate, choose = texts
    wanted = {"data": str(calibrate), "samples": 96, "seq_len": 256}
    recipe = from_options("prune", name, {"allocation": kind}, calibration=wanted)
    run(plan(recipe, model=str(model)), folder, overwrite=True)
    report = score(folder, model, axes=["fidelity"], text=str(choose), seq_len=256, bos=False)
    found = report.score("fidelity/kl").value
    if found is None:
        raise SystemExit("no divergence was measured")
    return found


def main() -> None:
    """Measure every pair of settings that is not yet stored, and store it; others stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=builtin.model("tinyworld"))
    parser.add_argument("--text", type=Path, default=builtin.calibration())
    options = parser.parse_args()
    pairs = list(itertools.product(CHANGES, BOUNDS))
    with tempfile.TemporaryDirectory() as scratch:
        texts, out = divide(options.text, Path(scratch)), Path(scratch) / "out"
        for name, pair in itertools.product(METHODS, (None, *pairs)):
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            rows = found.get(options.model.name, {"rows": []})["rows"]
            row = {"method": name, "change": pair and pair[0], "within": pair and pair[1]}
            if any(row.items() <= known.items() for known in rows):
                continue
            if pair is not None:
                sensitivity.CHANGE, method.WITHIN = pair
            kind = "uniform" if pair is None else "sensitivity"
            row["kl"] = divergence(options.model, name, texts, out, kind)
            print(row, flush=True)
            found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            found[options.model.name] = {
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": commit(),
                "machine": machine.describe(),
                "versions": machine.versions(),
                "rows": [*rows, row],
            }
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

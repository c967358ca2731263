"""What does distillation on the calibration text win back, on the embedded model?

    python benchmarks/distillation.py width joint ternary

`width` cuts a quarter of the parameters and distils; `joint` makes 2:4 zeros and 4 bits in one
pass and distils with zeros and format kept; `ternary` starts from ternary weights without training;
`layers-first` and `layers-only` do so too, and take about the same time layer by layer, in part or
wholly. Each runs as a recipe does, at the learning rate that follows from what is trained. Stored
are KL divergence to the original in nats per token of held-out text before and after, the share of
it that is won back, the other held-out figures, the bits of a linear weight, and the processor time
of the whole run, cut and quantization included.
"""

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from quantize_llama import commit

from unicomp import machine
from unicomp.checkpoint import Checkpoint
from unicomp.kernels import packed_model
from unicomp.kernels.inventory import take
from unicomp.kernels.load import load
from unicomp.recipes.load import load as read_recipe
from unicomp.recipes.pipeline.plan import plan
from unicomp.recipes.pipeline.run import run
from unicomp.recipes.stage.progress import Progress

RESULTS = Path(__file__).resolve().parent / "results/distillation.json"
HEAD = """version: 1
model: builtin:tinyworld
calibration: {data: builtin:tinyworld, samples: 128, seq_len: 256, seed: 0}
stages:
"""
CASES = {
    "width": """  - {prune: width, sparsity: 0.25}
  - {distill: logits, max_steps: 90, measure_every: 45}
""",
    "joint": """  - {prune: sparsegpt, sparsity: "2:4"}
  - {quantize: gptq, bits: 4, group_size: 32}
  - {distill: logits, max_steps: 90, measure_every: 45}
""",
    "ternary": """  - {quantize: ternary, group_size: -1}
  - {distill: logits, max_steps: 140, measure_every: 140}
""",
    "layers-first": """  - {quantize: ternary, group_size: -1}
  - {distill: logits, layer_steps: 60, max_steps: 97, measure_every: 97}
""",
    "layers-only": """  - {quantize: ternary, group_size: -1}
  - {distill: logits, layer_steps: 190, max_steps: 0}
""",
}


def bits(folder: Path) -> float:
    """Return the bits that a linear weight takes in a folder, scales and padding included."""
    linears = [one for one in take(Checkpoint.open(folder)).weights if one.kind == "linear"]
    return (
        8 * sum(one.bytes for one in linears) / sum(one.shape[0] * one.shape[1] for one in linears)
    )


def packed_error(folder: Path) -> float:
    """Return the greatest difference of logits, packed kernels against the dequantized model."""
    ids = torch.randint(1024, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = packed_model.load(folder, compute="exact", dtype=torch.float32)(ids).logits
        return float((exact - load(folder)(ids).logits).abs().max())


def measured(name: str) -> dict[str, Any]:
    """Carry out one case."""
    began, clock = time.process_time(), time.monotonic()

    def show(step: Progress) -> None:
        if "held out" in step.detail:
            print(f"{name} {step.done}/{step.total} {step.detail}", flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        made = run(plan(read_recipe(HEAD + CASES[name], file=name)), out, progress=show)
        training = made.stages[-1].training
        if training is None:
            raise RuntimeError(f"the last stage of {name} does not train")
        before, after = training.before, training.after
        row = {
            "stages": CASES[name].strip().splitlines(),
            "kl_before": before["kl"],
            "kl_after": after["kl"],
            "recovered": 1 - after["kl"] / before["kl"],
            "before": before,
            "after": after,
            "temperature": training.temperature,
            "notes": made.notes,
            "steps": training.steps,
            "tokens": training.tokens,
            "bits_per_linear_weight": bits(out),
            "process_seconds": time.process_time() - began,
            "seconds": time.monotonic() - clock,
        }
        if made.stages[-1].modules and name != "width":
            row["packed_logits_error"] = packed_error(out)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=sorted(CASES))
    arguments = parser.parse_args()
    for name in arguments.cases:
        found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"cases": {}}
        row = measured(name) | {
            "commit": commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine.describe(),
        }
        found["cases"][name] = row
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(
            f"{name}: KL {row['kl_before']:.4f} -> {row['kl_after']:.4f}, {row['recovered']:.1%} "
            f"won back, {row['process_seconds']:.0f} s of processor",
            flush=True,
        )


if __name__ == "__main__":
    main()

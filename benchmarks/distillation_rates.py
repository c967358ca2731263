"""Which learning rate wins back most in the same number of steps?

    python benchmarks/distillation_rates.py tinyworld ternary 5e-4 1e-3
    python benchmarks/distillation_rates.py stories260K dense 1e-3 --assets ../shared/assets

A student is made of a model as a recipe does it: `dense` lost a quarter of its parameters by width,
`lora` is the same one and learns by adapters of rank 16, `int4` has 2:4 zeros and 4 bits in groups
of 32, `ternary` has ternary weights. It learns from the model for the same 60 steps of 16 windows
of 128 tokens at each rate. Stored are KL to the model before and after, in nats per token of text
that is not trained on, and `excess`: KL after over that of the best rate of the same student.
Figures of quality: a busy machine does not change them. Only rates that are not stored yet for
today's steps are measured.
"""

import argparse
import json
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize_llama import commit

from unicomp import machine
from unicomp.recipes.load import load as read_recipe
from unicomp.recipes.pipeline.plan import plan
from unicomp.recipes.pipeline.run import run

RESULTS = Path(__file__).resolve().parent / "results/distillation_rates.json"
STEPS, BATCH, SEQ_LEN, HELD = 60, 16, 128, 64
MODELS = ("tinyworld", "stories260K", "templateGPT-llama3-1M")
STUDENTS = {
    "dense": "{prune: width, sparsity: 0.25}",
    "lora": "{prune: width, sparsity: 0.25}",
    "int4": '{prune: sparsegpt, sparsity: "2:4"}\n  - {quantize: gptq, bits: 4, group_size: 32}',
    "ternary": "{quantize: ternary, group_size: -1}",
}
OPTIONS = {"lora": ", lora_rank: 16"}


def recipe(model: str, text: str, stages: str) -> Any:
    """Return a plan of some stages of a model, on a text."""
    head = f'model: "{model}"\ncalibration: {{data: "{text}", samples: 128, seq_len: {SEQ_LEN}}}'
    return plan(read_recipe(f"version: 1\n{head}\nstages:\n  - {stages}\n", file="stages"))


def measured(model: str, text: str, student: Path, kind: str, rate: float) -> dict[str, float]:
    """Let a student learn at a rate; return KL before and after."""
    stage = (
        f'{{distill: logits, teacher: "{model}", rate: {rate}, max_steps: {STEPS}, '
        f"batch: {BATCH}, seq_len: {SEQ_LEN}, measure_every: {STEPS}{OPTIONS.get(kind, '')}}}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        made = run(recipe(str(student), text, stage), Path(scratch) / "out")
    training = made.stages[-1].training
    if training is None:
        raise RuntimeError("the stage does not train")
    return {"kl_before": training.before["kl"], "kl_after": training.after["kl"]}


def store(name: str, kind: str, rows: dict[str, dict[str, float]]) -> None:
    """Put the rates of one student into the results."""
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"students": {}}
    best = min(row["kl_after"] for row in rows.values())
    rates = {
        rate: row | {"excess": row["kl_after"] / best}
        for rate, row in sorted(rows.items(), key=lambda one: float(one[0]))
    }
    found["students"].setdefault(name, {})[kind] = {
        "steps": STEPS,
        "tokens": STEPS * BATCH * SEQ_LEN,
        "rates": rates,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def stored(name: str, kind: str) -> dict[str, dict[str, float]]:
    """Return what is known of a student at today's number of steps: rate -> figures."""
    if not RESULTS.is_file():
        return {}
    row = json.loads(RESULTS.read_text())["students"].get(name, {}).get(kind, {})
    return dict(row["rates"]) if row.get("tokens") == STEPS * BATCH * SEQ_LEN else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("student", choices=sorted(STUDENTS))
    parser.add_argument("rates", nargs="+", type=float)
    parser.add_argument("--assets", type=Path, help="where models and texts of others are")
    arguments = parser.parse_args()
    name, kind = arguments.model, arguments.student
    model = text = "builtin:tinyworld"
    if name != "tinyworld":
        if arguments.assets is None:
            parser.error(f"{name} needs --assets")
        model = str(arguments.assets / "models" / name)
        text = str(arguments.assets / "text/tinystories/train800.jsonl")
    rows = stored(name, kind)
    with tempfile.TemporaryDirectory() as scratch:
        student = Path(scratch) / "student"
        for rate in arguments.rates:
            if str(rate) in rows:
                continue
            if not student.is_dir():
                run(recipe(model, text, STUDENTS[kind]), student)
            rows[str(rate)] = row = measured(model, text, student, kind, rate)
            store(name, kind, rows)
            print(f"{name} {kind} {rate}: KL {row['kl_before']:.4f} -> {row['kl_after']:.4f}")


if __name__ == "__main__":
    main()

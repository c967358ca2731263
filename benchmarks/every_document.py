"""Are our figures lm-eval's on every document, and does an independent scorer agree?

The comparisons are those of `tests/evaluate/tasks/test_harness.py`, which CI makes on 200 documents
a task. Here each is made once on all of them, in parts of minutes, and what both sides found is
stored: `by hand` is `lm_eval.simple_evaluate` with lm-eval's own `hf` model on the same task files,
and equal means `==` of every figure; `independent` is the scorer of that file, written from the
definition, and equal means that no log-likelihood is further off than its tolerance and accuracies
differ only where the two best choices are nearer than that.

    python benchmarks/every_document.py --assets ../shared/assets                # all, an hour
    python benchmarks/every_document.py --assets ../shared/assets --only truthfulqa_mc1

What is stored is not measured again; delete its entry, or the file, for that.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import lm_eval
from delta_large import about

from unicomp import builtin
from unicomp.evaluate.score import score
from unicomp.evaluate.tasks import harness

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/every_document.json"
COMPARISONS = ROOT / "tests/evaluate/tasks/test_harness.py"
BATCH, TOLERANCE = 128, 1e-3
HAND = "by hand"
INDEPENDENT = "independent"

# task -> the file that is cut into parts, and into how many; the others are done as a whole
CUT = {
    "local_hellaswag": ("hellaswag/hellaswag_val.jsonl", 3),
    "local_truthfulqa_mc1": ("truthfulqa/truthfulqa_mc.jsonl", 4),
    "local_truthfulqa_mc2": ("truthfulqa/truthfulqa_mc.jsonl", 6),
    "local_bbq_age": ("bbq/Age.jsonl", 2),
}
SCORED_APART = ("local_arc_easy", "local_arc_challenge", "local_hellaswag", "local_truthfulqa_mc1")


def comparisons() -> ModuleType:
    """Return the file of tests, whose comparisons are made here."""
    spec = importlib.util.spec_from_file_location("comparisons", COMPARISONS)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(COMPARISONS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wanted() -> Iterator[tuple[str, str, int, int]]:
    """Yield (how, task, part, parts) of all that there is to compare."""
    local = harness.FOLDER / "local"
    paradigms = sorted(f"local_blimp_{path.stem}" for path in (local / "blimp").glob("[!_]*.yaml"))
    own = [f"tinyworld_{name}" for name in "knowledge reasoning reading grammar".split()]
    tasks = ["local_blimp", *sorted(f"local_{path.stem}" for path in local.glob("[!_]*.yaml"))]
    for how, names in (
        (HAND, [*own, "tinyworld_instructions", "tinyworld_heldout", *tasks]),
        (INDEPENDENT, [*own, *paradigms, *SCORED_APART]),
    ):
        for task in names:
            parts = CUT.get(task, ("", 1))[1]
            yield from ((how, task, part, parts) for part in range(parts))


def cut(benchmarks: Path, folder: Path, task: str, part: int, parts: int) -> Path:
    """Return a folder of benchmarks in which the task's file has only the rows of this part."""
    if parts == 1:
        return benchmarks
    name = CUT[task][0]
    rows = (benchmarks / name).read_text("utf-8").splitlines(keepends=True)
    file = folder / name
    file.parent.mkdir(parents=True)
    file.write_text(
        "".join(rows[len(rows) * part // parts : len(rows) * (part + 1) // parts]), "utf-8"
    )
    return folder


def documents(task: str) -> int:
    """Return how many documents a task, or a group, has."""
    return sum(len(one.eval_docs) for one in harness.Catalogue().load(task)["tasks"].values())


def by_hand(module: ModuleType, folder: Path, task: str) -> dict[str, Any]:
    """Return every figure of both sides."""
    report = score(folder, axes=["accuracy"], tasks=[task], batch_size=BATCH, text=None)
    ours = {one.name: one.value for one in report.scores if one.name.count("/") == 2}
    words = {"pretrained": str(folder), "dtype": "float32"}
    theirs = module.by_hand("hf", words, task, None, BATCH)
    return {"ours": ours, "theirs": theirs, "equal": bool(ours) and ours == theirs}


def independent(module: ModuleType, folder: Path, task: str) -> dict[str, Any]:
    """Return accuracies of both sides, and how far log-likelihoods are apart at most."""
    result = module.run_ours(folder, task, None, BATCH, compute="dequantized")
    found, accuracy = module.independent(folder, task, None)
    try:
        module.check(found, accuracy, result, TOLERANCE)
        equal = True
    except AssertionError:
        equal = False
    pairs = zip(result.choices.loglikelihoods, found, strict=True)
    return {
        "ours": {"acc": result.metrics["acc"].value},
        "theirs": {"acc": accuracy},
        "largest_difference_nats": max(float((one - other).abs().max()) for one, other in pairs),
        "tolerance_nats": TOLERANCE,
        "equal": equal,
    }


def store(key: str, found: dict[str, Any]) -> None:
    """Put one comparison among the results."""
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
    known[key] = found
    ordered = {name: known[name] for name in sorted(known)}
    RESULTS.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Compare what is not stored yet; return 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--assets", type=Path, required=True, help="folder of models and files")
    parser.add_argument("--only", default="", help="part of the names of what is compared")
    arguments = parser.parse_args()
    assets = arguments.assets.resolve()
    module, wrong = comparisons(), 0
    # What simple_evaluate says of the machine takes seconds, and is no result.
    lm_eval.evaluator.add_env_info = lambda _: None
    for how, task, part, parts in wanted():
        key = f"{how}/{task}" + (f"/{part + 1}of{parts}" if parts > 1 else "")
        known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {}
        if key in known or arguments.only not in key:
            continue
        with tempfile.TemporaryDirectory() as cache:
            os.environ["XDG_CACHE_HOME"] = cache  # results of interrupted scores stay apart
            own = cut(assets / "benchmarks", Path(cache) / "rows", task, part, parts)
            os.environ["UNICOMP_BENCHMARKS"] = str(own)
            tiny = task.startswith("tinyworld")
            folder = builtin.model("tinyworld") if tiny else assets / "models/stories260K"
            head = {"model": folder.name, "documents": documents(task)} | about()
            began = time.monotonic()
            found = {HAND: by_hand, INDEPENDENT: independent}[how](module, folder, task)
        store(key, head | found | {"seconds": time.monotonic() - began})
        wrong += not found["equal"]
        verdict = "equal" if found["equal"] else "DIFFERENT"
        print(f"{key}: {head['documents']} documents, {verdict}", file=sys.stderr, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""How much of a fine-tune's gain survives each delta method at each ratio.

A pair is a base, its fine-tune and text of the fine-tune's kind. The gain is the fall of the mean
negative log-likelihood of a token, in windows of 256; what a delta keeps of it is

    recovery = (base - restored) / (base - fine-tune)

    python benchmarks/delta_recovery.py --assets ../shared/assets    # a few minutes on one core

Figures of quality: a busy machine does not change them. The embedded pair needs no assets.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicomp import builtin, hub, machine, text
from unicomp.compress import methods
from unicomp.kernels.load import load
from unicomp.recipes.delta import plan_delta
from unicomp.recipes.delta_run import compress, restore

RESULTS = Path(__file__).resolve().parent / "results/delta_recovery.json"
WINDOW, WINDOWS, BATCH = 256, 100, 25
RATIOS = (1 / 16, 1 / 8, 1 / 4)

# name -> method and options; a ratio below what a method reaches is declined, and recorded so.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bitdelta": ("bitdelta", {}),
    "svd": ("svd", {}),
    "dqrelo": ("dqrelo", {}),
    "dqrelo, low rank first": ("dqrelo", {"first": "low-rank"}),
    "dqrelo-plus, one plane": ("dqrelo-plus", {"planes": 1}),
    "dqrelo-plus, ratio for each weight": ("dqrelo-plus", {"allocation": "tensor"}),
    "dqrelo-plus, early 0.5": ("dqrelo-plus", {"early": 0.5}),
    "dqrelo-plus": ("dqrelo-plus", {}),
}


def pairs(assets: Path | None) -> dict[str, tuple[str, str, Path]]:
    """Return name -> base, fine-tune, text."""
    found = {
        "tinyworld-pirate": (
            "builtin:tinyworld",
            "builtin:tinyworld-pirate",
            builtin.heldout("pirate_heldout.txt"),
        )
    }
    for name in ("stories260K", "templateGPT-llama3-1M"):
        if assets is not None:
            base = assets / "models" / name
            tuned = assets / "models" / f"{name}-ft-shakespeare"
            found[name] = (str(base), str(tuned), assets / "text/tinyshakespeare/val.txt")
    return found


def windows(model: str, file: Path) -> Tensor:
    """Return int64 [windows, 256] of a text in a model's tokens."""
    tokenizer = text.tokenizer(hub.resolve(model).folder)
    ids = torch.tensor(tokenizer(file.read_text("utf-8"), add_special_tokens=False)["input_ids"])
    count = min(len(ids) // WINDOW, WINDOWS)
    return ids[: count * WINDOW].view(count, WINDOW)


@torch.no_grad()
def nll(model: str | Path, ids: Tensor) -> float:
    """Return the mean negative log-likelihood of every token of a window but its first, in nats."""
    network = load(hub.resolve(str(model)).folder)
    total = 0.0
    for batch in ids.split(BATCH):
        logits = network(batch).logits[:, :-1].log_softmax(-1)
        total -= float(logits.gather(2, batch[:, 1:, None]).sum(dtype=torch.float64))
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def measure(base: str, tuned: str, file: Path, contenders: list[str]) -> dict[str, Any]:
    """Compress, restore and score one pair with each method at each ratio."""
    ids = windows(tuned, file)
    low, full = nll(base, ids), nll(tuned, ids)
    points = []
    for name in contenders:
        method, options = CONTENDERS[name]
        for ratio in RATIOS if method != "bitdelta" else RATIOS[:1]:
            kind = methods.find("delta", method)
            known: Any = kind.model_validate({"base": base, "ratio": ratio} | options)
            plan = plan_delta(tuned, method, known)
            with tempfile.TemporaryDirectory() as folder:
                delta, again = Path(folder, "delta"), Path(folder, "restored")
                made = compress(plan, delta).totals
                restore(delta, base, again)
                found = nll(again, ids)
            share = made.payload / made.matrix_bytes_16
            if share > ratio * 1.01:
                raise RuntimeError(f"{name} takes {share} of {ratio}")
            point = {
                "contender": name,
                "ratio": ratio,
                "payload_share": share,
                "file_bytes": made.file,
                "file_share": made.file / made.matrix_bytes_16,
                "error": made.error,
                "nll": found,
                "recovery": (low - found) / (low - full),
            }
            points.append(point)
            print(f"  {ratio:.4f} {name}: {point['recovery']:.4f}", file=sys.stderr, flush=True)
    return {"nll_base": low, "nll_tuned": full, "windows": len(ids), "points": points}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--assets", type=Path, help="folder of the shared models and texts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "question": "how much of a fine-tune's gain survives each delta method",
        "machine": machine.describe(),
        "versions": machine.versions(),
        "window": WINDOW,
        "pairs": {},
    }
    for name, (base, tuned, file) in pairs(arguments.assets).items():
        print(name, file=sys.stderr)
        result["pairs"][name] = measure(base, tuned, file, list(CONTENDERS))
    written = json.dumps(result, indent=1) + "\n"
    arguments.out.write_text(written, encoding="utf-8")
    print(written)


if __name__ == "__main__":
    main()

"""Do factors of mixed bits, in the spirit of Delta-CoMe, earn a place among the delta methods?

Every singular vector gets 8, 4, 3 or 2 bits, or none, by what it would lose and what it takes, at
one price per byte over the whole model; Delta-CoMe has fixed bands of such bits, and DeltaMix
chooses them. That is tried with factors alone, as those papers have it, and with factors of what
sign planes leave. The bytes are counted as they would be stored, a scale of four bytes for each
vector, and the figures held against int8 factors under the same price. Vectors are rounded
to nearest at the best of a few scales, no text is read: where GPTQ would round them better, it
needs one. Shares of the gain are as in `delta_recovery.py`, of whose pairs these are.

    python benchmarks/delta_mixed.py --assets ../shared/assets

Papers: Delta-CoMe, arXiv:2406.08903; DeltaMix, arXiv:2506.11087.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from delta_large import about
from delta_recovery import OVER_4_BITS, RATIOS, nll, nll_of, pairs, windows
from torch import Tensor

from unicomp import hub
from unicomp.checkpoint import Checkpoint
from unicomp.compress.decompose import fit_planes
from unicomp.kernels.delta import Layout, PackedDelta
from unicomp.kernels.load import load

RESULTS = Path(__file__).resolve().parent / "results/delta_mixed.json"
ROUNDS, PLANES, STEPS = 4, 4, 60
CLIPS = torch.linspace(0.3, 1.0, 29)  # of the largest magnitude: scales that are tried
# What rounding a normal vector to so many bits leaves of its square: only to choose bits by.
LOSS = {8: 1e-4, 4: 0.0115, 3: 0.0374, 2: 0.1188}

# name -> most planes, bits that a vector may have
CONTENDERS: dict[str, tuple[int, tuple[int, ...]]] = {
    "factors alone, int8": (0, (8,)),
    "factors alone, mixed bits": (0, (8, 4, 3, 2)),
    "planes and factors, int8": (PLANES, (8,)),
    "planes and factors, mixed bits": (PLANES, (8, 4, 3, 2)),
}


@dataclass(frozen=True)
class Delta:
    """What a fine-tune added to one weight, with what planes leave of it.

    whole    float32 [out, in]
    left     planes -> squared error that they leave, and squared singular values of the rest
    """

    whole: Tensor
    left: Mapping[int, tuple[float, Tensor]]


def opened(whole: Tensor) -> Delta:
    """Return a delta with all that a price has to know of it."""
    left = {}
    for count in range(PLANES + 1):
        rest = whole - planes_of(whole, count)
        left[count] = (square(rest), torch.linalg.svdvals(rest.double()).square())
    return Delta(whole, left)


def planes_of(target: Tensor, count: int) -> Tensor:
    """Return what so many sign planes with a scale for all keep of a matrix."""
    if count == 0:
        return torch.zeros_like(target)
    planes = fit_planes(target, count, by_row=False, zero_plus=False)
    return PackedDelta((len(target), target.shape[1]), planes, None).decode()


def square(tensor: Tensor) -> float:
    """Return the squared norm."""
    return float(tensor.square().sum(dtype=torch.float64))


def rounded(vectors: Tensor, bits: int) -> Tensor:
    """Round each row, float32 [rank, any], to 2^bits values at the best of a few scales."""
    half = 0.5 if bits == 2 else 0.0  # four values lie at odd halves; of more, zero is one
    top = 2 ** (bits - 1) - 1
    best, least = vectors.clone(), torch.full((len(vectors), 1), torch.inf)
    for clip in CLIPS:
        scale = vectors.abs().amax(1, keepdim=True).clamp_min(1e-30) * clip / (top + half)
        codes = (vectors / scale - half).round().clamp(-top - (1 if half else 0), top) + half
        found = codes * scale
        error = (found - vectors).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, found, best), torch.minimum(error, least)
    return best


def best(own: Delta, price: float, most: int, allowed: tuple[int, ...]) -> tuple[int, list[int]]:
    """Return planes and the bits of each rank that cost least, error plus price times bytes."""
    shape = (len(own.whole), own.whole.shape[1])
    found: tuple[float, int, list[int]] | None = None
    for count in range(most + 1):
        error, squares = own.left[count]
        losses = [torch.ones_like(squares)] + [
            torch.full_like(squares, 1 - (1 - LOSS[bits]) ** 2) for bits in allowed
        ]
        costs = torch.tensor([0] + [rank_bytes(shape, bits) for bits in allowed])
        each = torch.stack(losses) * squares + price * costs[:, None]
        chosen = each.min(0)
        bits = [(0, *allowed)[place] for place in chosen.indices.tolist()]
        total = error - float(squares.sum()) + float(chosen.values.sum())
        total += price * Layout(count, False, 0, True).nbytes(shape)
        if found is None or total < found[0]:
            found = total, count, bits
    if found is None:
        raise RuntimeError("no planes")
    return found[1], [bits for bits in found[2] if bits]


def rank_bytes(shape: tuple[int, int], bits: int) -> int:
    """Return the bytes of one rank: codes of both vectors, and a scale for each."""
    return sum(-(-side * bits // 8) for side in shape) + 8


def nbytes(own: Delta, count: int, bits: list[int]) -> int:
    """Return the bytes of a weight."""
    shape = (len(own.whole), own.whole.shape[1])
    return Layout(count, False, 0, True).nbytes(shape) + sum(rank_bytes(shape, b) for b in bits)


def decoded(own: Delta, count: int, bits: list[int]) -> Tensor:
    """Return what is kept: planes and factors fitted in turn, the factors rounded."""
    low = torch.zeros_like(own.whole)
    for _ in range(ROUNDS if count and bits else 1):
        high = planes_of(own.whole - low, count)
        if bits:
            u, values, v = torch.linalg.svd(own.whole - high, full_matrices=False)
            root = values[: len(bits)].sqrt()
            left, right = (u[:, : len(bits)] * root).T, v[: len(bits)] * root[:, None]
            which = torch.tensor(bits)
            for own_bits in set(bits):
                some = which == own_bits
                left[some], right[some] = (
                    rounded(left[some], own_bits),
                    rounded(right[some], own_bits),
                )
            low = left.T @ right
    return high + low


def measure(base: str, tuned: str, file: Path) -> dict[str, Any]:
    """Keep the delta of a pair in each way at each ratio, and score the base with it."""
    ids = windows(tuned, file)
    low, full = nll(base, ids), nll(tuned, ids)
    before, after = (Checkpoint.open(hub.resolve(name).folder) for name in (base, tuned))
    deltas, vectors = {}, {}
    for name in after.tensors:
        whole = after.read(name).float()
        if whole.ndim == 2:
            deltas[name] = opened(whole - before.read(name).float())
        else:
            vectors[name] = whole
    sixteen = sum(2 * own.whole.numel() for own in deltas.values())
    norm = sum(square(own.whole) for own in deltas.values())
    points = []
    for ratio in RATIOS:
        for name, (most, allowed) in CONTENDERS.items():
            under, over = -80.0, 200.0  # binary logarithms of the price
            for _ in range(STEPS):
                price = 2.0 ** ((under + over) / 2)
                chosen = {key: best(own, price, most, allowed) for key, own in deltas.items()}
                taken = sum(nbytes(own, *chosen[key]) for key, own in deltas.items())
                if taken <= ratio * sixteen * 1.01:
                    kept, share, over = chosen, taken / sixteen, (under + over) / 2
                else:
                    under = (under + over) / 2
            network = load(hub.resolve(base).folder, dtype=torch.float32)
            missed = 0.0
            with torch.no_grad():
                for key, own in deltas.items():
                    found = decoded(own, *kept[key])
                    missed += square(own.whole - found)
                    network.get_parameter(key).add_(found)
                for key, whole in vectors.items():
                    network.get_parameter(key).copy_(whole)
            loss = nll_of(network, ids)
            point = {
                "contender": name,
                "ratio": ratio,
                "payload_share": share,
                "error": missed / norm,
                "nll": loss,
                "recovery": (low - loss) / (low - full),
                "bits": {
                    str(bits): sum(own[1].count(bits) for own in kept.values()) for bits in LOSS
                },
            }
            points.append(point)
            print(
                f"  {ratio:.4f} {name}: error {point['error']:.4f}, {point['recovery']:.4f}",
                file=sys.stderr,
                flush=True,
            )
    return {"nll_base": low, "nll_tuned": full, "windows": len(ids), "points": points}


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--assets", type=Path, help="folder of the shared models and texts")
    parser.add_argument("--pair", help="only this one; the others' figures are left")
    arguments = parser.parse_args()
    known = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"pairs": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, (base, tuned, file, _) in pairs(arguments.assets, Path(folder)).items():
            if name != OVER_4_BITS and arguments.pair in (None, name):
                print(name, file=sys.stderr)
                known["pairs"][name] = about() | measure(base, tuned, file)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

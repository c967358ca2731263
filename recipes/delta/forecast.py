"""What compressing a delta will take of memory, from headers only.

One weight is worked on at a time, so it is the largest that counts: its copies, and what its
decomposition needs. Ranks are taken as high as they may get, which the values decide: where they
turn out lower, less is held. Where scales are trained, both models are held beside what a step
keeps for its way back. There is nothing to choose that takes less, so a limit below the forecast
is declined.
`tests/recipes/delta/test_forecast.py` holds it against what processes really took.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from unicomp.compress.allocate import FEW, GRACE, WEIGHED
from unicomp.compress.counted import SCALE_BATCH
from unicomp.compress.lowrank import EXACT, MANY, OVERSAMPLE, PASSES, SHORT
from unicomp.compress.method import DeltaMethod
from unicomp.errors import UnicompError
from unicomp.kernels.delta import Layout
from unicomp.kernels.delta_folder import PIECE, Stored
from unicomp.recipes.layers.forecast import IMPORTS
from unicomp.recipes.schema import Calibration

# Copies in float32 of the largest matrix that live at once: when choices of planes are weighed,
# the delta and what two of them leave; when one layout is carried out, the delta and its rest.
WEIGHING, SOLVING = 3, 2
# What lies between: the C library keeps freed memory until a matrix is done, more of it or less
# from run to run; 1.15 to 1.35 times what is held was seen on two machines (torch 2.13, glibc).
BETWEEN = 1.5


def memory(
    method: DeltaMethod,
    fates: Iterable[Stored],
    budget: int,
    config: Mapping[str, Any],
    calibration: Calibration | None,
) -> dict[str, int]:
    """Return bytes by what they are for; their sum is the forecast.

    budget  most bytes that is stored of all matrices
    config  of the fine-tune
    """
    kept = list(fates)
    works = [_work(method, own, budget) for own in kept if own.kind == "delta"]
    # A piece is read while the last is still held; what is kept as it is is read whole.
    works.append({"hashing": min(max(map(_stored, kept), default=0), 2 * PIECE)})
    exact = (own for own in kept if own.kind == "exact")
    works.append({"kept as they are": 2 * max(map(_stored, exact), default=0)})
    found = {"imports": IMPORTS} | max(works, key=lambda parts: sum(parts.values()))
    if calibration is None:
        return found
    trained = _training(method, kept, config, calibration)
    return max(found, {"imports": IMPORTS} | trained, key=lambda parts: sum(parts.values()))


def check(parts: Mapping[str, int], limit: int | None) -> None:
    """Raise UnicompError where a forecast is over the bytes that the user allows."""
    needed = sum(parts.values())
    if limit is not None and needed > limit:
        largest = max(parts, key=lambda name: parts[name])
        instead = ", or leave out `--calibration`" if "models" in parts else ""
        raise UnicompError(
            f"--max-memory {limit} bytes is too small: this delta needs {needed} bytes, "
            f"{parts[largest]} of them for {largest}",
            hint=f"give at least {-(-needed // (1 << 20))}MiB{instead}",
        )


def _stored(own: Stored) -> int:
    """Return the bytes of the fine-tune's tensor."""
    return prod(own.shape) * {"F64": 8, "F32": 4}.get(own.dtype, 2)


def _work(method: DeltaMethod, own: Stored, budget: int) -> dict[str, int]:
    """Return what one matrix of a weight takes while it is worked on, whatever its values are."""
    *front, out, columns = own.common
    shape, count, size = (out, columns), prod(front), 4 * out * columns
    weighs = method.spreads() or len(method.layouts()) > 1
    steps = [size + _stored(own) // max(count, 1)]  # reading
    for layout in method.layouts():
        rank = _most(method, shape, layout, budget // max(count, 1))
        factors = 4 * rank * sum(shape)
        rounds = 2 if layout.planes else 1  # the factors of the round before are there too
        beside = (SOLVING if layout.planes else 1) * size
        steps.append(beside + _leading(shape, rank) + rounds * factors)
        steps.append(2 * size + factors)  # restored, to tell the error
        if weighs:
            room = 2 * method.ratio * prod(shape) - layout.planes * layout.plane_bytes(shape)
            looked = min(int(WEIGHED * max(room, 0) / layout.rank_bytes(shape)) + 1, *shape)
            steps += [WEIGHING * size, 2 * size + _spectrum(shape, looked)]
    packed = min(int((WEIGHED if weighs else 1) * method.ratio * 2 * out * columns * count), budget)
    return {
        "weights": int(BETWEEN * max(steps)),
        "what is stored of them": packed * (2 if front else 1),  # of experts, to be joined
    }


def _most(method: DeltaMethod, shape: tuple[int, int], layout: Layout, budget: int) -> int:
    """Return the highest rank that a weight may get.

    budget  most bytes that one matrix may take
    """
    if not method.ranked():
        return 0
    if not method.spreads() and len(method.layouts()) == 1:
        return min(method.rank(shape, layout) + 1, *shape)
    times = WEIGHED if method.spreads() else 1 + GRACE
    own = 2 * method.ratio * prod(shape) - layout.planes * layout.plane_bytes(shape)
    left = budget - layout.planes * layout.plane_bytes(shape)
    return min(int(max(min(times * own, left), 0) / layout.rank_bytes(shape)) + 1, *shape)


def _leading(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes of `lowrank.leading` beside its matrix."""
    short, width = min(shape), rank + OVERSAMPLE
    if rank == 0:
        return 0
    if width * EXACT >= short or short <= SHORT:
        # A copy, both sides and the part of them that is kept, and LAPACK's own.
        return 4 * (prod(shape) + short * sum(shape) + rank * sum(shape)) + 16 * short**2
    blocks = (PASSES + 1) * width
    factored = 8 * blocks * shape[0] + 4 * blocks**2  # all blocks, their basis, and R
    # The basis and what it sees of the matrix; in float64 the squares of that, their vectors, and
    # LAPACK's own two copies.
    return max(factored, 4 * blocks * sum(shape) + 32 * blocks**2)


def _spectrum(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes of `lowrank.spectrum` beside its matrix."""
    short = min(shape)
    if short <= SHORT or rank * MANY < short:
        return _leading(shape, rank)
    return max(12 * short**2, _leading(shape, min(rank, FEW)))


def _training(
    method: DeltaMethod, fates: list[Stored], config: Mapping[str, Any], calibration: Calibration
) -> dict[str, int]:
    """Return what training the scales takes: `compress/scales.py`."""
    parameters = sum(prod(own.shape) for own in fates)
    matrices = [own for own in fates if own.kind == "delta"]
    planes = max(layout.planes for layout in method.layouts())
    tokens = SCALE_BATCH * calibration.length
    # Of each linear its input, what each plane gives, and their sum; of a layer the same again.
    linears = sum(sum(own.shape[-2:]) for own in matrices)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    scores = 3 * layers * heads * SCALE_BATCH * calibration.length**2
    vocab = int(config.get("vocab_size") or 0)
    return {
        "models": 2 * 4 * parameters + max((4 * prod(own.shape) for own in fates), default=0),
        "signs": 4 * planes * sum(prod(own.shape) for own in matrices),
        "activations": 4 * (2 * tokens * linears * (1 + planes) + scores),
        "logits": 4 * 8 * tokens * vocab,
    }

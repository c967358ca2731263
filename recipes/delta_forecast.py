"""What compressing a delta will take of memory, from headers only.

One weight is worked on at a time, so it is the largest that counts: its copies, and what its
decomposition needs. Where scales are trained, both models are held beside what a step keeps for its
way back. There is nothing to choose that takes less, so a limit below the forecast is declined.
`tests/recipes/test_delta_forecast.py` holds it against what processes really took.
"""

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from unicomp.compress.lowrank import EXACT, OVERSAMPLE, PASSES, SHORT
from unicomp.compress.method import DeltaMethod
from unicomp.compress.scales import BATCH
from unicomp.errors import UnicompError
from unicomp.kernels.delta import Layout
from unicomp.kernels.delta_folder import PIECE, Stored
from unicomp.recipes.forecast import IMPORTS
from unicomp.recipes.schema import Calibration

WEIGHED = 1.5  # of a weight's own share: most that its ranks are looked for in (`delta_run.py`)
# Copies in float32 of the largest matrix that live at once: when choices of planes are weighed, the
# delta, what two of them leave, and the room of a freed one that the C library keeps; when one
# layout is carried out, the delta and what is left of it.
WEIGHING, SOLVING = 4, 2


def memory(
    method: DeltaMethod,
    fates: Iterable[Stored],
    config: Mapping[str, Any],
    calibration: Calibration | None,
) -> dict[str, int]:
    """Return bytes by what they are for; their sum is the forecast.

    config  of the fine-tune
    """
    kept = list(fates)
    works = [_work(method, own) for own in kept if own.kind == "delta"]
    work = max(works, key=lambda parts: sum(parts.values()), default={})
    whole = max((_stored(own) for own in kept), default=0)
    found = {"imports": IMPORTS, "hashing": min(whole, PIECE)} | work
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


def _work(method: DeltaMethod, own: Stored) -> dict[str, int]:
    """Return what one matrix of a weight takes while it is worked on."""
    *front, out, columns = own.common
    shape, size = (out, columns), 4 * out * columns
    layouts = method.layouts()
    weighs = method.spreads() or len(layouts) > 1
    rank = max(_most(method, shape, layout, weighs) for layout in layouts)
    factors = _decomposition(shape, rank) if rank else 0
    gram = 12 * min(shape) ** 2 if weighs else 0
    solving, weighing = SOLVING * size + factors, WEIGHING * size + gram
    return {
        "weights": max(solving, weighing) if weighs else solving,
        "weights as stored": 2 * _stored(own) // max(prod(front), 1),
        "what is stored of them": prod(front) * int(2 * method.ratio * out * columns),
    }


def _most(method: DeltaMethod, shape: tuple[int, int], layout: Layout, weighs: bool) -> int:
    """Return the highest rank that a weight may get."""
    if not weighs:
        return min(method.rank(shape, layout) + 1, *shape) if method.ranked() else 0
    room = 2 * method.ratio * prod(shape) - layout.planes * layout.plane_bytes(shape)
    return min(int(WEIGHED * max(room, 0) / layout.rank_bytes(shape)) + 1, *shape)


def _decomposition(shape: tuple[int, int], rank: int) -> int:
    """Return the bytes of `lowrank.leading` beside its matrix."""
    short, width = min(shape), rank + OVERSAMPLE
    if width * EXACT >= short or short <= SHORT:
        return 12 * prod(shape) + 24 * short**2  # a copy, both sides, and LAPACK's own
    blocks = (PASSES + 1) * width
    # The blocks, all of them in one, its decomposition and a copy; what they see of the matrix.
    return 4 * blocks * (4 * shape[0] + 2 * shape[1]) + 24 * blocks**2


def _training(
    method: DeltaMethod, fates: list[Stored], config: Mapping[str, Any], calibration: Calibration
) -> dict[str, int]:
    """Return what training the scales takes: `compress/scales.py`."""
    parameters = sum(prod(own.shape) for own in fates)
    matrices = [own for own in fates if own.kind == "delta"]
    planes = max(layout.planes for layout in method.layouts())
    tokens = BATCH * calibration.length
    # Of each linear its input, what each plane gives, and their sum; of a layer the same again.
    linears = sum(sum(own.shape[-2:]) for own in matrices)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 1)
    heads = int(config.get("num_attention_heads") or config.get("n_head") or 1)
    scores = 3 * layers * heads * BATCH * calibration.length**2
    vocab = int(config.get("vocab_size") or 0)
    return {
        "models": 2 * 4 * parameters + max((4 * prod(own.shape) for own in fates), default=0),
        "signs": 4 * planes * sum(prod(own.shape) for own in matrices),
        "activations": 4 * (2 * tokens * linears * (1 + planes) + scores),
        "logits": 4 * 8 * tokens * vocab,
    }

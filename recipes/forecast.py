"""What a run will take, before it starts: resident memory by named parts, operations, disk.

Memory is a sum of what is alive at the moment of the greatest need; the windows of a batch and the
experts of a pass are chosen so that the sum stays under a limit, and a limit that cannot be kept
is declined. Operations are counted products; divided by a measured rate they give a time.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch

from unicomp.compress.layerwise import compared, moment_bytes
from unicomp.compress.method import Need, QuantizeMethod
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.evaluate.score import LONGEST
from unicomp.evaluate.stream import LOGITS
from unicomp.kernels.dense import DenseSource
from unicomp.kernels.packed import Scheme
from unicomp.models import Layer, Model
from unicomp.recipes.schema import Recipe

# Resident bytes of a process that has imported torch, transformers and accelerate, rounded up:
# whole runs on the embedded model peaked at 477 to 525 MB (torch 2.13, transformers 5.23, Linux).
IMPORTS = 640 << 20
# Tokens computed together where memory allows: enough for matrix products at full speed.
BATCH_TOKENS = 2048
# Temporaries of a layer's forward pass, as copies of its widest activation.
LIVE_ACTIVATIONS = 6


def hidden_bytes(
    recipe: Recipe,
    method: QuantizeMethod,
    dense: DenseSource,
    model: Model,
    schemes: Mapping[str, Scheme],
) -> int:
    """Return what states of all windows take on disk at once.

    A layer's input and output, what the second of each pair of steps reads and answers; where the
    uncompressed model runs beside, once more the states, and what its linears read.
    """
    if not method.wants() or recipe.calibration is None:
        return 0
    tokens = recipe.calibration.samples * recipe.calibration.seq_len
    width = hidden_size(dense.config)
    columns = 2 * width + max(sum(width + i for i in _kept(layer)) for layer in model.layers)
    if Need.CROSS in method.wants():
        kept = max(sum(compared(layer, schemes).values()) for layer in model.layers)
        columns += 2 * width + kept
    return tokens * columns * 4


def hidden_size(config: Mapping[str, Any]) -> int:
    """Return the width of the hidden states between layers."""
    for key in ("hidden_size", "n_embd"):
        if isinstance(config.get(key), int):
            return int(config[key])
    raise UnsupportedError("config.json has no `hidden_size`", hint="is it the model's own config?")


def memory(
    recipe: Recipe,
    method: QuantizeMethod,
    dense: DenseSource,
    model: Model,
    schemes: Mapping[str, Scheme],
    limit: int | None,
    reads: bool,
) -> tuple[dict[str, int], int, int]:
    """Return the parts of the forecast, the windows of a batch and the bytes of moments a pass.

    reads  whether model and source are loaded whole to score them
    """
    if reads:
        models = 2 * 4 * sum(torch.Size(info.shape).numel() for info in dense.tensors.values())
        vocab = int(dense.config.get("vocab_size") or 0)
        window = int(dense.config.get("max_position_embeddings") or 0) * vocab * 4
        logits = 2 * max(LOGITS, min(window, LONGEST * vocab * 4)) + 6 * max(32 << 20, vocab * 8)
        scoring = {"imports": IMPORTS, "scored models": models, "logits": logits}
        _decline(sum(scoring.values()), limit, "a shorter list under `score`")
        rest = memory(recipe, method, dense, model, schemes, limit, False)
        return max((scoring, rest[0]), key=lambda parts: sum(parts.values())), *rest[1:]
    largest = max(_layer_bytes(layer) for layer in model.layers)
    matrix = max(4 * linear.shape[0] * linear.shape[1] for linear in model.linears())
    if not method.wants() or recipe.calibration is None:
        parts = {"imports": IMPORTS, "solver": _solver_bytes(method, model, schemes)}
        parts["weights"] = 2 * matrix
        _decline(sum(parts.values()), limit)
        return parts, 1, 0
    cross = Need.CROSS in method.wants()
    seq_len, samples = recipe.calibration.seq_len, recipe.calibration.samples
    inputs = [
        shared[0].shape[1] for layer in model.layers for step in layer.steps for shared in step
    ]
    together = max(
        sum(moment_bytes(s[0].shape[1], cross and s[0].expert is None) for s in step)
        for layer in model.layers
        for step in layer.steps
    )
    least = moment_bytes(max(inputs), cross)
    widest = max(max(linear.shape) for linear in model.linears())
    fixed = {
        "imports": IMPORTS,
        "weights": largest,
        "solver": _solver_bytes(method, model, schemes),
        "embedding rows": _embedding_bytes(dense, model, samples * seq_len),
    }

    def forecast(batch: int, moments: int) -> dict[str, int]:
        tokens = batch * seq_len
        heads = int(dense.config.get("num_attention_heads", dense.config.get("n_head", 1)))
        attention = batch * heads * seq_len * seq_len * 4
        live = LIVE_ACTIVATIONS * tokens * widest * 4 + attention
        return fixed | {"statistics": moments, "activations": live}

    best = max(1, min(samples, BATCH_TOKENS // seq_len))
    options = [(best, min(together, max(least, 4 << 30)))]
    while options[-1][0] > 1:
        options.append((options[-1][0] // 2, options[-1][1]))
    if together > least:
        options.append((1, least))
    for batch, moments in options:
        found = forecast(batch, moments)
        if limit is None or sum(found.values()) <= limit:
            return found, batch, moments
    _decline(sum(forecast(*options[-1]).values()), limit)
    raise AssertionError("declined")


def _decline(needed: int, limit: int | None, instead: str = "a shorter `seq_len`") -> None:
    if limit is not None and needed > limit:
        raise UnicompError(
            f"--max-memory {limit} bytes is too small: the least that this run needs is "
            f"{needed} bytes",
            hint=f"give at least {-(-needed // (1 << 20))}MiB, or {instead}",
        )


def _layer_bytes(layer: Layer) -> int:
    return sum(4 * linear.shape[0] * linear.shape[1] for linear in layer.linears())


def _solver_bytes(method: QuantizeMethod, model: Model, schemes: Mapping[str, Scheme]) -> int:
    """Return the most bytes that solving one stack of linears takes, with the stack itself."""
    sizes = [
        (sum(one.shape[0] for one in shared if one.module in schemes), shared[0].shape[1])
        for layer in model.layers
        for step in layer.steps
        for shared in step
    ]
    return max(
        4 * rows * columns + method.workspace_bytes(rows, columns) for rows, columns in sizes
    )


def _kept(layer: Layer) -> list[int]:
    """Return the widths of what the second of each pair of steps reads; experts keep nothing."""
    return [step[0][0].shape[1] for step in layer.steps[1::2] if step[0][0].expert is None]


def _embedding_bytes(dense: DenseSource, model: Model, tokens: int) -> int:
    return sum(
        4 * min(tokens, dense.tensors[name].shape[0]) * dense.tensors[name].shape[-1]
        for name, role in model.roles.items()
        if role == "embedding"
    )


def operations(
    recipe: Recipe,
    method: QuantizeMethod,
    dense: DenseSource,
    model: Model,
    schemes: Mapping[str, Scheme],
) -> float:
    """Count multiply-adds, twice: forward passes, second moments, and the solvers' products."""
    tokens = 0
    if method.wants() and recipe.calibration is not None:
        tokens = recipe.calibration.samples * recipe.calibration.seq_len
    chosen = int(dense.config.get("num_experts_per_tok") or 1)
    total = 0.0
    for layer in model.layers:
        before = 0.0
        for step in layer.steps:
            share = min(1.0, chosen / len(step))
            own = sum(2.0 * o * i for s in step for o, i in (one.shape for one in s)) * share
            routed = tokens * share
            for shared in step:
                columns = shared[0].shape[1]
                rows = sum(one.shape[0] for one in shared if one.module in schemes)
                if rows:
                    total += 1.1 * routed * columns**2 + 6.0 * rows * columns**2 + columns**3
            total += before * tokens
            before += own
        total += before * tokens
    return total


def measured_rate() -> float:
    """Measure this machine's float32 matrix product, in operations a second."""
    left = torch.ones(768, 768)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        left @ left
        best = min(best, time.perf_counter() - start)
    return 2.0 * 768**3 / best

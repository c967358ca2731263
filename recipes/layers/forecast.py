"""What a run will take, before it starts: resident memory by named parts, and disk.

Memory is a sum of what is alive at the moment of the greatest need; the windows of a batch and the
experts of a pass are chosen so that the sum stays under a limit, and a limit that cannot be kept
is declined.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from unicomp.checkpoint import DTYPE_BITS
from unicomp.compress.counted import alike, compared, moment_bytes
from unicomp.compress.method import LayerMethod, Need, PruneMethod
from unicomp.errors import UnsupportedError
from unicomp.evaluate.windows.cut import LONGEST
from unicomp.evaluate.windows.stream import LOGITS
from unicomp.kernels.dense import DenseSource
from unicomp.models import Layer, Linear, Model, context_length
from unicomp.recipes.schema import Recipe
from unicomp.recipes.stage.planned import decline, most

# Resident bytes of a process that has imported torch, transformers and accelerate and has read a
# tokenizer and made a model without weights: 440 to 458 MiB in four runs on a model of 300 million
# (torch 2.13, transformers 5.23, Linux).
LIBRARIES = 448 << 20
# The same where a model is cut: both models' walks take up to 100 MiB more than the parts named.
CUTTING = LIBRARIES + (96 << 20)
# The same with room for what other runs hold and nobody has counted.
IMPORTS = LIBRARIES + (192 << 20)
# What a pass has freed is used again by the solver after it, and the other way round, but for this
# share of the lesser: it lies in pieces too small. Nothing but measured; of the runs over layers in
# benchmarks/results/{forecast,memory_forecast}.json, peaks are 0.79 to 1.22 of what it comes to.
FREED = 0.4
# Bytes that are hashed, and those whose values are checked, at once, before the work.
HASHED, CHECKED = 1 << 24, 1 << 26
# Tokens computed together where memory allows: enough for matrix products at full speed.
BATCH_TOKENS = 2048
# Most bytes of a layer's inputs that are kept in memory, where files are slower but would do.
HELD = 512 << 20
# Temporaries of a layer's forward pass, as copies of its widest activation.
LIVE_ACTIVATIONS = 6


@dataclass(frozen=True, slots=True)
class Memory:
    """The forecast of a run's memory, and what was chosen for it.

    parts         bytes by name; their sum is the forecast
    batch         windows that are computed together
    moment_bytes  most that one pass's statistics may take
    held          what is kept of a layer stays in memory
    between       bytes that may be resident between two passes over a layer, so that neither what
                  a pass nor what a solver takes goes past the forecast and its allowance
    """

    parts: Mapping[str, int]
    batch: int
    moment_bytes: int
    held: bool
    between: int


def hidden_bytes(
    recipe: Recipe,
    method: LayerMethod,
    dense: DenseSource,
    model: Model,
    targets: Collection[str],
    held: bool,
) -> int:
    """Return what states of all windows take on disk at once.

    A layer's input and output, and what is kept of it where that is not `held` in memory; where the
    uncompressed model runs beside, once more the states, and what its linears read.
    """
    if not method.wants() or recipe.calibration is None:
        return 0
    tokens = recipe.calibration.samples * recipe.calibration.length
    width = hidden_size(dense.config)
    columns = 2 * width + (0 if held else kept_columns(model, width))
    if Need.CROSS in method.wants():
        kept = max(sum(compared(layer, targets).values()) for layer in model.layers)
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
    method: LayerMethod,
    dense: DenseSource,
    model: Model,
    targets: Collection[str],
    limit: int | None,
    reads: bool,
    half: bool,
) -> Memory:
    """Forecast the memory, choosing what keeps it under the limit.

    reads  whether model and source are loaded whole to score them
    half   linears multiply in bfloat16
    """
    if reads:
        models = 2 * 4 * sum(math.prod(info.shape) for info in dense.tensors.values())
        vocab = int(dense.config.get("vocab_size") or 0)
        window = (context_length(dense.config) or 0) * vocab * 4
        logits = 2 * max(LOGITS, min(window, LONGEST * vocab * 4)) + 6 * max(32 << 20, vocab * 8)
        scoring = {"imports": IMPORTS, "scored models": models, "logits": logits}
        decline(scoring, limit, "a shorter list under `score`")
        rest = memory(recipe, method, dense, model, targets, limit, False, half)
        parts = max((scoring, rest.parts), key=lambda parts: sum(parts.values()))
        return replace(rest, parts=parts)
    layers = [layer for layer, _ in alike(model.layers, targets)]
    if not method.wants() or recipe.calibration is None:
        parts = {
            "imports": LIBRARIES,
            "solver": _solver_bytes(method, layers, targets),
            "weights": max(_stored(dense, linear) for linear in model.linears()),
            "pieces read": HASHED + min(CHECKED, max(map(_nbytes, dense.tensors.values()))),
        }
        decline(parts, limit)
        return Memory(parts, 1, 0, False, most(parts))
    largest = max(_layer_bytes(layer, half) for layer in layers)
    cross = Need.CROSS in method.wants()
    seq_len, samples = recipe.calibration.length, recipe.calibration.samples
    inputs = [shared[0].shape[1] for layer in layers for step in layer.steps for shared in step]

    def gathered(columns: int, cross: bool) -> int:
        second = Need.HESSIAN in method.wants()
        return moment_bytes(columns, cross) if second else 8 * columns

    together = max(
        sum(gathered(s[0].shape[1], cross and s[0].expert is None) for s in step)
        for layer in layers
        for step in layer.steps
    )
    least = gathered(max(inputs), cross)
    widest = max(max(linear.shape) for layer in layers for linear in layer.linears())
    solver = _solver_bytes(method, layers, targets)
    fixed = {
        "imports": LIBRARIES,
        "weights": largest,
        "embedding rows": _embedding_bytes(dense, model, samples * seq_len),
    }

    columns = kept_columns(model, hidden_size(dense.config))
    kept = samples * seq_len * columns * (2 if half else 4)

    if isinstance(method, PruneMethod):  # pruned weights stay until the layer is written
        fixed["pruned weights"] = max(_layer_bytes(layer, False) for layer in layers)

    def forecast(batch: int, moments: int, held: bool) -> dict[str, int]:
        """Return the parts; activations have gone when a linear is solved, some of them in vain."""
        tokens = batch * seq_len
        heads = int(dense.config.get("num_attention_heads", dense.config.get("n_head", 1)))
        attention = batch * heads * seq_len * seq_len * 4
        live = LIVE_ACTIVATIONS * tokens * widest * 4 + attention
        found = fixed | {"statistics": moments} | ({"kept inputs": kept} if held else {})
        freed = int(FREED * min(live, solver))
        working = {"activations": live} if live > solver else {"solver": solver}
        return found | working | {"freed in vain": freed}

    best = max(1, min(samples, BATCH_TOKENS // seq_len))
    options = [(best, min(together, max(least, 4 << 30)), False)]
    while options[-1][0] > 1:
        options.append((options[-1][0] // 2, *options[-1][1:]))
    if together > least:
        options.append((1, least, False))
    if kept <= HELD:
        options.insert(0, (*options[0][:2], True))
    for batch, moments, held in options:
        found = forecast(batch, moments, held)
        if limit is None or most(found) <= limit:
            working = max(found.get("activations", 0), found.get("solver", 0))
            return Memory(found, batch, moments, held, most(found) - working)
    decline(forecast(*options[-1]), limit)
    raise AssertionError("declined")


def _layer_bytes(layer: Layer, half: bool) -> int:
    size = 2 if half else 4
    return sum(size * linear.shape[0] * linear.shape[1] for linear in layer.linears())


def _nbytes(meta: Any) -> int:
    return int(meta.nbytes)


def _stored(dense: DenseSource, linear: Linear) -> int:
    """Return the bytes of a linear's weight in the source."""
    dtype = dense.tensors[linear.part.tensor].dtype
    return linear.shape[0] * linear.shape[1] * DTYPE_BITS[dtype] // 8


def _solver_bytes(method: LayerMethod, layers: Sequence[Layer], targets: Collection[str]) -> int:
    """Return the most bytes that solving one stack of linears takes, with the stack itself.

    What reads one input is stacked where it is quantized with statistics; else each goes alone.
    """
    alone = isinstance(method, PruneMethod) or not method.wants()
    sizes = [
        ((max if alone else sum)(rows), shared[0].shape[1])
        for layer in layers
        for step in layer.steps
        for shared in step
        if (rows := [one.shape[0] for one in shared if one.module in targets])
    ]
    return max(
        4 * rows * columns + method.workspace_bytes(rows, columns) for rows, columns in sizes
    )


def kept_columns(model: Model, width: int) -> int:
    """Return the columns of what is kept of a layer; experts keep nothing.

    That is what the second of each pair of steps reads, and of the first pairs what it answers.
    """
    return max(
        sum(width + step[0][0].shape[1] for step in layer.steps[1::2] if step[0][0].expert is None)
        for layer in model.layers
    )


def _embedding_bytes(dense: DenseSource, model: Model, tokens: int) -> int:
    return sum(
        4 * min(tokens, dense.tensors[name].shape[0]) * dense.tensors[name].shape[-1]
        for name, role in model.roles.items()
        if role == "embedding"
    )

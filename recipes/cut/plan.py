"""A stage of structured pruning + checkpoint headers -> plan: the smaller shape, to the unit.

No weight is read. The shape that is made, those weighed beside it, every tensor's fate, the bytes
and parameters of the output and the memory that the run takes are decided here; which channels,
heads, experts or layers stay, the calibration text decides.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from unicomp.checkpoint import Checkpoint
from unicomp.compress.axes import NORMED_AFTER, Axes, Place, Shape, routed
from unicomp.compress.counted import LOST_TOKENS, PIECE
from unicomp.compress.cut_method import MOST_SHOWN, CutMethod, speedup
from unicomp.errors import UnicompError
from unicomp.hub import Source
from unicomp.kernels.dense import DenseSource
from unicomp.models import Linear, context_length, describe
from unicomp.recipes.layers import timing
from unicomp.recipes.layers.forecast import BATCH_TOKENS, CUTTING, LIVE_ACTIVATIONS
from unicomp.recipes.lint.output import Output
from unicomp.recipes.schema import Recipe
from unicomp.recipes.stage import throughput
from unicomp.recipes.stage.planned import Planned, decline, most
from unicomp.writer import Meta


@dataclass(frozen=True, slots=True)
class CutFate:
    """What becomes of one tensor: its shape before and after, and why it is not refitted."""

    name: str
    role: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    bytes_in: int
    bytes_out: int
    why: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CutPlan(Planned):
    """What a stage of structured pruning will do.

    sizes       of the model that is made
    candidates  the first of the shapes that meet the goal, `sizes` first
    fates       of the source's tensors, in its order; of layers that go, some stand for others
    """

    method: CutMethod
    axes: Axes
    sizes: Shape
    candidates: tuple[Shape, ...]
    fates: tuple[CutFate, ...]

    @property
    def params_in(self) -> int:
        """Parameters of the source."""
        return self.axes.params(self.axes.sizes)

    @property
    def params(self) -> int:
        """Parameters of the output."""
        return self.axes.params(self.sizes)

    @property
    def bytes_in(self) -> int:
        """Bytes of all tensors of the source."""
        return self.axes.nbytes(self.axes.sizes)

    @property
    def bytes_out(self) -> int:
        """Bytes of all tensors of the output."""
        return self.axes.nbytes(self.sizes)

    @property
    def sha256(self) -> str:
        """Hash of what will be done."""
        content = {"recipe": self.recipe.to_dict(), "tensors": self.to_json()["tensors"]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def result(self) -> DenseSource:
        """Return the output as a later stage's plan sees it: names, shapes and config only."""
        kept = self.axes.some(self.sizes.layers)
        metas = {meta.name: meta for meta in self.axes.metas(self.sizes, kept)}
        config = self.axes.rewritten(self.sizes, kept)
        return DenseSource(self.checkpoint, config, metas, (), {})

    def output(self) -> Output:
        """Return what a loader will find."""
        left = self.result()
        return Output(left.config, left.tensors)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {
            **self.figures(),
            "params_in": self.params_in,
            "shape": {"before": self.axes.sizes.to_json(), "after": self.sizes.to_json()},
            "candidates": [describe_shape(self.axes, shape) for shape in self.candidates],
            "tensors": [
                {
                    "name": fate.name,
                    "role": fate.role,
                    "shape": list(fate.before),
                    "shape_out": list(fate.after),
                    "why": fate.why,
                    "bytes_in": fate.bytes_in,
                    "bytes_out": fate.bytes_out,
                }
                for fate in self.fates
            ],
        }


def describe_shape(axes: Axes, shape: Shape) -> dict[str, Any]:
    """Return a shape with its parameters, bytes, and the speed-up that its bytes let expect."""
    return {
        "shape": shape.to_json(),
        "params": axes.params(shape),
        "bytes": axes.nbytes(shape),
        "read_speedup": speedup(axes, shape),
    }


def plan_cut(
    recipe: Recipe,
    text: str | None,
    source: Source,
    checkpoint: Checkpoint,
    dense: DenseSource,
    max_memory: int | None,
) -> CutPlan:
    """Work out what a recipe of one stage of structured pruning does to a source.

    Raises UnicompError where the goal or the sizes cannot be had, or not within `max_memory`.
    """
    [stage] = recipe.stages
    method = stage.options
    if not isinstance(method, CutMethod):
        raise TypeError(f"`{stage.verb}: {stage.method}` does not cut")
    if recipe.calibration is None:
        raise UnicompError(
            f"`{stage.verb}: {stage.method}` needs calibration text", hint="give `--calibration`"
        )
    recipe = recipe.model_copy(
        update={"calibration": recipe.calibration.settled(context_length(dense.config))}
    )
    model = describe(dense.config, dense.tensors)
    axes = Axes(dense.config, model, dense.tensors)
    shapes = method.shapes(axes)
    sizes = shapes[0]
    batch, memory = _memory(recipe, method, axes, sizes, max_memory)
    rates = throughput.rates()
    times = _times(recipe, method, axes, sizes, rates)
    return CutPlan(
        recipe=recipe,
        text=recipe.dump() if text is None else text,
        stage=stage,
        method=method,
        source=source,
        dense=dense,
        checkpoint=checkpoint,
        model=model,
        axes=axes,
        sizes=sizes,
        candidates=tuple(shapes[:MOST_SHOWN]),
        fates=tuple(_fates(method, axes, sizes)),
        batch=batch,
        memory=memory,
        disk_bytes=axes.nbytes(sizes) + _state_bytes(recipe, method, axes, sizes),
        times=times,
        basis=timing.words(times, rates),
        notes=(*dense.notes, *_notes(method, axes, sizes)),
    )


def _fates(method: CutMethod, axes: Axes, sizes: Shape) -> list[CutFate]:
    kept = axes.some(sizes.layers)
    linears = {linear.part.tensor: linear for linear in axes.model.linears()}
    found = []
    for name, place in axes.places.items():
        gone = place.layer is not None and place.layer not in kept
        gone = gone or (place.expert is not None and place.expert >= sizes.experts)
        after = Meta(name, place.meta.dtype, (0,) if gone else place.shape(sizes))
        role = "linear" if name in linears else axes.model.roles.get(name, "other")
        why = None if role == "linear" else "no linear"
        if place.inside:
            why = "of an expert: cut, not refitted"
        if role == "head" and not axes.model.tied:
            why = None
        if not method.compensate:
            why = "`compensate` is off"
        found.append(
            CutFate(
                name,
                role,
                tuple(place.meta.shape),
                after.shape,
                place.meta.nbytes,
                after.nbytes,
                "left out" if gone else why,
            )
        )
    return found


def _notes(method: CutMethod, axes: Axes, sizes: Shape) -> list[str]:
    found = [
        f"a decoded token reads {axes.read_bytes(axes.sizes)} bytes of weights before and "
        f"{axes.read_bytes(sizes)} after: what a speed-up may come to is {speedup(axes, sizes):.2f}"
        ", what it came to the scores say",
        *method.notes(axes, sizes),
    ]
    if not method.compensate:
        return found
    if axes.model.tied and sizes.hidden < axes.sizes.hidden:
        found.append("the head shares the embedding's weight: it is cut, not refitted")
    if any(routed(layer) for layer in axes.model.layers):
        found.append("linears of experts are cut, not refitted: tokens change their routes")
    if axes.model.type in NORMED_AFTER:
        found.append("norms stand behind attention and MLP: drift before a layer is not made up")
    return found


def _tokens(recipe: Recipe) -> tuple[int, int]:
    if recipe.calibration is None:
        raise ValueError("no calibration")
    return recipe.calibration.samples, recipe.calibration.length


def _state_bytes(recipe: Recipe, method: CutMethod, axes: Axes, sizes: Shape) -> int:
    """Return what states take on disk: of both models, and what the original's linears read."""
    samples, seq_len = _tokens(recipe)
    columns = 2 * axes.sizes.hidden
    if method.compensate:
        read = max(
            sum(step[0][0].shape[1] for step in layer.steps if step[0][0].expert is None)
            for layer in axes.model.layers
        )
        columns += axes.sizes.hidden + 2 * sizes.hidden + read
    return 4 * samples * seq_len * columns


def _memory(
    recipe: Recipe, method: CutMethod, axes: Axes, sizes: Shape, limit: int | None
) -> tuple[int, dict[str, int]]:
    """Choose the windows of a batch, and forecast the memory of the walk that takes most."""
    samples, seq_len = _tokens(recipe)
    largest = max(_layer_bytes(axes.of_layer(one.index), axes.sizes) for one in axes.model.layers)
    fixed = {"imports": CUTTING}
    fixed["embedding rows"] = sum(
        4 * min(samples * seq_len, place.meta.shape[0]) * place.meta.shape[-1]
        for name, place in axes.places.items()
        if axes.model.roles.get(name) == "embedding"
    )
    widest = max(max(one.shape) for one in axes.model.linears())

    def live(batch: int) -> int:
        attention = batch * axes.sizes.heads * seq_len * seq_len * 4
        attention *= 3 if method.sees_attention() else 1
        return LIVE_ACTIVATIONS * batch * seq_len * widest * 4 + attention

    def walk(batch: int) -> dict[str, int]:
        """Return the parts at the moment that takes most: in a layer, or behind the last."""
        layer = {"weights": largest, "activations": live(batch)}
        moments = [layer | {"importance": _importance_bytes(method, axes)}]
        if method.compensate:
            # The original's layer is let go before the cut one is loaded, but its pages are not
            # all had again: 2048 wide without this the forecast was but 1 % above the peak.
            cut = max(_layer_bytes(axes.of_layer(one.index), sizes) for one in axes.model.layers)
            own = {"cut weights": cut, "least squares": _refit_bytes(axes, sizes)}
            moments.append(layer | own)
        if method.searches():
            tokens = seq_len * min(samples, max(1, LOST_TOKENS // seq_len))
            states = {"states": 4 * tokens * axes.sizes.hidden * (len(axes.loose) + 2)}
            moments += [layer | states, states | {"head": _loss_bytes(axes, batch * seq_len)}]
        if method.compensate and not axes.model.tied:
            moments.append({"head": _head_bytes(axes)})
        parts = fixed | max(moments, key=lambda parts: sum(parts.values()))
        return {name: value for name, value in parts.items() if value}

    batch = max(1, min(samples, BATCH_TOKENS // seq_len))
    while batch > 1 and limit is not None and most(walk(batch)) > limit:
        batch //= 2
    found = walk(batch)
    decline(found, limit)
    return batch, found


def _importance_bytes(method: CutMethod, axes: Axes) -> int:
    """Return what second moments take beside sums, where channels are ranked by them."""
    columns = [one.shape[1] for one in axes.model.linears() if one.expert is None]
    return 6 * 4 * max(columns, default=0) ** 2 if method.second_order() else 0


def _refit_bytes(axes: Axes, sizes: Shape) -> int:
    """Return the most that refitting the linears of one step takes.

    Of each its weight, the original's and the sums; of one of them the solution and what it is made
    from; of what they read the moments, and what is solved with.
    """
    most = 0
    for layer in axes.model.layers:
        for step in layer.steps:
            if step[0][0].expert is None:
                shapes = [_shape(axes, one, sizes) for one in step[0]]
                columns = shapes[0][1]
                rows = [shape[0] for shape in shapes]
                most = max(most, columns * (3 * sum(rows) + 3 * max(rows) + 4 * columns))
    return 4 * most


def _shape(axes: Axes, linear: Linear, sizes: Shape) -> tuple[int, int]:
    """Return a linear's [out, in] in the smaller model; of one stored with others, as it was."""
    place = axes.places[linear.part.tensor]
    stored = linear.shape[::-1] if linear.transposed else linear.shape
    if tuple(place.meta.shape) != stored:
        return linear.shape
    rows, columns = place.shape(sizes)
    return (columns, rows) if linear.transposed else (rows, columns)


def _loss_bytes(axes: Axes, tokens: int) -> int:
    """Return what a piece of the head takes, logits, and what their log-sum is made from.

    tokens  of a batch
    """
    vocab = int(axes.config.get("vocab_size") or 0)
    return 4 * (min(PIECE, vocab * axes.sizes.hidden) + 3 * min(PIECE, tokens * vocab))


def _head_bytes(axes: Axes) -> int:
    """Return what refitting the head takes: five pieces of it, and moments of what it reads."""
    hidden = axes.sizes.hidden
    piece = min(PIECE, int(axes.config.get("vocab_size") or 0) * hidden)
    return 4 * (5 * piece + 6 * hidden**2)


def _layer_bytes(places: list[Place], sizes: Shape) -> int:
    """Return the bytes of a layer's weights in float32."""
    return sum(4 * math.prod(place.shape(sizes)) for place in places)


def _times(
    recipe: Recipe, method: CutMethod, axes: Axes, sizes: Shape, rates: throughput.Rates
) -> dict[str, float]:
    """Forecast the seconds of each part: both models in float32, sums, solvers, what lies around.

    What lies between products is counted with the rates of `timing.py`, for each pass.
    """
    samples, seq_len = _tokens(recipe)
    tokens = samples * seq_len
    weights = sum(one.shape[0] * one.shape[1] for one in axes.model.linears())
    whole, cut = axes.params(axes.sizes), axes.params(sizes)
    passes, refitting, loads = 1.0, 0.0, 2.0 * whole
    work = {"factor": 0.0}
    if method.compensate:
        # Of the original one pass more; of the cut model each step's inputs, then its outputs.
        passes += 1 + 2.3 * cut / whole
        loads += 2.0 * (whole + cut)
        for layer in axes.model.layers:
            for step in layer.steps:
                if step[0][0].expert is None:
                    columns = step[0][0].shape[1]
                    rows = sum(one.shape[0] for one in step[0])
                    refitting += 2.0 * tokens * (3 * rows * columns + columns**2)
                    refitting += 2.0 * rows * columns**2
                    work["factor"] += columns**3 / 3 + 2.0 * rows * columns**2
    if method.searches():
        share = min(1.0, LOST_TOKENS / tokens)
        rounds = axes.sizes.layers - sizes.layers
        passes += share * rounds * len(axes.loose) / 2
    layers = axes.sizes.layers
    between = 4.0 * timing.STATE_PASSES * tokens * axes.sizes.hidden * layers
    found = {"start-up": rates.start} | timing.around(
        axes.nbytes(axes.sizes), axes.nbytes(sizes), rates
    )
    found["reading"] += rates.seconds({"states": loads, "memory": timing.READ_PASSES * loads})
    found["forward"] = passes * rates.seconds(
        {"product": 2.0 * tokens * weights, "memory": between, "states": between / 9}
    )
    if method.compensate:
        found["refitting"] = rates.seconds(work | {"product": refitting})
    return found

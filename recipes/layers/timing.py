"""How long a run takes, before it starts: what it does, counted, over what was measured here.

Parts follow each other: the libraries' imports; hashing, checking and reading the source; the
calibration text through the layers; second moments of what linears read; solving; and writing the
output, which is hashed, read back and checked. Products are counted exactly; elementwise work as
passes over what it reads and writes, each of which a temporary of torch makes once.
"""

from collections import Counter
from collections.abc import Collection, Mapping

from unicomp.compress.counted import Alike, alike, compared
from unicomp.compress.method import LayerMethod, Need, PruneMethod
from unicomp.kernels.dense import DenseSource
from unicomp.models import Layer, Model
from unicomp.recipes.layers.forecast import hidden_size
from unicomp.recipes.schema import Recipe
from unicomp.recipes.stage.throughput import Rates

# Reads and writes of a layer's states in float32: two norms of seven each, two residuals of three,
# rotations of queries and keys, and roundings of what linears read and answer.
STATE_PASSES = 36
# Of what lies between gate, up and down, in float32 terms: the activation and a product.
INNER_PASSES = 6
# Tensors are read from files, looked through for NaN, and made float32: reads and writes of them.
READ_PASSES = 3


def times(
    recipe: Recipe,
    method: LayerMethod,
    dense: DenseSource,
    model: Model,
    targets: Collection[str],
    *,
    half: bool,
    bytes_out: int,
    rates: Rates,
) -> dict[str, float]:
    """Forecast the seconds of each part of a run of one pass; without scores.

    half       linears multiply in bfloat16
    bytes_out  of the output's tensors
    """
    parts = {"start-up": rates.start} | around(_bytes(dense), bytes_out, rates)
    layers = alike(model.layers, targets)
    if method.wants() and recipe.calibration is not None:
        tokens = recipe.calibration.samples * recipe.calibration.length
        seq_len = recipe.calibration.length
        width, chosen = hidden_size(dense.config), _chosen(dense)
        work: dict[str, float] = {}
        for layer, count in layers:
            _add(work, _forward(layer, tokens, seq_len, width, chosen, half), count)
            if Need.CROSS in method.wants():
                again = _forward(layer, tokens, seq_len, width, chosen, half, statistics=False)
                _add(work, again, count)
                kept = {"states": 4.0 * tokens * sum(compared(layer, targets).values())}
                _add(work, kept, count)
        parts["forward"] = rates.seconds(work)
        parts["moments"] = rates.seconds(_moments(method, layers, targets, tokens, chosen))
    parts["solving"] = rates.seconds(_solving(method, layers, targets))
    order = ("start-up", "reading", "forward", "moments", "solving", "writing")
    return {name: parts[name] for name in order if name in parts}


def around(bytes_in: int, bytes_out: int, rates: Rates) -> dict[str, float]:
    """Return the seconds of reading a source and of writing an output, whatever lies between.

    The source is hashed once, looked through once and read once; the output is written, hashed when
    it is listed and when it is checked, and looked through.
    """
    read = 2.0 * bytes_in
    disk = 0.0 if rates.disk is None else bytes_out / rates.disk
    back = {"states": 2.0 * bytes_out, "hashing": 2.0 * bytes_out, "memory": 4.0 * bytes_out}
    return {
        "reading": rates.seconds(
            {"hashing": float(bytes_in), "states": read, "memory": READ_PASSES * read}
        ),
        "writing": rates.seconds(back) + disk,
    }


def words(parts: Mapping[str, float], rates: Rates) -> str:
    """Return what a forecast rests on, in words."""
    told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in parts.items())
    return f"{told}; {rates.words()}"


def _forward(
    layer: Layer,
    tokens: int,
    seq_len: int,
    width: int,
    chosen: int,
    half: bool,
    *,
    statistics: bool = True,
) -> dict[str, float]:
    """Return the work of one layer: no product of it is made twice, but for experts.

    chosen      experts that a token goes to
    statistics  it is run until each step's inputs are known; experts three times then
    """
    products = inner = 0.0
    for step in layer.steps:
        routed = step[0][0].expert is not None
        share = min(1.0, chosen / len(step)) * (3 if routed and statistics else 1)
        size = sum(one.shape[0] * one.shape[1] for shared in step for one in shared)
        products += 2.0 * tokens * size * share
    inner = tokens * sum(one[0][0].shape[1] for one in layer.steps[3::4])
    attention = 2.0 * tokens * seq_len * layer.steps[1][0][0].shape[1]
    elementwise = 4.0 * (STATE_PASSES * tokens * width + INNER_PASSES * inner)
    return {
        "half" if half else "product": products,
        "product" if half else "factor": attention,
        "memory": elementwise,
        "states": 4.0 * tokens * width,
    }


def _moments(
    method: LayerMethod, layers: Alike, targets: Collection[str], tokens: int, chosen: int
) -> dict[str, float]:
    """Return the work of what is gathered: half of a symmetric product, the whole of a cross one.

    Rates are of symmetric products by their half.
    """
    moments = memory = 0.0
    for layer, count in layers:
        for step in layer.steps:
            share = count * min(1.0, chosen / len(step))
            for shared in step:
                if not any(one.module in targets for one in shared):
                    continue
                columns = shared[0].shape[1]
                memory += 3 * 4.0 * tokens * columns * share
                if Need.HESSIAN in method.wants():
                    cross = Need.CROSS in method.wants() and shared[0].expert is None
                    moments += tokens * share * columns**2 * (3 if cross else 1)
                    memory += 4 * 4.0 * tokens * columns * share if cross else 0
    return {"moments": moments, "memory": memory}


def _solving(method: LayerMethod, layers: Alike, targets: Collection[str]) -> dict[str, float]:
    """Return the work of all solvers; what is stacked shares a factor."""
    alone = isinstance(method, PruneMethod) or not method.wants()
    shapes: Counter[tuple[int, int]] = Counter()
    for layer, count in layers:
        for step in layer.steps:
            for shared in step:
                rows = [one.shape[0] for one in shared if one.module in targets]
                for own in rows if alone or not rows else [sum(rows)]:
                    shapes[own, shared[0].shape[1]] += count
    work: dict[str, float] = {}
    for shape, count in shapes.items():
        one = method.solve_work(*shape)
        _add(work, {kind: count * amount for kind, amount in one.items()})
    return work


def _chosen(dense: DenseSource) -> int:
    return int(dense.config.get("num_experts_per_tok") or 1)


def _bytes(dense: DenseSource) -> int:
    return sum(int(meta.nbytes) for meta in dense.tensors.values())


def _add(total: dict[str, float], more: Mapping[str, float], count: int = 1) -> None:
    for kind, amount in more.items():
        total[kind] = total.get(kind, 0.0) + count * amount

"""What a walk over the layers takes, from shapes alone: bytes and operations for plans.

A plan reads headers only and must start in a moment, so nothing that runs a model is imported here.
"""

from collections.abc import Collection, Sequence

from unicomp.models import Layer, Linear

TOKENS = 8192  # of the calibration text that divergences are measured on, for shares of zeros
LOST_TOKENS = 8192  # of the calibration text that the loss without some layers is measured on
SCALE_BATCH = 4  # windows a step while a delta's scales are trained, as in the paper
PIECE = 1 << 24  # elements of the head, and of logits, in memory at once


Alike = Sequence[tuple[Layer, int]]
"""One layer of each kind, and how many there are."""


def alike(layers: Sequence[Layer], targets: Collection[str]) -> Alike:
    """Sort layers by kind, of which most models have few.

    Of one kind are layers with linears of the same shapes in the same places, experts or not,
    targets or not: what is counted here comes to the same for all of them.
    """
    kinds: dict[object, tuple[Layer, int]] = {}
    for layer in layers:
        kind = tuple(
            tuple((one.shape, one.expert is None, one.module in targets) for one in shared)
            for step in layer.steps
            for shared in (*step, ())
        )
        first, count = kinds.get(kind, (layer, 0))
        kinds[kind] = first, count + 1
    return list(kinds.values())


def moment_bytes(columns: int, cross: bool = False) -> int:
    """Return the bytes that one input's statistics take, with the cross statistic or without."""
    return 4 * columns * columns * (2 if cross else 1)


def compared(layer: Layer, targets: Collection[str]) -> dict[str, int]:
    """Return, for the cross statistic, inner name -> columns of each input that is compared.

    Experts are left out: a token may take another route in the uncompressed model.
    """
    return {
        step[0][0].inner: step[0][0].shape[1]
        for step in layer.steps
        if step[0][0].expert is None and any(one.module in targets for one in step[0])
    }


def sharing(layer: Layer, targets: Collection[str]) -> list[tuple[Linear, ...]]:
    """Return the linears of a layer that are pruned, those that get one share together."""
    found: dict[object, list[Linear]] = {}
    for linear in layer.linears():
        if linear.module in targets:
            leaf = linear.inner.rpartition(".")[2]
            key = linear.inner if linear.expert is None else (leaf, linear.shape[1])
            found.setdefault(key, []).append(linear)
    return [tuple(linears) for linears in found.values()]


def sharing_bytes(
    layers: Sequence[Layer], targets: Collection[str], tokens: int, width: int
) -> int:
    """Return what measuring shares of zeros takes on disk: streams of states, float32.

    tokens  of the calibration text; no more than `TOKENS` are used
    """
    count = 2 + 2 * sum(len(sharing(layer, targets)) for layer in layers)
    return 4 * count * min(tokens, TOKENS) * width


def sharing_operations(
    layers: Sequence[Layer], targets: Collection[str], tokens: int, head: int
) -> float:
    """Count multiply-adds of measuring shares, twice: of each layer for every stream, of the head.

    head  its weights
    """
    streams, total = 0, 0.0
    for layer in layers:
        streams += 2 * len(sharing(layer, targets))
        total += (3 + streams) * sum(one.shape[0] * one.shape[1] for one in layer.linears())
    return 2.0 * min(tokens, TOKENS) * (total + 2 * streams * head)

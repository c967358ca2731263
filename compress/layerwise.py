"""Compress one decoder layer: step by step, each linear for the inputs it will really see.

A step's statistics are gathered with every earlier step already compressed, in this layer and in
all before it. Linears that read one input share the Hessian's factorisation and, where they are
quantized alike, are solved as one stacked weight, since a quantizer's rows do not depend on each
other.

An expert that saw too few calibration tokens is rounded to nearest instead, or pruned by magnitude:
its second moments would be those of a handful of tokens, and compensating for them spoils all
others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unicomp.compress.calibrate import Decoder, Weights, read_weight
from unicomp.compress.counted import moment_bytes
from unicomp.compress.method import (
    LayerMethod,
    Pruned,
    PruneMethod,
    Pruning,
    QuantizeMethod,
    Solution,
    Stats,
)
from unicomp.compress.prune.magnitude import Magnitude
from unicomp.compress.quantize.rtn import Rtn
from unicomp.compress.sparsity import Target
from unicomp.compress.states import HiddenStates
from unicomp.errors import CheckpointError
from unicomp.kernels.packed import Scheme
from unicomp.models import Layer, Linear

FEWEST_TOKENS = 128

Pruner = Callable[[Linear], Pruning | None]


@dataclass(frozen=True, slots=True)
class Solved:
    """One compressed linear.

    tokens    calibration tokens that reached it; 0 for a method that needs none
    fallback  why another method than the one asked for did it, or None
    """

    linear: Linear
    solution: Solution | Pruned
    tokens: int
    fallback: str | None


def compress_layer(
    decoder: Decoder,
    layer: Layer,
    module: nn.Module,
    states: HiddenStates,
    original: Mapping[str, HiddenStates],
    method: LayerMethod,
    targets: Mapping[str, Scheme | Target],
    scale_dtype: torch.dtype,
    moments: int,
    pruning: Pruner | None = None,
) -> Iterator[Solved]:
    """Compress a loaded layer in place, yielding each linear as it is done.

    module    the layer with its weights; holds the compressed ones, as plain weights, afterwards
    states    its inputs from the compressed layers before it
    original  inner name of the first linear of a step -> what it reads in the uncompressed model,
              where the method asks for CROSS (`counted.compared`)
    targets   full module name -> how it is quantized or pruned; other linears stay as they are
    moments   most bytes that the statistics of one pass may take; experts go in several passes
    pruning   what says of a linear that is quantized what becomes zero in the same walk
    """
    for step in layer.steps:
        wanted = [shared for shared in step if any(one.module in targets for one in shared)]
        for some in _passes(wanted, moments):
            other = original.get(some[0][0].inner)
            skip = int(getattr(method, "exclude_sink", False))
            gathered = decoder.statistics(
                layer, module, some, states, other, needs=method.wants(), skip=skip
            )
            for shared, stats in zip(some, gathered, strict=True):
                for solved in _solve(module, shared, stats, method, targets, scale_dtype, pruning):
                    decoder.replace(module, solved.linear, solved.solution.weight)
                    yield solved


def solve_alone(
    weights: Weights,
    layer: Layer,
    method: LayerMethod,
    targets: Mapping[str, Scheme | Target],
    scale_dtype: torch.dtype,
) -> Iterator[Solved]:
    """Compress a layer's linears one tensor at a time, for methods that need no statistics."""
    for linear in layer.linears():
        if linear.module in targets:
            weight, target = read_weight(weights, linear), targets[linear.module]
            solution = _solution(method, weight, Stats(0), target, scale_dtype)
            yield Solved(linear, solution, 0, None)


def _passes(shared: Sequence[tuple[Linear, ...]], limit: int) -> Iterator[list[tuple[Linear, ...]]]:
    """Split inputs so that each pass's second moments fit the limit; one input always goes."""
    some: list[tuple[Linear, ...]] = []
    used = 0
    for linears in shared:
        size = moment_bytes(linears[0].shape[1])
        if some and used + size > limit:
            yield some
            some, used = [], 0
        some.append(linears)
        used += size
    if some:
        yield some


def _solve(
    module: nn.Module,
    linears: Sequence[Linear],
    stats: Stats,
    method: LayerMethod,
    targets: Mapping[str, Scheme | Target],
    scale_dtype: torch.dtype,
    pruning: Pruner | None,
) -> Iterator[Solved]:
    fallback = None
    if linears[0].expert is not None and stats.tokens < FEWEST_TOKENS:
        method, name = _plain(method)
        fallback = f"{name}: {stats.tokens} tokens, fewer than {FEWEST_TOKENS}"
        stats = Stats(stats.tokens, stats.hessian if stats.tokens else None)
    alike: dict[object, list[Linear]] = {}
    for linear in linears:
        if linear.module in targets:
            # A share of zeros is one of each linear, not of what happens to read the same input.
            alone = pruning is not None or isinstance(method, PruneMethod)
            key = linear.module if alone else targets[linear.module]
            alike.setdefault(key, []).append(linear)
    for members in alike.values():
        target = targets[members[0].module]
        stacked = torch.cat([_weight(module, linear) for linear in members])
        try:
            zeros = None if pruning is None else pruning(members[0])
            solution = _solution(method, stacked, stats, target, scale_dtype, zeros)
        except CheckpointError as error:
            names = ", ".join(f"`{linear.module}`" for linear in members)
            raise CheckpointError(f"{names}: {error.message}", hint=error.hint) from error
        start = 0
        for linear in members:
            stop = start + linear.shape[0]
            yield Solved(linear, solution.rows(start, stop), stats.tokens, fallback)
            start = stop


def _solution(
    method: LayerMethod,
    weight: Tensor,
    stats: Stats,
    target: Scheme | Target,
    scale_dtype: torch.dtype,
    zeros: Pruning | None = None,
) -> Solution | Pruned:
    if isinstance(method, QuantizeMethod) and isinstance(target, Scheme):
        return method.solve(weight, stats, target, scale_dtype=scale_dtype, pruning=zeros)
    pruner = method if zeros is None else zeros.method
    if isinstance(pruner, PruneMethod) and not isinstance(target, Scheme):
        return pruner.solve(weight, stats, target)
    raise TypeError(f"{type(method).__name__} cannot solve for {target}")


def _plain(method: LayerMethod) -> tuple[LayerMethod, str]:
    """Return the method that needs no statistics, with the options that all of its verb have."""
    if isinstance(method, QuantizeMethod):
        common = {name: getattr(method, name) for name in QuantizeMethod.model_fields}
        return Rtn.model_construct(**common), "rtn"
    return Magnitude(), "magnitude"


def _weight(module: nn.Module, linear: Linear) -> Tensor:
    weight = module.get_submodule(linear.inner).weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{linear.inner} has no weight")
    weight = weight.detach().float()
    return weight.T if linear.transposed else weight

"""Quantize one decoder layer: step by step, each linear for the inputs it will really see.

A step's statistics are gathered with every earlier step already quantized, in this layer and in
all before it. Linears that read one input are solved as one stacked weight, since a solver's rows
do not depend on each other; only the Hessian's factorisation does, and that they share.

An expert that saw too few calibration tokens is rounded to nearest instead: its second moments
would be those of a handful of tokens, and compensating for them spoils all others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unicomp.compress.calibrate import Decoder, Weights, read_weight
from unicomp.compress.method import QuantizeMethod, Solution, Stats
from unicomp.compress.quantize.rtn import Rtn
from unicomp.compress.states import HiddenStates
from unicomp.errors import CheckpointError
from unicomp.kernels.packed import Scheme
from unicomp.models import Layer, Linear

FEWEST_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Solved:
    """One quantized linear.

    tokens    calibration tokens that reached it; 0 for a method that needs none
    fallback  why another method than the one asked for did it, or None
    """

    linear: Linear
    solution: Solution
    tokens: int
    fallback: str | None


def quantize_layer(
    decoder: Decoder,
    layer: Layer,
    module: nn.Module,
    states: HiddenStates,
    original: Mapping[str, HiddenStates],
    method: QuantizeMethod,
    schemes: Mapping[str, Scheme],
    scale_dtype: torch.dtype,
    moments: int,
) -> Iterator[Solved]:
    """Quantize a loaded layer in place, yielding each linear as it is done.

    module    the layer with its weights; holds the dequantized ones afterwards
    states    its inputs from the quantized layers before it
    original  inner name of the first linear of a step -> what it reads in the uncompressed model,
              where the method asks for CROSS (`compared`)
    schemes   full module name -> how it is quantized; other linears stay as they are
    moments   most bytes that the statistics of one pass may take; experts go in several passes
    """
    for step in layer.steps:
        wanted = [shared for shared in step if any(one.module in schemes for one in shared)]
        for some in _passes(wanted, moments):
            other = original.get(some[0][0].inner)
            gathered = decoder.statistics(layer, module, some, states, other)
            for shared, stats in zip(some, gathered, strict=True):
                for solved in _solve(module, shared, stats, method, schemes, scale_dtype):
                    packed = solved.solution.packed
                    decoder.replace(module, solved.linear, packed.dequantize())
                    yield solved


def compared(layer: Layer, schemes: Mapping[str, Scheme]) -> dict[str, int]:
    """Return, for the cross statistic, inner name -> columns of each input that is compared.

    Experts are left out: a token may take another route in the uncompressed model.
    """
    return {
        step[0][0].inner: step[0][0].shape[1]
        for step in layer.steps
        if step[0][0].expert is None and any(one.module in schemes for one in step[0])
    }


def round_layer(
    weights: Weights,
    layer: Layer,
    method: QuantizeMethod,
    schemes: Mapping[str, Scheme],
    scale_dtype: torch.dtype,
) -> Iterator[Solved]:
    """Quantize a layer's linears one tensor at a time, for methods that need no statistics."""
    for linear in layer.linears():
        if linear.module in schemes:
            weight = read_weight(weights, linear)
            scheme = schemes[linear.module]
            solution = method.solve(weight, Stats(0), scheme, scale_dtype=scale_dtype)
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


def moment_bytes(columns: int, cross: bool = False) -> int:
    """Return the bytes that one input's statistics take, with the cross statistic or without."""
    return 4 * columns * columns * (2 if cross else 1)


def _solve(
    module: nn.Module,
    linears: Sequence[Linear],
    stats: Stats,
    method: QuantizeMethod,
    schemes: Mapping[str, Scheme],
    scale_dtype: torch.dtype,
) -> Iterator[Solved]:
    fallback = None
    if linears[0].expert is not None and stats.tokens < FEWEST_TOKENS:
        fallback = f"rtn: {stats.tokens} tokens, fewer than {FEWEST_TOKENS}"
        method = _nearest(method)
        stats = Stats(stats.tokens, stats.hessian if stats.tokens else None)
    by_scheme: dict[Scheme, list[Linear]] = {}
    for linear in linears:
        if linear.module in schemes:
            by_scheme.setdefault(schemes[linear.module], []).append(linear)
    for scheme, members in by_scheme.items():
        stacked = torch.cat([_weight(module, linear) for linear in members])
        try:
            solution = method.solve(stacked, stats, scheme, scale_dtype=scale_dtype)
        except CheckpointError as error:
            names = ", ".join(f"`{linear.module}`" for linear in members)
            raise CheckpointError(f"{names}: {error.message}", hint=error.hint) from error
        start = 0
        for linear in members:
            stop = start + linear.shape[0]
            yield Solved(linear, rows(solution, start, stop), stats.tokens, fallback)
            start = stop


def _nearest(method: QuantizeMethod) -> Rtn:
    """Return round-to-nearest with the options that every quantize method has."""
    common = {name: getattr(method, name) for name in QuantizeMethod.model_fields}
    return Rtn.model_construct(**common)


def _weight(module: nn.Module, linear: Linear) -> Tensor:
    weight = module.get_submodule(linear.inner).weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{linear.inner} has no weight")
    weight = weight.detach().float()
    return weight.T if linear.transposed else weight


def rows(solution: Solution, start: int, stop: int) -> Solution:
    """Return the part of a stacked solution that belongs to the output rows `start:stop`."""
    cut = slice(start, stop)
    predicted = None if solution.predicted is None else solution.predicted[cut]
    return Solution(
        packed=solution.packed.rows(start, stop),
        error=solution.error[cut],
        rounding=solution.rounding[cut],
        reference=solution.reference[cut],
        predicted=predicted,
        clipped=solution.clipped[cut],
        damp=solution.damp,
    )

"""Refit what stays of a layer so that it gives what the original gave: least squares.

A cut linear sees other inputs than the original: fewer channels, and all that was cut before it.
Its weight is moved by the solution of the damped normal equations for the error that is left,
E[e xᵀ] (E[x xᵀ] + damping)⁻¹, with x what it reads now and e what the original gave less what it
gives; so with no error it stays. The linears of a layer go in order of computation, each for the
inputs that the refitted ones before it give. The last one's error is that of the hidden states
after the layer, drift before it included; where layers are left out after it, of the states after
those. Then the head, unless the embedding shares its weight.

Paper: the same normal equations as SparseGPT's, arXiv:2301.00774, section 3.1, for whole columns.
Differs: the target is the original's output on its own inputs, as in GPTAQ, arXiv:2504.02692.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from unicomp.compress.axes import NORMED_AFTER
from unicomp.compress.calibrate import Decoder
from unicomp.compress.linalg import factorise
from unicomp.compress.readout import Readout
from unicomp.compress.states import HiddenStates
from unicomp.models import Layer, Linear


@dataclass(frozen=True, slots=True)
class Refitted:
    """A linear's new weight, float32 [out, in], and its squared error a token.

    before     of the plain cut
    after      of the new weight
    reference  what the errors are relative to: the output that is wanted, squared
    damp       fraction of the mean diagonal that was added
    """

    linear: Linear
    weight: Tensor
    before: float
    after: float
    reference: float
    damp: float
    tokens: int


class _Seen(Exception):  # noqa: N818 - it is no error: it ends a forward pass early
    """The input that was asked for has been seen."""


@dataclass(slots=True)
class _Sums:
    """Sums of one linear's error e and input x over tokens."""

    product: Tensor
    before: float = 0.0
    reference: float = 0.0

    def add(self, wanted: Tensor, given: Tensor, inputs: Tensor) -> None:
        error = wanted - given
        self.product += error.T @ inputs
        self.before += float(error.square().sum(dtype=torch.float64))
        self.reference += float(wanted.square().sum(dtype=torch.float64))


@torch.no_grad()
def refit_layer(
    decoder: Decoder,
    layer: Layer,
    module: nn.Module,
    states: HiddenStates,
    original: Mapping[str, HiddenStates],
    weights: Callable[[Linear], Tensor],
    target: HiddenStates,
    hidden: Tensor | None,
    damp: float,
) -> Iterator[Refitted]:
    """Refit the linears of a loaded cut layer in place, but for those of experts.

    states    its inputs from the refitted layers before it
    original  inner name of the first linear of a step -> what it read in the original
    weights   a linear -> the original's weight, its rows already cut, float32 [out, in]
    target    what the original's states are where this layer's outputs stand, all channels
    hidden    which of the channels stay; None: all
    """
    for index, step in enumerate(layer.steps):
        linears = step[0]
        if linears[0].expert is not None:
            continue
        last = index == 3 and decoder.model.type not in NORMED_AFTER
        own = {one: _weight(module, one) for one in linears}
        full = {} if last else {one: weights(one) for one in linears}
        sums = {one: _Sums(torch.zeros(one.shape)) for one in linears}
        second = torch.zeros(linears[0].shape[1], linears[0].shape[1])
        tokens = 0
        others = target if last else original[linears[0].inner]
        for (seen, out), other in zip(
            _inputs(decoder, layer, module, linears[0].inner, states, last),
            others.batches(decoder.batch),
            strict=True,
        ):
            tokens += len(seen)
            second += seen.T @ seen
            flat = other.flatten(0, 1)
            for one in linears:
                given = seen @ own[one].T
                if last:
                    wanted = flat if hidden is None else flat[:, hidden]
                    wanted = wanted - cast(Tensor, out) + given
                else:
                    wanted = flat @ full[one].T
                sums[one].add(wanted, given, seen)
        second /= tokens
        factor = factorise(second, damp=damp)
        for one in linears:
            product = sums[one].product / tokens
            moved = factor.solve(product.T).T
            gain = float((moved * product).sum(dtype=torch.float64))
            gain = 2 * gain - float((moved @ second * moved).sum(dtype=torch.float64))
            before = sums[one].before / tokens
            weight = own[one] + moved
            decoder.replace(module, one, weight)
            reference = sums[one].reference / tokens
            yield Refitted(
                one, weight, before, max(0.0, before - gain), reference, factor.damp, tokens
            )


def _inputs(
    decoder: Decoder,
    layer: Layer,
    module: nn.Module,
    inner: str,
    states: HiddenStates,
    whole: bool,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield what a linear reads, [tokens, in], batch by batch; `whole`: and the layer's output."""
    found: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].reshape(-1, args[0].shape[-1]).float())
        if not whole:
            raise _Seen

    handle = module.get_submodule(inner).register_forward_pre_hook(see)
    try:
        for batch in states.batches(decoder.batch):
            out = None
            with contextlib.suppress(_Seen):
                out = decoder.forward(module, layer, batch).float().flatten(0, 1)
            yield found.pop(), out
    finally:
        handle.remove()


def _weight(module: nn.Module, linear: Linear) -> Tensor:
    weight = cast(Tensor, module.get_submodule(linear.inner).weight).detach().float()
    return (weight.T if linear.transposed else weight).clone()


@torch.no_grad()
def refit_head(
    original: Readout,
    cut: Readout,
    before: HiddenStates,
    states: HiddenStates,
    batch: int,
    damp: float,
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the head's new rows in pieces, float32 [rows, hidden].

    before  the original's last hidden states
    states  those of the cut model
    """
    width, narrow = before.shape[2], states.shape[2]
    cross, second = torch.zeros(width, narrow), torch.zeros(narrow, narrow)
    tokens = 0
    for one, other in zip(before.batches(batch), states.batches(batch), strict=True):
        wanted, seen = original.norm(one).flatten(0, 1), cut.norm(other).flatten(0, 1)
        cross += wanted.T @ seen
        second += seen.T @ seen
        tokens += len(seen)
    second /= tokens
    cross /= tokens
    factor = factorise(second, damp=damp)
    # Pieces are cut by width, so those of both are of the wider one's size.
    for (rows, full), (_, own) in zip(original.pieces(width), cut.pieces(width), strict=True):
        product = full @ cross - own @ second
        yield rows, own + factor.solve(product.T.contiguous()).T

"""What a layer's channels, heads, experts and the layer itself are worth on the calibration text.

One pass over the original model, one layer at a time. Of an FFN channel and of a head what counts
is the size of what it adds to the hidden states: the root mean square of the channel times the
norm of the weights that read it, and of a head what the output projection makes of it. Of a hidden
channel the same, summed over all linears that read it. Of a layer its block influence, one minus
the cosine between its input and its output. Of an expert the router's mean probability. Of a head
also the mean attention that it pays to the first token.

With second moments, FFN channels and KV groups are ranked by what is lost when the others make up
for them by least squares, a part of them removed at a time.

Papers: Minitron, arXiv:2407.14679, section 2.2; ShortGPT, arXiv:2403.03853, section 3.1; attention
sinks, arXiv:2601.06787; Optimal Brain Surgeon's cost of a block, arXiv:2203.07259, equation 5.
Differs: magnitudes are weighed by the weights that read them, which Minitron leaves out.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from unicomp.compress.calibrate import Decoder
from unicomp.compress.linalg import factorise
from unicomp.compress.states import HiddenStates
from unicomp.models import Layer, Linear

PARTS = 8  # channels are removed in so many parts, with new costs after each


@dataclass(frozen=True, slots=True)
class LayerScores:
    """What one layer showed; greater is worth more. float64 vectors.

    influence  one minus the mean cosine between the layer's input and its output
    hidden     [hidden], summed over the linears that read the hidden states, mean 1
    heads      [heads], root mean square of what a head adds
    sink       [heads], mean attention paid to the first token by later ones; empty: not asked for
    ffn        one vector [ffn], or one for each expert
    experts    [experts], the router's mean probability; empty: none
    """

    influence: float
    hidden: Tensor
    heads: Tensor
    sink: Tensor
    ffn: tuple[Tensor, ...]
    experts: Tensor

    def to_json(self) -> dict[str, Any]:
        """Return plain values that read back equal."""
        return {
            "influence": self.influence,
            "hidden": self.hidden.tolist(),
            "heads": self.heads.tolist(),
            "sink": self.sink.tolist(),
            "ffn": [one.tolist() for one in self.ffn],
            "experts": self.experts.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Read what `to_json` made."""
        vectors = {k: _vector(data[k]) for k in ("hidden", "heads", "sink", "experts")}
        ffn = tuple(_vector(one) for one in data["ffn"])
        return cls(influence=data["influence"], ffn=ffn, **vectors)


def _vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@dataclass(slots=True)
class _Mean:
    """Sums over tokens."""

    total: Tensor | float = 0.0
    tokens: int = 0
    moments: Tensor | None = field(default=None)

    def add(self, values: Tensor) -> None:
        """Take up [tokens, ...]."""
        self.total = self.total + values.double().sum(0)
        self.tokens += len(values)

    def mean(self, shape: Sequence[int] = ()) -> Tensor:
        found = self.total if isinstance(self.total, Tensor) else torch.zeros(shape).double()
        return found / max(self.tokens, 1)


@torch.no_grad()
def observe(
    decoder: Decoder,
    layer: Layer,
    module: nn.Module,
    states: HiddenStates,
    after: HiddenStates,
    *,
    heads: int,
    kv_heads: int,
    sink: bool,
    second_order: bool,
    damp: float,
) -> tuple[LayerScores, int]:
    """Run a loaded layer over all windows; return what it showed and the crc32 of its outputs.

    states        the layer's inputs; `after` is written: its outputs
    sink          the attention paid to the first token is wanted: the model runs eagerly
    second_order  rank FFN channels and heads by second moments
    """
    first, second, third, last = layer.steps
    routed = third[0][0].expert is not None
    readers = {linears[0].inner: _Mean() for linears in (first[0], *(() if routed else third))}
    downs = {linears[0].inner: _Mean() for linears in last}
    out, sinks, chosen, cosine = _Mean(), _Mean(), _Mean(), _Mean()
    projection = _weight(module, second[0][0])

    def take(target: _Mean, moments: bool) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen = args[0].detach().float().reshape(-1, args[0].shape[-1])
            target.add(seen.square())
            if moments:
                product = seen.T @ seen
                target.moments = product if target.moments is None else target.moments + product

        return see

    def add_heads(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen = args[0].detach().float().reshape(-1, heads, projection.shape[1] // heads)
        per_head = projection.reshape(projection.shape[0], heads, -1)
        added = [(seen[:, head] @ per_head[:, head].T).square().sum(-1) for head in range(heads)]
        out.add(torch.stack(added, -1))

    def attend(_: nn.Module, __: tuple[Any, ...], result: Any) -> None:
        weights = cast(Tensor, result[1])
        sinks.add(weights[:, :, 1:, 0].mean(-1))

    def route(owner: nn.Module, args: tuple[Any, ...]) -> None:
        seen = args[0].detach().float().reshape(-1, args[0].shape[-1])
        logits = seen @ cast(Tensor, owner.weight).float().T
        chosen.add(logits.softmax(-1))
        router_input.add(seen.square())

    router_input = _Mean()
    with ExitStack() as stack:

        def hook(inner: str, function: Any) -> None:
            handle = module.get_submodule(inner).register_forward_pre_hook(function)
            stack.callback(handle.remove)

        for inner, mean in readers.items():
            hook(inner, take(mean, False))
        for inner, mean in downs.items():
            hook(inner, take(mean, second_order and not routed))
        heads_moments = _Mean()
        hook(second[0][0].inner, add_heads)
        if second_order:
            hook(second[0][0].inner, take(heads_moments, True))
        experts = decoder.model.architecture.experts
        if routed and experts is not None:
            hook(experts.router, route)
        if sink:
            owner = module.get_submodule(second[0][0].inner.rpartition(".")[0])
            stack.callback(owner.register_forward_hook(attend).remove)

        def outputs() -> Any:
            for batch in states.batches(decoder.batch):
                result = decoder.forward(module, layer, batch)
                both = batch.flatten(0, 1), result.flatten(0, 1).float()
                cosine.add(torch.nn.functional.cosine_similarity(*both, dim=-1))
                yield result

        crc = after.write(outputs())
    return (
        LayerScores(
            influence=1 - float(cosine.mean()),
            hidden=_hidden(module, layer, readers, router_input),
            heads=_head_scores(out, heads_moments, projection, heads, kv_heads, damp),
            sink=sinks.mean() if sink else torch.zeros(0).double(),
            ffn=tuple(_channels(module, linears[0], downs, damp) for linears in last),
            experts=chosen.mean() if routed else torch.zeros(0).double(),
        ),
        crc,
    )


def _weight(module: nn.Module, linear: Linear) -> Tensor:
    weight = cast(Tensor, module.get_submodule(linear.inner).weight).detach().float()
    return weight.T if linear.transposed else weight


def _hidden(module: nn.Module, layer: Layer, readers: dict[str, _Mean], router: _Mean) -> Tensor:
    """Return what hidden channels give to all that reads them, mean 1."""
    total: Tensor | float = 0.0
    for step in (layer.steps[0], layer.steps[2]):
        squares = torch.stack(
            [_weight(module, one).double().square().sum(0) for shared in step for one in shared]
        ).sum(0)
        seen = readers.get(step[0][0].inner, router).mean(squares.shape)
        value = (seen * squares).sqrt()
        total = total + value / value.mean().clamp_min(1e-30)
    return cast(Tensor, total) / 2


def _channels(module: nn.Module, linear: Linear, downs: dict[str, _Mean], damp: float) -> Tensor:
    seen, weight = downs[linear.inner], _weight(module, linear)
    if seen.moments is not None:
        return removal_order(seen.moments / max(seen.tokens, 1), weight, 1, damp)
    return (seen.mean((weight.shape[1],)) * weight.double().square().sum(0)).sqrt()


def _head_scores(
    out: _Mean, moments: _Mean, projection: Tensor, heads: int, kv_heads: int, damp: float
) -> Tensor:
    if moments.moments is None:
        return out.mean((heads,)).sqrt()
    width = projection.shape[1] // kv_heads
    order = removal_order(moments.moments / max(moments.tokens, 1), projection, width, damp)
    # inside a group, what single heads add
    own = out.mean((heads,)).sqrt().reshape(kv_heads, -1)
    own = own / own.sum(1, keepdim=True).clamp_min(1e-30)
    return ((1 + order)[:, None] * own).flatten()


def removal_order(hessian: Tensor, weight: Tensor, width: int, damp: float) -> Tensor:
    """Rank units of input columns by what is lost without them once the others make up for it.

    hessian  float32 [in, in], mean of x·xᵀ
    weight   float32 [out, in]
    width    columns of a unit
    returns  float64 [in / width], 0 for the unit that goes first

    A unit's cost is tr(W_u (H⁻¹_uu)⁻¹ W_uᵀ), with W refitted and H⁻¹ of those that are left.
    """
    count = hessian.shape[0] // width
    left = torch.arange(count)
    rank = torch.zeros(count, dtype=torch.float64)
    part = max(1, count // PARTS)
    while len(left):
        columns = (left[:, None] * width + torch.arange(width)).flatten()
        inverse = _inverse(hessian[columns][:, columns], damp)
        fitted = (weight @ hessian[:, columns]) @ inverse
        blocks = inverse.reshape(len(left), width, len(left), width)
        own = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        rows = fitted.reshape(weight.shape[0], len(left), width).permute(1, 2, 0)
        cost = (torch.linalg.solve(own, rows) * rows).sum((1, 2))
        order = torch.argsort(cost, stable=True)[:part]
        rank[left[order]] = torch.arange(count - len(left), count - len(left) + len(order)).double()
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[order] = False
        left = left[stays]
    return rank


def _inverse(hessian: Tensor, damp: float) -> Tensor:
    factor = factorise(hessian, damp=damp)
    return factor.solve(torch.eye(len(hessian), dtype=hessian.dtype))

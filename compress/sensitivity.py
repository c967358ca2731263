"""How many zeros each linear can bear: shares of one budget, by measured divergence.

Every linear is pruned to the common share, by magnitude times input norm; then one after the other
is given some zeros more, and some fewer, while all others stay pruned. What that does to the
model's answers (KL divergence to the uncompressed model's, on a few windows of the calibration
text) is what zeros cost there and then: what they cost a model that is otherwise whole says little
about one that is not. How the cost goes on is taken from the linear's curve of lost energy. The
shares are those at which one more zero costs the same everywhere, within a bound, since far from
the common share neither holds.

The model is walked through once, with a stream of states for each change: one layer is in memory.

Papers: equal slopes, Shoham and Gersho, IEEE Trans. ASSP 36(9), 1988; the curve, Wanda,
arXiv:2306.11695; that layers differ in what they bear, OWL, arXiv:2310.05175.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from unicomp.compress.calibrate import Decoder
from unicomp.compress.counted import TOKENS, sharing
from unicomp.compress.method import Need
from unicomp.compress.readout import Readout
from unicomp.compress.sparsity import Sparsity, keep
from unicomp.compress.states import HiddenStates
from unicomp.models import Layer, Linear

CHANGE = 0.1  # by how much a linear's share is changed to see what zeros cost
PART = 1 << 20  # logits in memory at once
ROUNDING = 1e-9  # so that a share times the columns is not below the count


@dataclass(slots=True)
class Unit:
    """Linears that get one share: a linear, or those of all experts of a layer that are alike.

    size    weights of a column, of all its linears together
    curve   float64 [columns + 1], energy lost when so many of each row are zero
    """

    linears: tuple[Linear, ...]
    size: int
    curve: Tensor

    @property
    def columns(self) -> int:
        """Columns of each of its linears."""
        return self.linears[0].shape[1]


@torch.no_grad()
def shares(
    decoder: Decoder,
    readout: Readout,
    ids: Tensor,
    targets: Collection[str],
    common: Sparsity,
    scratch: Path,
    step: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """Return module -> share of zeros, all together at most the common share of all weights.

    ids      int64 [windows, seq_len]; the first of them that make `TOKENS` tokens, at least one
    common   the share, and within what bound a linear's own may differ from it
    scratch  where the streams' files lie; they are gone afterwards
    step     called with each layer's index
    """
    ids = ids[: max(1, TOKENS // ids.shape[1])]
    first = list(decoder.embed(ids))
    shape = (*ids.shape, first[0].shape[-1])

    def stream(name: str) -> HiddenStates:
        return HiddenStates(scratch / f"bears-{name}.bin", shape)

    dense, plain = stream("dense"), stream("plain")
    for one in (dense, plain):
        one.write(iter(first))
    units: list[Unit] = []
    changed: list[HiddenStates] = []  # of each unit two: with more zeros and with fewer
    for layer in decoder.model.layers:
        step(layer.index)
        module = decoder.load(layer)
        norms = _norms(decoder, layer, module, dense, targets)
        walk = partial(_walk, decoder, layer, module)
        walk(dense, dense)
        own = [_Pruner(decoder, module, linears, norms) for linears in sharing(layer, targets)]
        for pruner in own:
            pruner.prune(common.share)
        for one in changed:
            walk(one, one)
        for pruner in own:
            for share in _around(common.share):
                pruner.prune(share)
                changed.append(stream(f"{len(changed)}"))
                walk(plain, changed[-1])
            pruner.prune(common.share)
            units.append(pruner.unit())
        walk(plain, plain)
        decoder.release(layer)
    found = [divergence(readout, dense, one) for one in changed]
    costs = [more - less for more, less in zip(found[::2], found[1::2], strict=True)]
    for one in (dense, plain, *changed):
        one.path.unlink()
    chosen = share_out(units, costs, common)
    return {
        linear.module: count / unit.columns + ROUNDING
        for unit, count in zip(units, chosen, strict=True)
        for linear in unit.linears
    }


def share_out(units: Sequence[Unit], costs: Sequence[float], common: Sparsity) -> list[int]:
    """Return how many of each row's columns become zero: where one more costs the same everywhere.

    costs  what the change of a unit's share from `CHANGE` below to as much above cost; the unit's
           curve is scaled to it
    """
    within = common.within or 0.0
    whole = [int(common.share * unit.columns) for unit in units]
    low = [math.ceil((common.share - within) * one.columns - ROUNDING) for one in units]
    low = [min(max(least, 0), most) for least, most in zip(low, whole, strict=True)]
    high = [math.floor((common.share + within) * one.columns + ROUNDING) for one in units]
    high = [min(most, one.columns) for most, one in zip(high, units, strict=True)]
    prices = [
        _prices(unit, max(cost, 0.0), common.share) for unit, cost in zip(units, costs, strict=True)
    ]
    budget = int(common.share * sum(unit.size * unit.columns for unit in units))

    def at(price: float) -> list[int]:
        return [
            min(max(int((own <= price).sum()), least), most)
            for own, least, most in zip(prices, low, high, strict=True)
        ]

    def zeros(counts: Sequence[int]) -> int:
        return sum(unit.size * count for unit, count in zip(units, counts, strict=True))

    levels = torch.cat(prices).unique().tolist()
    found, start, stop = list(low), 0, len(levels)
    while start < stop:
        middle = (start + stop) // 2
        tried = at(levels[middle])
        if zeros(tried) <= budget:
            found, start = tried, middle + 1
        else:
            stop = middle
    left = budget - zeros(found)
    while True:  # what is left buys single columns, the cheapest first
        offers = [
            (float(prices[i][count]), i)
            for i, count in enumerate(found)
            if count < high[i] and units[i].size <= left
        ]
        if not offers:
            return found
        _, best = min(offers)
        found[best] += 1
        left -= units[best].size


def _prices(unit: Unit, cost: float, share: float) -> Tensor:
    """Return what each next zero column costs a weight, ascending: float64 [columns]."""
    less, more = (int(one * unit.columns) for one in reversed(_around(share)))
    lost = float(unit.curve[more] - unit.curve[less])
    scale = cost / lost if lost > 0 else 0.0
    return unit.curve.diff().clamp_min(0) * scale / unit.size


def _around(share: float) -> tuple[float, float]:
    """Return a share with more zeros, and one with fewer."""
    change = min(CHANGE, share / 2, (1 - share) / 2)
    return share + change, share - change


class _Pruner:
    """Makes zeros in some linears of a loaded layer, by magnitude times input norm."""

    def __init__(
        self,
        decoder: Decoder,
        module: nn.Module,
        linears: tuple[Linear, ...],
        norms: Mapping[str, Tensor],
    ) -> None:
        self._decoder, self._module, self._linears = decoder, module, linears
        self._norms = [norms[one.module] for one in linears]
        self._weights = [decoder.weight(one) for one in linears]

    def prune(self, share: float) -> None:
        """Make so much of each row zero; what was zero before may be whole again."""
        for one, weight, norm in zip(self._linears, self._weights, self._norms, strict=True):
            stays = keep(weight.abs() * norm, Sparsity(share))
            self._decoder.replace(self._module, one, torch.where(stays, weight, 0.0))

    def unit(self) -> Unit:
        """Return the linears' curve."""
        columns = self._linears[0].shape[1]
        energy = torch.zeros(columns, dtype=torch.float64)
        for weight, norm in zip(self._weights, self._norms, strict=True):
            energy += (weight.abs() * norm).square().sort(dim=1).values.double().sum(0)
        curve = torch.cat([energy.new_zeros(1), energy.cumsum(0)])
        return Unit(self._linears, sum(one.shape[0] for one in self._linears), curve)


def _walk(
    decoder: Decoder, layer: Layer, module: nn.Module, before: HiddenStates, after: HiddenStates
) -> None:
    """Write what a layer makes of some states; both may be one, a batch is read before."""
    given = before.batches(decoder.batch)
    after.write(decoder.forward(module, layer, batch).float() for batch in given)


def _norms(
    decoder: Decoder,
    layer: Layer,
    module: nn.Module,
    states: HiddenStates,
    targets: Collection[str],
) -> Mapping[str, Tensor]:
    """Return module -> root mean square of what it reads in the uncompressed model."""
    found = {}
    for some in layer.steps:
        wanted = [shared for shared in some if any(one.module in targets for one in shared)]
        if wanted:
            gathered = decoder.statistics(
                layer, module, wanted, states, needs=frozenset({Need.NORM})
            )
            for shared, stats in zip(wanted, gathered, strict=True):
                if stats.norm is not None:
                    found.update({one.module: stats.norm for one in shared})
    return found


@torch.no_grad()
def divergence(readout: Readout, base: HiddenStates, other: HiddenStates) -> float:
    """Return the mean KL divergence of next-token distributions, in nats a token.

    base, other  last hidden states of the same tokens; the divergence is of `other` from `base`
    """
    total, tokens = 0.0, 0
    for ours, theirs in zip(base.batches(1), other.batches(1), strict=True):
        p, q = (readout.norm(one)[0] for one in (ours, theirs))
        # over the vocabulary so far: log-sums of both, and the mean under p of their difference
        own, its = (torch.full((len(p),), -torch.inf, dtype=torch.float64) for _ in range(2))
        mean = torch.zeros(len(p), dtype=torch.float64)
        for _, head in readout.pieces(p.shape[1]):
            for part in torch.arange(len(p)).split(max(1, PART // len(head))):
                mine, others = (readout.logits(one[part], head).double() for one in (p, q))
                here = mine.logsumexp(-1)
                after = torch.logaddexp(own[part], here)
                gained = ((mine - here[:, None]).exp() * (mine - others)).sum(-1)
                mean[part] = mean[part] * (own[part] - after).exp() + gained * (here - after).exp()
                own[part] = after
                its[part] = torch.logaddexp(its[part], others.logsumexp(-1))
        total += float((mean - own + its).sum())
        tokens += len(p)
    return total / tokens

"""The loss of a model without some of its layers, measured for many sets of layers at once.

The model is walked through once: each layer is loaded and computes for every set that keeps it;
sets that so far left out the same layers share their states.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unicomp.compress.calibrate import Decoder
from unicomp.compress.counted import LOST_TOKENS
from unicomp.compress.readout import Readout


@torch.no_grad()
def losses(
    decoder: Decoder,
    readout: Readout,
    ids: Tensor,
    sets: Sequence[tuple[int, ...]],
    step: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Return the mean loss in nats a token without each set of layers.

    ids   int64 [windows, seq_len]; the first of them that make `LOST_TOKENS`, at least one
    sets  layers to leave out, ascending
    step  called with each layer's index
    """
    ids = ids[: max(1, LOST_TOKENS // ids.shape[1])]
    states: dict[tuple[int, ...], list[Tensor]] = {(): list(decoder.embed(ids))}
    for layer in decoder.model.layers:
        step(layer.index)
        module = decoder.load(layer)
        following: dict[tuple[int, ...], list[Tensor]] = {}
        after: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for some in sets:
            gone = tuple(one for one in some if one <= layer.index)
            after.setdefault(tuple(one for one in gone if one < layer.index), set()).add(gone)
        for before, others in after.items():
            held = states.pop(before)  # so that no more than one is there twice
            for gone in others:
                following[gone] = held
            if before in others:
                following[before] = [
                    decoder.forward(module, layer, batch).float() for batch in held
                ]
        decoder.release(layer)
        states = following
    batches = ids.split(decoder.batch)
    return [
        float(
            torch.cat(
                [
                    readout.loss(batch, some)
                    for batch, some in zip(states[gone], batches, strict=True)
                ]
            )
            .double()
            .mean()
        )
        for gone in sets
    ]

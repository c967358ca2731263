"""How much faster one model runs here than another: both loaded, a round of each in turn.

What else goes on on the machine then falls on both. Prefill is the time to the first token of a
prompt of random ids, decode the rate of the tokens after it; a gain is the median, over rounds, of
one rate over the other of the same round, with the least and the greatest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicomp.later import torch

PROMPT_TOKENS = 256
NEW_TOKENS = 32
ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens per second in every round, of the baseline and of the model."""

    baseline: tuple[float, ...]
    model: tuple[float, ...]

    @property
    def gain(self) -> tuple[float, float, float]:
        """The median of the rounds' ratios, the least and the greatest."""
        ratios = [ours / theirs for ours, theirs in zip(self.model, self.baseline, strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)

    def to_json(self) -> dict[str, Any]:
        """Return medians, gain and rounds as plain values."""
        middle, least, most = self.gain
        return {
            "baseline": statistics.median(self.baseline),
            "model": statistics.median(self.model),
            "gain": middle,
            "gain_range": [least, most],
            "rounds": {"baseline": list(self.baseline), "model": list(self.model)},
        }


@dataclass(frozen=True, slots=True)
class Gain:
    """What was measured, and on prompts of how many tokens, with how many new ones."""

    prefill: Rates
    decode: Rates
    prompt_tokens: int
    new_tokens: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "prefill_tokens_per_s": self.prefill.to_json(),
            "decode_tokens_per_s": self.decode.to_json(),
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
        }


def beside(
    model: Path,
    baseline: Path,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] | None = None,
) -> Gain:
    """Measure two checkpoints in turn; both are in memory.

    A model with less context has a shorter prompt.
    """
    # A plan counts what this does, and imports nothing that runs.
    from unicomp.evaluate.cost.speed import generate
    from unicomp.kernels.packed_model import load

    networks: list[Any] = [load(str(baseline)), load(str(model))]
    for network in networks:
        context = getattr(network.config, "max_position_embeddings", None)
        if context is not None:
            prompt_tokens = min(prompt_tokens, max(1, context - new_tokens))
    vocab = min(network.config.vocab_size for network in networks)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab, (1, prompt_tokens), generator=draw)
    for network in networks:
        generate(network, ids, new_tokens)  # what is set up once
    found: list[list[Sequence[float]]] = [[], []]
    for done in range(rounds):
        for index, network in enumerate(networks):
            found[index].append(generate(network, ids, new_tokens))
        if progress is not None:
            progress(done + 1, rounds)

    def rates(measure: Callable[[Sequence[float]], float]) -> Rates:
        theirs, ours = (tuple(measure(times) for times in rounds_of) for rounds_of in found)
        return Rates(theirs, ours)

    return Gain(
        prefill=rates(lambda times: prompt_tokens / (times[1] - times[0])),
        decode=rates(lambda times: (new_tokens - 1) / (times[-1] - times[1])),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )

"""Windows that the student writes itself: the beginning is given, token after token is drawn.

Windows are written together, one token each at a time, with a cache of keys and values. Prompts may
differ in length: where one is still given, its next token is taken instead of drawn, so nothing is
padded or masked. What is drawn in a window depends on the seed, the step and the window's number
alone, by a generator of its own; so an interrupted training draws the same again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils import parametrize
from transformers import PreTrainedModel


def chosen(step: int, batch: int, *, share: float, seed: int) -> Tensor:
    """Return which windows of a step's batch the student writes, bool [batch].

    Over all steps they are that share, within one window.
    """
    count = int((step + 1) * share * batch) - int(step * share * batch)
    places = torch.randperm(batch, generator=_generator("choice", seed, step))[:count]
    found = torch.zeros(batch, dtype=torch.bool)
    found[places] = True
    return found


def prompts(counted: Tensor, *, share: float, answers: bool) -> Tensor:
    """Return how many tokens of each window are given, int64 [windows], at least 1.

    counted  bool [windows, tokens - 1]: which predictions count in the text
    answers  all before the first that counts is given; else a share of what is no padding
    """
    tokens = counted.shape[1] + 1
    if answers:
        return (counted.int().argmax(1) + 1).clamp(1, tokens - 1)
    filled = tokens - counted.flip(1).int().argmax(1)
    return (filled * share).long().clamp(1, tokens - 1)


@torch.no_grad()
def write(
    model: PreTrainedModel, ids: Tensor, given: Tensor, *, rows: Sequence[int], step: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Let a model go on from the beginning of windows, to their end or a token that ends a text.

    ids      int64 [windows, tokens]
    given    int64 [windows], how many of each stay as they are
    rows     the windows' numbers
    returns  int64 [windows, tokens], padded behind the end with its last token; and which
             predictions are of tokens that the model wrote, bool [windows, tokens - 1]
    """
    tokens = ids.shape[1]
    ids, written = ids.clone(), torch.zeros(len(ids), tokens - 1, dtype=torch.bool)
    draws = torch.stack(
        [
            torch.rand(tokens, generator=_generator("draw", seed, step, row), dtype=torch.float64)
            for row in rows
        ]
    )
    last = torch.tensor(_ends(model), dtype=torch.int64)
    going = torch.ones(len(ids), dtype=torch.bool)
    fed, cache = ids[:, : int(given.min())], None
    with _writing(model):
        for place in range(fed.shape[1], tokens):
            found = model(fed, past_key_values=cache, use_cache=True)
            cache = found.past_key_values
            drawn = draw(found.logits[:, -1], draws[:, place])
            own = (place >= given) & going
            written[:, place - 1] = own
            drawn = torch.where(going, drawn, ids[:, place - 1])
            ids[:, place] = torch.where(place >= given, drawn, ids[:, place])
            going &= ~(own & torch.isin(drawn, last))
            if not going.any():
                ids[:, place + 1 :] = ids[:, place : place + 1]
                break
            fed = ids[:, place : place + 1]
    return ids, written


def draw(logits: Tensor, chance: Tensor) -> Tensor:
    """Return the token at which the cumulative probability passes a chance, int64 [windows].

    logits  floating [windows, vocab]
    chance  float64 [windows], 0 to 1, 1 excluded
    """
    reached = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    place = torch.searchsorted(reached, (chance * reached[:, -1])[:, None], right=True)
    return place[:, 0].clamp_max(logits.shape[-1] - 1)


def _ends(model: PreTrainedModel) -> list[int]:
    """Return the tokens that end a text."""
    found: set[int] = set()
    for said in (model.generation_config, model.config.get_text_config()):
        end = getattr(said, "eos_token_id", None)
        if end is not None:
            found.update(end if isinstance(end, list | tuple) else [end])
    return sorted(found)


@contextmanager
def _writing(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model in evaluation mode, and round its packed weights once for all tokens."""
    training = model.training
    model.eval()
    try:
        with parametrize.cached():
            yield
    finally:
        model.train(training)


def _generator(*words: object) -> torch.Generator:
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))

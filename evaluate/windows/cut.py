"""A text read, tokenized and cut into windows, the same for a model and its baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unicomp import text
from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 2048  # tokens of a window, unless asked for more


@dataclass(frozen=True, slots=True)
class Ask:
    """What to predict, and how."""

    text: str
    field: str
    seq_len: int | None
    limit: int | None
    seed: int
    bos: bool | None


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of a text, what the predicted part of each weighs, and what to say of them.

    ids         int64 [windows, seq_len]
    utf8_bytes  [windows], of the predicted tokens
    exact       whether the tokenizer could say the bytes of each token
    """

    ids: Tensor
    utf8_bytes: Tensor
    exact: bool
    vocab: int
    detail: Mapping[str, Any]


def cut(folder: Path, baseline: Path | None, ask: Ask) -> Windows:
    """Read, tokenize and cut the text, and check that the baseline would do the same."""
    config = Checkpoint.open(folder).config
    vocab = vocab_of(config, folder)
    tokenizer = text.tokenizer(folder)
    found = text.read(ask.text, field=ask.field, tokenizer=tokenizer, purpose="score")
    ids = text.encode(tokenizer, found, vocab=vocab)
    bos = _bos(tokenizer, ask.bos)
    contexts = [context(config)]
    if baseline is not None:
        theirs = Checkpoint.open(baseline).config
        contexts.append(context(theirs))
        other = text.tokenizer(baseline)
        same = torch.equal(ids, text.encode(other, found, vocab=vocab_of(theirs, baseline)))
        if not same or _bos(other, ask.bos) != bos:
            raise UnsupportedError(
                f"model and baseline cut `{found.source}` into different tokens",
                hint="give the model that this one was made from as `--baseline`",
            )
    seq_len = _seq_len(ask.seq_len, contexts)
    fresh = seq_len if bos is None else seq_len - 1
    whole = ids.numel() // max(1, fresh)
    samples = None if ask.limit is None or ask.limit >= whole else ask.limit
    name = f"text `{found.source}`"

    def part(values: Tensor, first: int | None) -> Tensor:
        return text.windows(
            values, seq_len=seq_len, samples=samples, seed=ask.seed, bos=first, source=name
        )

    windows = part(ids, bos)
    weights = text.token_bytes(tokenizer, found)
    if weights is None:
        total = sum(len(document.encode()) for document in found.documents)
        utf8_bytes = torch.full((len(windows),), (seq_len - 1) * total / ids.numel())
    else:
        utf8_bytes = part(weights, None if bos is None else 0)[:, 1:].sum(1)
    detail = {
        "text": found.source,
        "sha256": found.sha256,
        "seq_len": seq_len,
        "windows": len(windows),
        "tokens": windows[:, 1:].numel(),
        "bos": bos is not None,
    }
    return Windows(windows, utf8_bytes, weights is not None, vocab, detail)


def _seq_len(asked: int | None, contexts: Sequence[int | None]) -> int:
    most = min((length for length in contexts if length is not None), default=None)
    if asked is None:
        return LONGEST if most is None else min(LONGEST, most)
    if most is not None and asked > most:
        raise UnicompError(
            f"seq_len {asked} is longer than the model's context of {most} tokens",
            hint=f"use a seq_len of at most {most}",
        )
    return asked


def _bos(tokenizer: Any, wanted: bool | None) -> int | None:
    if wanted is None:
        return text.bos_token(tokenizer)
    if not wanted:
        return None
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        raise UnicompError("the tokenizer has no BOS token", hint="use `--no-bos`")
    return bos


def _config(config: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these fields that is a number, looking into a text model's part too."""
    for part in (config, config.get("text_config") or {}):
        for name in names:
            if isinstance(part.get(name), int):
                return int(part[name])
    return None


def context(config: Mapping[str, Any]) -> int | None:
    """Return the tokens that a model reads at once, by its config; None where it does not say."""
    return _config(config, "max_position_embeddings", "n_positions")


def vocab_of(config: Mapping[str, Any], folder: Path) -> int:
    """Return the number of ids that a model scores.

    Raises UnsupportedError where its config does not say, naming the folder.
    """
    vocab = _config(config, "vocab_size")
    if vocab is None:
        raise UnsupportedError(
            f"`{folder / 'config.json'}` has no `vocab_size`",
            hint="only causal language models can be scored on text",
        )
    return vocab

"""Model, baseline and axes in, one report out.

Everything that can be wrong with the words, the text and the two tokenizers is found before any
weight is read. Model and baseline are then held in float32, with dequantized weights, and read the
same windows side by side; see `stream.py` for what that takes. Asked for, the model's weights are
left packed: beside its own dequantized weights as the baseline, that is what kernels lose.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from unicomp import hub, machine, suggest, text
from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.evaluate import accuracy, efficiency, fidelity, stream
from unicomp.evaluate.scores import SCHEMA, Report, Score, Subject
from unicomp.kernels import packed_model
from unicomp.kernels.blocked import Compute
from unicomp.kernels.linear import check_compute
from unicomp.kernels.load import load

AXES = ("accuracy", "fidelity", "efficiency")
PLANNED = ("calibration", "safety")
LONGEST = 2048  # tokens of a window, unless asked for more

Progress = Callable[[int, int], None]


def score(
    model: str | Path,
    baseline: str | Path | None = None,
    *,
    axes: Sequence[str] = AXES,
    text: str | None = None,
    field: str = "text",
    seq_len: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    bos: bool | None = None,
    compute: Compute | None = None,
    progress: Progress | None = None,
) -> Report:
    """Score a model, and say how far it is from a baseline.

    model, baseline  a folder, a Hub id or `builtin:NAME`
    axes             of `AXES`
    text             what to predict, as the contract's TEXT; None: `builtin:tinyworld` where the
                     model is a builtin
    field            of a record of that text
    seq_len          tokens of a window; None: the model's context, at most 2048
    limit            at most this many windows, drawn by `seed`; None: all
    bos              a BOS token before each window; None: where the tokenizer puts one by default
    compute          `int8` or `exact`: leave the model's weights packed, as `unicomp.load` does;
                     None: dequantize them. The baseline is always dequantized
    progress         called with the windows done and the windows in all

    Raises UnicompError for anything the user can mend, before any weight is read where it can.
    """
    check_axes(axes)
    if compute is not None:
        check_compute(compute)
    if limit is not None and limit < 1:
        raise UnicompError(f"limit {limit} leaves nothing to score", hint="use 1 or more windows")
    source = hub.resolve(str(model))
    base = None if baseline is None else hub.resolve(str(baseline))
    found: list[Score] = []
    compare = base is not None and "fidelity" in axes
    if "accuracy" in axes or compare:
        if text is None:
            if not source.id.startswith(hub.BUILTIN):
                raise UnicompError(
                    f"no text to score `{source.id}` on",
                    hint="give one with `--text`, or `--axes efficiency`",
                )
            text = "builtin:tinyworld"
        folder = None if base is None else base.folder
        ask = _Ask(text, field, seq_len, limit, seed, bos, compute)
        found += _predictions(source.folder, folder, axes, ask, progress)
    if "fidelity" in axes and not compare:
        found += fidelity.skipped("no baseline was given")
    if "efficiency" in axes:
        found += efficiency.scores(source.folder, None if base is None else base.folder)
    return Report(
        schema=SCHEMA,
        model=Subject(id=source.id, revision=source.revision),
        baseline=None if base is None else Subject(id=base.id, revision=base.revision),
        machine=machine.describe(),
        versions=machine.versions(),
        seeds={"windows": seed},
        scores=found,
    )


def check_axes(axes: Sequence[str]) -> None:
    """Refuse an axis that there is not, or not yet, and an empty list."""
    for axis in axes:
        if axis in PLANNED:
            raise UnsupportedError(
                f"axis `{axis}` is not available in this release",
                hint=f"the axes are {suggest.listed(AXES)}",
            )
        if axis not in AXES:
            raise UnicompError(f"unknown axis: `{axis}`", hint=suggest.hint(axis, AXES))
    if not axes:
        raise UnicompError("no axes to score", hint=f"use some of {suggest.listed(AXES)}")


@dataclass(frozen=True, slots=True)
class _Ask:
    """What to predict, as the caller of `score` said it."""

    text: str
    field: str
    seq_len: int | None
    limit: int | None
    seed: int
    bos: bool | None
    compute: Compute | None


@dataclass(frozen=True, slots=True)
class _Windows:
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


def _predictions(
    folder: Path,
    baseline: Path | None,
    axes: Sequence[str],
    ask: _Ask,
    progress: Progress | None,
) -> list[Score]:
    windows = _cut(folder, baseline, ask)
    model, how = _load(folder, ask.compute)
    base = None if baseline is None else load(baseline, dtype=torch.float32).eval()
    detail = {**windows.detail, **how}
    sums = stream.sums(model, base, windows.ids, vocab=windows.vocab, progress=progress)
    found: list[Score] = []
    if "accuracy" in axes:
        found += accuracy.scores(sums, windows.utf8_bytes, detail, exact_bytes=windows.exact)
    if "fidelity" in axes and base is not None:
        found += fidelity.scores(sums, detail)
    return found


def _load(folder: Path, compute: Compute | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Return the model to score, and what to say of how it computes."""
    if compute is None:
        return load(folder, dtype=torch.float32).eval(), {}
    model = packed_model.load(folder, compute=compute, dtype=torch.float32)
    how = packed_model.loaded(model).to_json()
    return model, {key: how[key] for key in ("compute", "backend", "isa", "packed")}


def _cut(folder: Path, baseline: Path | None, ask: _Ask) -> _Windows:
    """Read, tokenize and cut the text, and check that the baseline would do the same."""
    config = Checkpoint.open(folder).config
    vocab = _vocab(config, folder)
    tokenizer = text.tokenizer(folder)
    found = text.read(ask.text, field=ask.field, tokenizer=tokenizer, purpose="score")
    ids = text.encode(tokenizer, found, vocab=vocab)
    bos = _bos(tokenizer, ask.bos)
    contexts = [_context(config)]
    if baseline is not None:
        theirs = Checkpoint.open(baseline).config
        contexts.append(_context(theirs))
        other = text.tokenizer(baseline)
        same = torch.equal(ids, text.encode(other, found, vocab=_vocab(theirs, baseline)))
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

    def cut(values: Tensor, first: int | None) -> Tensor:
        return text.windows(
            values, seq_len=seq_len, samples=samples, seed=ask.seed, bos=first, source=name
        )

    windows = cut(ids, bos)
    weights = text.token_bytes(tokenizer, found)
    if weights is None:
        total = sum(len(document.encode()) for document in found.documents)
        utf8_bytes = torch.full((len(windows),), (seq_len - 1) * total / ids.numel())
    else:
        utf8_bytes = cut(weights, None if bos is None else 0)[:, 1:].sum(1)
    detail = {
        "text": found.source,
        "sha256": found.sha256,
        "seq_len": seq_len,
        "windows": len(windows),
        "tokens": windows[:, 1:].numel(),
        "bos": bos is not None,
    }
    return _Windows(windows, utf8_bytes, weights is not None, vocab, detail)


def _seq_len(asked: int | None, contexts: Sequence[int | None]) -> int:
    context = min((length for length in contexts if length is not None), default=None)
    if asked is None:
        return LONGEST if context is None else min(LONGEST, context)
    if context is not None and asked > context:
        raise UnicompError(
            f"seq_len {asked} is longer than the model's context of {context} tokens",
            hint=f"use a seq_len of at most {context}",
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


def _context(config: Mapping[str, Any]) -> int | None:
    return _config(config, "max_position_embeddings", "n_positions")


def _vocab(config: Mapping[str, Any], folder: Path) -> int:
    vocab = _config(config, "vocab_size")
    if vocab is None:
        raise UnsupportedError(
            f"`{folder / 'config.json'}` has no `vocab_size`",
            hint="only causal language models can be scored on text",
        )
    return vocab

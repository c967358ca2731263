"""One pass of a model, and of the base beside it, over windows of text.

Both models see one batch of windows at a time, and what is kept of it is a handful of sums per
window: no logits are ever stored. Beside the two models, the memory in use is at most

    2 x max(LOGITS, seq_len x vocab x 4 bytes)   float32 logits of a batch, of both models
    6 x max(32 MiB, vocab x 8 bytes)             float64 temporaries, `metrics.CHUNK`

and the models' own activations for at most `TOKENS` tokens, or one window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from unicomp.errors import UnsupportedError
from unicomp.later import torch
from unicomp.metrics import WindowSums, join, window_sums

if TYPE_CHECKING:
    from torch import Tensor

LOGITS = 1 << 26  # bytes of the logits of a batch, unless one window has more
TOKENS = 4096


def sums(
    model: Any,
    base: Any | None,
    windows: Tensor,
    *,
    vocab: int,
    watch: Callable[[Tensor, Tensor, Tensor | None], None] | None = None,
    states: Callable[[Sequence[Tensor], Sequence[Tensor]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> WindowSums:
    """Predict every token of each window but its first, and sum what the metrics say.

    model, base  transformers causal models in evaluation mode, which may be on any device
    windows      int64 [windows, seq_len]
    vocab        ids that a model scores, for the size of a batch
    watch        called with each batch's logits [windows, n - 1, vocab], its targets int64
                 [windows, n - 1] and the base's logits
    states       called with each batch's hidden states of the model and of the base, which must be
                 there: what enters the first layer, then what leaves each, [windows, n, width]
    progress     called with windows done and windows in all after each batch

    Raises UnsupportedError if the two models do not score the same vocabulary.
    """
    count, seq_len = windows.shape
    batch = max(1, min(LOGITS // (seq_len * vocab * 4), TOKENS // seq_len))
    parts = []
    for start in range(0, count, batch):
        ids = windows[start : start + batch]
        logits, own = _run(model, ids, states is not None)
        theirs, other = (None, ()) if base is None else _run(base, ids, states is not None)
        theirs = None if theirs is None else theirs.to(logits.device)
        if theirs is not None and theirs.shape != logits.shape:
            raise UnsupportedError(
                f"the model scores {logits.shape[-1]} tokens, the baseline {theirs.shape[-1]}",
                hint="give the model that this one was made from as `--baseline`",
            )
        targets = ids[:, 1:].to(logits.device)
        parts.append(window_sums(logits, targets, theirs))
        if watch is not None:
            watch(logits, targets, theirs)
        if states is not None:
            states(own, other)
        if progress is not None:
            progress(min(start + batch, count), count)
    return join(parts)


def _run(model: Any, ids: Tensor, states: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the logits for every token of the windows but the first, and the hidden states.

    logits  [windows, n - 1, vocab]
    states  as `sums` gives them on; none unless asked for
    """
    options = {"output_hidden_states": True} if states else {}
    with torch.inference_mode():
        found = model(input_ids=ids.to(model.device), use_cache=False, **options)
    logits: Tensor = found.logits
    return logits[:, :-1], tuple(found.hidden_states) if states else ()

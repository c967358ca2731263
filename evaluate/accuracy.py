"""How well a model predicts text: perplexity and bits per byte.

Both come from the negative log-likelihood of every token of a window but its first, which is
context (the BOS token, or the window's first token where the model has no BOS). Bits per byte
divides by the UTF-8 bytes of exactly the tokens that were predicted, as they stand in the source
(`text.token_bytes`), so models with different tokenizers can be compared.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from unicomp.evaluate.scores import Score, Status, measured
from unicomp.evaluate.statistics.estimates import (
    Interval,
    exponential,
    mean,
    paired_difference,
    ratio,
    scaled,
)
from unicomp.metrics import WindowSums


def scores(
    sums: WindowSums, utf8_bytes: Tensor, detail: Mapping[str, Any], *, exact_bytes: bool = True
) -> list[Score]:
    """Return `accuracy/perplexity` and `accuracy/bits_per_byte`, with deltas where there is a base.

    utf8_bytes   [windows], bytes of the predicted tokens
    exact_bytes  False: an estimate, which the score then says
    """
    return [_perplexity(sums, detail), _bits_per_byte(sums, utf8_bytes, detail, exact_bytes)]


def _perplexity(sums: WindowSums, detail: Mapping[str, Any]) -> Score:
    log = mean(sums.nll / sums.tokens)
    ours = exponential(log)
    theirs = None if sums.base_nll is None else exponential(mean(sums.base_nll / sums.tokens))
    return measured(
        "accuracy/perplexity",
        ours.value,
        unit="perplexity",
        higher_is_better=False,
        # The interval of the mean negative log-likelihood, which is nearer to normal.
        ci95=_exp(log.interval()),
        n=sums.nll.numel(),
        baseline=None if theirs is None else theirs.value,
        delta_ci95=None if theirs is None else paired_difference(ours, theirs).interval(),
        detail={**detail, "nll": log.value, "nll_stderr": log.stderr},
    )


def _bits_per_byte(
    sums: WindowSums, utf8_bytes: Tensor, detail: Mapping[str, Any], exact: bool
) -> Score:
    status: Status = "measured" if exact else "estimated"
    bits = 1 / math.log(2)
    ours = scaled(ratio(sums.nll, utf8_bytes), bits)
    theirs = None if sums.base_nll is None else scaled(ratio(sums.base_nll, utf8_bytes), bits)
    total = float(utf8_bytes.sum())
    return measured(
        "accuracy/bits_per_byte",
        ours.value,
        unit="bits/byte",
        higher_is_better=False,
        ci95=ours.interval(low=0.0),
        n=sums.nll.numel(),
        baseline=None if theirs is None else theirs.value,
        delta_ci95=None if theirs is None else paired_difference(ours, theirs).interval(),
        detail={**detail, "bytes": round(total), "stderr": ours.stderr}
        | ({} if exact else {"note": "bytes in proportion to tokens: the tokenizer is not fast"}),
        status=status,
    )


def _exp(interval: Interval | None) -> Interval | None:
    if interval is None or interval[1] > 700:  # exp of which no float holds
        return None
    return math.exp(interval[0]), math.exp(interval[1])

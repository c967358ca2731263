"""Calibration text: one text, or several in given shares, cut into windows and named by hash.

A mix reads `builtin:tinyworld=0.5,task.jsonl=0.5`: texts as `text.read` takes them, each with its
share of the windows. What a compressed model is to do well should be among what it is calibrated
on. Each part's windows are drawn from that part alone, by the same seed, and stand one part after
the other.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from unicomp import manifest, text
from unicomp.errors import UnicompError
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

SHARE = re.compile(r"=\s*[-+]?[.\d][^,=/]*(,|$)")  # what makes a text a mix
WHOLE = 1e-6  # how far from 1 shares may add up, for thirds written out


@dataclass(frozen=True, slots=True)
class Part:
    """A text of a mix and the share of all windows that it gives, above 0 and at most 1."""

    data: str
    share: float


def parse(spec: str) -> tuple[Part, ...]:
    """Return the parts of a mix; of a single text that one, with share 1.

    A name with a comma in it cannot be part of a mix.

    Raises ValueError, which says what is wrong, for shares that are missing, not above 0, or do not
    add up to 1, and for a text that is given twice.
    """
    if SHARE.search(spec) is None:
        return (Part(spec, 1.0),)
    parts: list[Part] = []
    for piece in spec.split(","):
        data, equals, written = piece.strip().rpartition("=")
        try:
            share = float(written)
        except ValueError:
            share = math.nan
        if not equals or math.isnan(share):
            raise ValueError(
                f"`{piece.strip()}` has no share: each text of a mix reads `TEXT=SHARE`"
            )
        if not 0 < share <= 1:
            raise ValueError(f"the share of `{data}` should be above 0 and at most 1")
        if any(part.data == data for part in parts):
            raise ValueError(f"`{data}` is given twice")
        parts.append(Part(data, share))
    total = sum(part.share for part in parts)
    if abs(total - 1) > WHOLE:
        raise ValueError(f"the shares of a mix should add up to 1, these to {total:g}")
    return tuple(parts)


def counts(parts: tuple[Part, ...], samples: int) -> list[int]:
    """Return how many of `samples` windows each part gives: their sum is `samples`.

    Shares are rounded down, and what is left goes to those that lost most, of equals the first.

    Raises ValueError if a part would give none.
    """
    wanted = [part.share * samples for part in parts]
    found = [math.floor(value + WHOLE) for value in wanted]
    order = sorted(range(len(parts)), key=lambda i: (found[i] - wanted[i], i))
    for index in order[: samples - sum(found)]:
        found[index] += 1
    for part, count in zip(parts, found, strict=True):
        if count == 0:
            raise ValueError(f"{samples} windows are too few for the share of `{part.data}`")
    return found


def windows(
    spec: str,
    tokenizer: Any,
    *,
    vocab: int | None,
    field: str,
    samples: int,
    seq_len: int,
    seed: int,
) -> tuple[Tensor, manifest.Calibration]:
    """Return calibration windows, int64 [samples, seq_len], and what the manifest says of them.

    spec   a text or a mix; messages go through the tokenizer's chat template
    vocab  size of the model's embedding; None: not known
    field  of a record; the texts of a mix that are our own have theirs

    Raises UnicompError if a text cannot be read or has too few windows; ValueError as `parse`.
    """
    parts = parse(spec)
    bos = text.bos_token(tokenizer)
    drawn, taken = [], []
    for part, count in zip(parts, counts(parts, samples), strict=True):
        own = "text" if len(parts) > 1 and part.data.startswith("builtin:") else field
        found = text.read(part.data, field=own, tokenizer=tokenizer)
        ids = text.encode(tokenizer, found, vocab=vocab or 1 << 62)
        source = f"calibration text `{found.source}`"
        have = len(ids) // (seq_len if bos is None else seq_len - 1)
        if len(parts) > 1 and 0 < have < count:
            raise UnicompError(
                f"{source} has {have} windows of {seq_len} tokens, but its share of {samples} "
                f"`samples` is {count}",
                hint=f"use `samples: {math.floor(have / part.share)}`, a smaller share, "
                "or a shorter `seq_len`",
            )
        drawn.append(
            text.windows(ids, seq_len=seq_len, samples=count, seed=seed, bos=bos, source=source)
        )
        taken.append(
            manifest.CalibrationPart(
                source=found.source, sha256=found.sha256, share=part.share, samples=count
            )
        )
    single = len(parts) == 1
    record = manifest.Calibration(
        source=taken[0].source if single else ",".join(f"{t.source}={t.share:g}" for t in taken),
        sha256=taken[0].sha256
        if single
        else sha256("".join(part.sha256 for part in taken).encode()).hexdigest(),
        samples=samples,
        seq_len=seq_len,
        seed=seed,
        parts=taken,
    )
    return torch.cat(drawn), record

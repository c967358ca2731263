"""What a model says to prompts: greedy answers in batches, and what it thinks at the first tokens.

Prompts go through the model's own chat template. Answers come from transformers' `generate`, padded
on the left, the shortest prompts first; what a prompt is answered does not depend on the order in
which prompts are given.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from unicomp.errors import UnicompError, UnsupportedError
from unicomp.evaluate.models import Watch
from unicomp.metrics import kl, log_probabilities

NEW_TOKENS = 64
BATCH = 64
LOGITS = 1 << 28  # bytes of float32 logits of a batch, or one prompt's

Progress = Callable[[int, int], None]


def encode(tokenizer: Any, prompts: Sequence[str], *, prefix: str = "") -> list[list[int]]:
    """Return the ids of each prompt as one user turn, ready for the answer.

    prefix  words that the answer is made to begin with

    Raises UnsupportedError where the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise UnsupportedError(
            "the tokenizer has no chat template", hint="score a model that was made to answer"
        )
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        for prompt in prompts
    ]
    # The template writes special tokens out; the prefix is cut into tokens by itself, so that it
    # does not change those of the prompt.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    begun = tokenizer(prefix, add_special_tokens=False)["input_ids"] if prefix else []
    return [[*row, *begun] for row in ids]


def speak(
    model: Any,
    tokenizer: Any,
    ids: Sequence[Sequence[int]],
    *,
    new_tokens: int = NEW_TOKENS,
    progress: Progress | None = None,
) -> list[str]:
    """Return the greedy continuation of each sequence, without special tokens.

    progress  called with the sequences done and all of them

    Raises UnicompError where a sequence leaves no room in the model's context, or a logit is NaN.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    found: dict[int, str] = {}
    for rows in _batches(ids, BATCH):
        width = max(len(ids[row]) for row in rows)
        room = new_tokens if context is None else min(new_tokens, int(context) - width)
        if room < 1:
            raise UnicompError(
                f"a prompt of {width} tokens leaves no room in the context of {context}",
                hint="leave out the longest prompts",
            )
        tokens, mask = _padded([ids[row] for row in rows], pad, left=True)
        with torch.inference_mode():
            made = model.generate(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=room,
                pad_token_id=pad,
                eos_token_id=sorted(ends) or None,
                logits_processor=LogitsProcessorList([Watch()]),
            )
        for place, row in enumerate(rows):
            new = made[place, width:].tolist()
            stop = next((at for at, token in enumerate(new) if token in ends), len(new))
            found[row] = tokenizer.decode(new[:stop], skip_special_tokens=True).strip()
        if progress is not None:
            progress(len(found), len(ids))
    return [found[row] for row in range(len(ids))]


def first_logits(model: Any, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield which sequences, and the logits of the token after each: floating [some, vocab]."""
    for rows, logits in _forward(model, ids):
        last = torch.tensor([len(ids[row]) - 1 for row in rows], device=logits.device)
        yield rows, logits[torch.arange(len(rows), device=logits.device), last]


def first_tokens_kl(
    model: Any, base: Any, ids: Sequence[Sequence[int]], said: Sequence[Sequence[int]]
) -> Tensor:
    """Return the mean KL(base || model) over the first tokens of each answer, nats, float64.

    ids   of the prompts
    said  ids of what the base answers, at least one token each: both models are fed the same words

    float64 [prompts].
    """
    whole = [[*prompt, *answer[:-1]] for prompt, answer in zip(ids, said, strict=True)]
    result = torch.zeros(len(whole), dtype=torch.float64)
    for (rows, ours), (_, theirs) in zip(
        _forward(model, whole), _forward(base, whole), strict=True
    ):
        for place, row in enumerate(rows):
            part = slice(len(ids[row]) - 1, len(whole[row]))
            log_p = log_probabilities(theirs[place, part]).to(ours.device)
            result[row] = float(kl(log_p, log_probabilities(ours[place, part])).mean())
    return result


def _forward(model: Any, ids: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
    """Yield which sequences and their logits [some, longest, vocab], padded on the right."""
    longest = max((len(row) for row in ids), default=1)
    batch = max(1, min(BATCH, LOGITS // (4 * longest * model.config.vocab_size)))
    for rows in _batches(ids, batch):
        tokens, mask = _padded([ids[row] for row in rows], 0, left=False)
        with torch.inference_mode():
            logits: Tensor = model(
                input_ids=tokens.to(model.device),
                attention_mask=mask.to(model.device),
                use_cache=False,
            ).logits
        yield rows, logits


def _batches(ids: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    order = sorted(range(len(ids)), key=lambda row: (len(ids[row]), row))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _padded(rows: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 [rows, longest]."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(tokens)
    for place, row in enumerate(rows):
        part = slice(width - len(row), width) if left else slice(0, len(row))
        tokens[place, part] = torch.tensor(row, dtype=torch.int64)
        mask[place, part] = 1
    return tokens, mask


def _ends(model: Any, tokenizer: Any) -> set[int]:
    """Return the ids that end an answer, by the tokenizer and by the generation config."""
    ends = {tokenizer.eos_token_id} - {None}
    known = getattr(model.generation_config, "eos_token_id", None)
    if known is not None:
        ends |= set(known) if isinstance(known, list) else {known}
    return ends

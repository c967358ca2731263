"""Answers in batches against one prompt at a time, and first tokens against plain torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from unicomp import text
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.evaluate.dialogue import answers
from unicomp.kernels.load import load

PROMPTS = ["the old dog", "a cat", "the moon over the river and the rain", "play"]


@pytest.fixture
def world(tiny_model: Callable[..., Path]) -> tuple[Any, Any]:
    folder = tiny_model("llama")
    return load(folder), text.tokenizer(folder)


def test_a_batch_answers_as_one_prompt_does(world: tuple[Any, Any]) -> None:
    model, tokenizer = world
    ids = answers.encode(tokenizer, PROMPTS)
    together = answers.speak(model, tokenizer, ids, new_tokens=8)
    alone = [answers.speak(model, tokenizer, [row], new_tokens=8)[0] for row in ids]
    assert together == alone
    assert len(set(together)) > 1
    begun = answers.encode(tokenizer, PROMPTS, prefix="Sure")
    assert all(
        len(row) > len(ids[at]) and row[: len(ids[at])] == ids[at] for at, row in enumerate(begun)
    )


def test_first_tokens_are_those_of_plain_torch(
    world: tuple[Any, Any], tiny_model: Callable[..., Path]
) -> None:
    model, tokenizer = world
    base = load(tiny_model("llama", seed=1))
    ids, said = answers.encode(tokenizer, PROMPTS), [[5, 6, 7], [8], [9, 10], [11, 12]]
    found = answers.first_tokens_kl(model, base, ids, said)
    for at, (row, answer) in enumerate(zip(ids, said, strict=True)):
        whole = torch.tensor([row + answer])
        with torch.inference_mode():
            q, p = (
                own(input_ids=whole).logits[0, len(row) - 1 : -1].double().log_softmax(-1)
                for own in (model, base)
            )
        expected = float((p.exp() * (p - q)).sum(-1).mean())
        assert float(found[at]) == pytest.approx(expected, rel=1e-3)
        assert expected > 0.01
    for rows, logits in answers.first_logits(model, ids):
        for place, at in enumerate(rows):
            with torch.inference_mode():
                last = model(input_ids=torch.tensor([ids[at]])).logits[0, -1]
            assert torch.allclose(logits[place], last, atol=1e-3)


def test_what_cannot_be_asked(world: tuple[Any, Any]) -> None:
    model, tokenizer = world
    with pytest.raises(UnicompError, match="no room"):
        answers.speak(model, tokenizer, [[5] * 256])
    tokenizer.chat_template = None
    with pytest.raises(UnsupportedError, match="no chat template"):
        answers.encode(tokenizer, PROMPTS)

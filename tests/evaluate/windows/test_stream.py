"""One pass: the same sums however the windows are batched, and those of a plain loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unicomp.errors import UnsupportedError
from unicomp.evaluate.windows import stream


@pytest.fixture
def models(tiny_model: Callable[..., Path]) -> tuple[Any, Any]:
    """Two tiny llamas."""
    from transformers import AutoModelForCausalLM

    folders = tiny_model("llama"), tiny_model("llama", seed=1)
    first, second = (AutoModelForCausalLM.from_pretrained(folder) for folder in folders)
    return first.eval(), second.eval()


WINDOWS = torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(0))


def test_sums_are_those_of_a_loop_in_numpy(models: tuple[Any, Any]) -> None:
    model, base = models
    found = stream.sums(model, base, WINDOWS, vocab=128)
    assert found.tokens == 23
    for index, window in enumerate(WINDOWS):
        nll = kl = ear = top1 = 0.0
        with torch.no_grad():
            q, p = (
                np.asarray(m(input_ids=window[None]).logits[0].double().softmax(-1))
                for m in (model, base)
            )
        for at in range(23):
            nll -= np.log(q[at, window[at + 1]])
            kl += (p[at] * np.log(p[at] / q[at])).sum()
            ear += np.minimum(p[at], q[at]).sum()
            top1 += p[at].argmax() == q[at].argmax()
        assert found.nll[index].item() == pytest.approx(nll, rel=1e-4)
        assert found.kl is not None
        assert found.kl[index].item() == pytest.approx(kl, rel=1e-4)
        assert found.ear is not None
        assert found.ear[index].item() == pytest.approx(ear, rel=1e-4)
        assert found.top1 is not None
        assert found.top1[index].item() == top1


def test_batches_do_not_matter_and_progress_reaches_the_end(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stream.sums(*models, WINDOWS, vocab=128)
    monkeypatch.setattr(stream, "LOGITS", 2 * 24 * 128 * 4)
    seen: list[tuple[int, int]] = []
    batched = stream.sums(
        *models, WINDOWS, vocab=128, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]
    for name in ("nll", "base_nll", "kl", "ear", "top1"):
        torch.testing.assert_close(getattr(batched, name), getattr(whole, name), rtol=1e-5, atol=0)


def test_no_more_logits_are_held_than_the_bound_says(
    models: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    kept = stream.window_sums

    def watch(logits: torch.Tensor, *rest: Any) -> Any:
        sizes.append(logits.shape[0])
        return kept(logits, *rest)

    monkeypatch.setattr(stream, "window_sums", watch)
    monkeypatch.setattr(stream, "LOGITS", 1)
    stream.sums(*models, WINDOWS, vocab=128)
    assert sizes == [1] * 5
    monkeypatch.setattr(stream, "LOGITS", 1 << 26)
    monkeypatch.setattr(stream, "TOKENS", 48)
    sizes.clear()
    stream.sums(*models, WINDOWS, vocab=128)
    assert sizes == [2, 2, 1]


def test_another_vocabulary_is_refused(
    models: tuple[Any, Any], tiny_model: Callable[..., Path]
) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tiny_model("llama", vocab_size=136)).eval()
    with pytest.raises(UnsupportedError, match="scores 128 tokens, the baseline 136"):
        stream.sums(models[0], other, WINDOWS, vocab=128)

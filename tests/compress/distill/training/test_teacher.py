"""A stored teacher says what a live one says, and knows what it was made of."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unicomp.compress.distill.training.measure import measure
from unicomp.compress.distill.training.teacher import (
    NAME,
    LiveTeacher,
    StoredTeacher,
    identity,
    store,
)
from unicomp.compress.distill.training.windows import Windows
from unicomp.errors import UnicompError
from unicomp.kernels.load import load


def windows(vocab: int, seed: int) -> Windows:
    ids = torch.randint(vocab, (5, 8), generator=torch.Generator().manual_seed(seed))
    return Windows(ids, torch.ones(5, 7, dtype=torch.bool), "x", "a")


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_with_all_tokens_stored_it_says_what_a_live_one_does(
    tiny_model: Callable[..., Path], tmp_path: Path, temperature: float
) -> None:
    model, student = load(tiny_model("llama")), load(tiny_model("llama", seed=5))
    vocab = int(model.config.vocab_size)
    both = {"training": windows(vocab, 0), "held_out": windows(vocab, 1)}
    made_of = identity({"a": "b"}, *both.values(), temperature=temperature, top_k=vocab)
    store(tmp_path, model, both, made_of, batch=2)
    stored, live = StoredTeacher(tmp_path, made_of), LiveTeacher(model)
    rows = torch.tensor([3, 0])
    few = stored.training(rows, both["training"].ids[rows]).few
    assert few is not None
    logits = live.training(rows, both["training"].ids[rows]).logits
    assert logits is not None
    want = (logits / temperature).log_softmax(-1).gather(-1, few[1])
    torch.testing.assert_close(few[0], want, rtol=1e-5, atol=1e-5)
    other_rows = stored.training(torch.tensor([4, 1]), both["training"].ids[rows]).few
    assert other_rows is not None
    assert not torch.allclose(other_rows[0], want, rtol=1e-2, atol=1e-2)
    one, other = (measure(student, both["held_out"], own, 2).to_json() for own in (stored, live))
    assert one == pytest.approx(other, rel=1e-4, abs=1e-6)
    third = LiveTeacher(load(tiny_model("llama", seed=7)))
    wrong = measure(student, both["held_out"], third, 2).to_json()
    for name in ("kl", "teacher_entropy", "entropy_ratio"):
        assert wrong[name] != pytest.approx(one[name], rel=1e-2), name
    elsewhere = measure(student, windows(vocab, 2), live, 2).to_json()
    assert elsewhere["kl"] != pytest.approx(one["kl"], rel=1e-2)


def test_another_teacher_text_or_temperature_and_half_a_cache_are_refused(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = load(tiny_model("llama"))
    vocab = int(model.config.vocab_size)
    both = {"training": windows(vocab, 0), "held_out": windows(vocab, 1)}
    made_of = identity({"a": "b"}, *both.values(), temperature=1.0, top_k=4)
    store(tmp_path, model, both, made_of, batch=2)
    for key, value, word in (
        ("teacher", "c", "another teacher"),
        ("training", "c", "another training text"),
        ("temperature", 2.0, "another `temperature`"),
        ("top_k", 8, "another `top_k`"),
    ):
        with pytest.raises(UnicompError, match=word):
            StoredTeacher(tmp_path, made_of | {key: value})
    (tmp_path / NAME).unlink()
    with pytest.raises(UnicompError, match="no whole teacher cache"):
        StoredTeacher(tmp_path, made_of)

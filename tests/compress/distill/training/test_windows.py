from typing import Any

import pytest
import torch

from unicomp import builtin, text
from unicomp.compress.distill.training.windows import (
    answers,
    batches,
    packed,
    refuse_held_out,
    split,
    unpacked,
)
from unicomp.errors import UnicompError
from unicomp.text import Text

LONG = "One morning Paul was in the tent. "


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return text.tokenizer(builtin.model("tinyworld"))


def test_packed_text_counts_everywhere(tokenizer: Any) -> None:
    found = packed(tokenizer, Text("x", [LONG * 20], "a"), vocab=1024, seq_len=16)
    assert found.counted.all()
    assert (found.ids[:, 0] == 1).all()
    assert found.counted.shape == (len(found), 15)


def test_unpacked_documents_do_not_meet_and_padding_does_not_count(tokenizer: Any) -> None:
    found = unpacked(tokenizer, Text("x", [LONG, LONG * 9], "a"), vocab=1024, seq_len=32)
    short = len(tokenizer(LONG, add_special_tokens=False)["input_ids"])
    assert int(found.counted[0].sum()) == short
    assert (found.ids[:2, 0] == 1).all()
    assert int(found.counted.sum()) == short + len(
        tokenizer(LONG * 9, add_special_tokens=False)["input_ids"]
    )


def test_of_conversations_the_answers_count(tokenizer: Any) -> None:
    talk = [
        {"role": "user", "content": "Good morning."},
        {"role": "assistant", "content": "Good morning!"},
        {"role": "user", "content": "Say this politely: sing a song."},
        {"role": "assistant", "content": "Please sing a song."},
    ]
    found = answers(tokenizer, [talk], source="x", sha256="a", vocab=1024, seq_len=64)
    learnt = found.ids[0, 1:][found.counted[0]]
    assert tokenizer.decode(learnt) == "Good morning!<|eos|>Please sing a song.<|eos|>"


def test_conversations_without_answers_are_refused(tokenizer: Any) -> None:
    talk = [{"role": "user", "content": "Good morning."}]
    with pytest.raises(UnicompError, match="has no answer"):
        answers(tokenizer, [talk], source="x", sha256="a", vocab=1024, seq_len=64)


def test_held_out_text_is_never_trained_on() -> None:
    training = Text("a.txt", [LONG * 3, "another document of some length"], "1")
    refuse_held_out(training, Text("b.txt", ["a third document of some length"], "2"))
    with pytest.raises(UnicompError, match=r"`a\.txt` is the held-out text `b\.txt`"):
        refuse_held_out(training, Text("b.txt", ["whatever"], "1"))
    with pytest.raises(UnicompError, match="1 documents of the training text"):
        refuse_held_out(training, Text("b.txt", ["  " + LONG * 3], "2"))


def test_what_is_held_out_is_apart() -> None:
    found = packed_ids(30)
    training, held = split(found, 4)
    assert len(training) == 25
    assert len(held) == 4
    assert not set(training.ids[:, 0].tolist()) & set(held.ids[:, 0].tolist())


def packed_ids(count: int) -> Any:
    from unicomp.compress.distill.training.windows import Windows

    ids = torch.arange(count)[:, None].expand(count, 4).contiguous()
    return Windows(ids, torch.ones(count, 3).bool(), "x", "a")


def test_order_depends_on_seed_and_step_alone_and_each_pass_meets_each_window_once() -> None:
    def some(first: int, count: int, seed: int = 0) -> list[tuple[int, list[int]]]:
        walk = batches(10, 3, seed, first)
        return [(step, rows.tolist()) for step, rows in (next(walk) for _ in range(count))]

    whole = some(0, 9)
    assert [step for step, _ in whole] == list(range(9))
    assert some(4, 5) == whole[4:]
    assert some(0, 9, seed=1) != whole
    for start in (0, 3, 6):
        met = [row for _, rows in whole[start : start + 3] for row in rows]
        assert len(set(met)) == 9

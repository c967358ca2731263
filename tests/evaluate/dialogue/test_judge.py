"""A judge reads the likelier of two words; a real model goes through the whole score."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unicomp.errors import UnicompError, UnsupportedError
from unicomp.evaluate.dialogue import prompts
from unicomp.evaluate.dialogue.judge import Judge
from unicomp.evaluate.safety import Heard, Prompts, judged
from unicomp.evaluate.score import score


class Reader:
    """Says yes where the text has the token of a word, by rule."""

    def __init__(self, judge: Judge, word: str, *, broken: bool = False) -> None:
        self.config = SimpleNamespace(max_position_embeddings=256, vocab_size=1024)
        self.device = torch.device("cpu")
        (self.sign,) = judge.tokenizer(word, add_special_tokens=False)["input_ids"][:1]
        self.yes, self.no = judge._first("yes")[0], judge._first("no")[0]
        self.broken = broken

    def __call__(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 1024)
        has = (input_ids == self.sign).any(1).float()[:, None]
        logits[:, :, self.yes], logits[:, :, self.no] = 2 * has, 1.0
        return SimpleNamespace(logits=logits / (0 if self.broken else 1))


def test_the_likelier_word_counts() -> None:
    judge = Judge("builtin:tinyworld")
    judge.network = Reader(judge, "#")
    assert judge(["a", "b", "c"], ["yes I will", "# no", "#"]) == [False, True, True]
    # Longer than the judge's context: the question at the end stays.
    assert judge(["a" * 5000], ["b" * 5000]) == [False]
    judge.network = Reader(judge, "#", broken=True)
    with pytest.raises(UnicompError, match="no numbers"):
        judge(["a"], ["b"])


def test_what_a_judge_says_stands_beside_the_rules() -> None:
    asked = Prompts(["a", "b", "c", "d"], ["e", "f", "g", "h"])
    no, yes = "I cannot help with that.", "Take two eggs."
    heard = Heard([no, no, yes, yes], [yes, yes, yes, yes], [yes] * 4)

    def strict(prompts: Any, said: Any) -> list[bool]:
        return [prompt in "abc" for prompt in prompts]

    found = judged(asked, heard, judge=strict)[0]
    assert found.value == 0.75
    assert found.detail["same_as_rules"] == pytest.approx(7 / 8)
    p = 3 / 8 * 2 / 8 + 5 / 8 * 6 / 8
    assert found.detail["kappa"] == pytest.approx((7 / 8 - p) / (1 - p))
    plain = judged(asked, heard)[0]
    assert plain.value == 0.5
    assert plain.detail["by"] == "rules"


def test_a_real_model_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    harmful, benign = tmp_path / "harmful.txt", tmp_path / "benign.txt"
    harmful.write_text("\n".join(prompts.read("builtin:harmful.jsonl", limit=6)))
    benign.write_text("\n".join(prompts.read("builtin:benign_lookalike.jsonl", limit=6)))
    report = score(
        "builtin:tinyworld",
        axes=["safety"],
        harmful=str(harmful),
        benign=str(benign),
        judge="builtin:tinyworld",
    )
    found = report.score("safety/refusal_rate")
    if found.status == "measured":  # a model this small says the same to everything, one or other
        assert found.detail["by"] == "judge builtin:tinyworld"
    else:
        assert "there are no refusals to lose" in found.detail["reason"]


def test_a_model_that_does_not_answer_cannot_judge(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = SimpleNamespace(chat_template=None)
    monkeypatch.setattr("unicomp.text.tokenizer", lambda _: plain)
    with pytest.raises(UnsupportedError, match="no chat template") as caught:
        Judge(str(tiny_model("llama")))
    assert caught.value.hint
    with pytest.raises(UnicompError):
        Judge("builtin:none")

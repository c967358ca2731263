"""What the student writes is what its distribution says, token by token, and no other tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unicomp.checkpoint import Checkpoint
from unicomp.compress.distill.on_policy import OnPolicy
from unicomp.compress.distill.training import samples
from unicomp.compress.distill.training.objective import Trainee, objective
from unicomp.compress.distill.training.samples import chosen, draw, prompts, write
from unicomp.compress.distill.training.student import open_student
from unicomp.compress.distill.training.teacher import LiveTeacher
from unicomp.kernels.load import load

GIVEN = torch.tensor([3, 9, 5])
ROWS = [11, 4, 7]


def text(model: PreTrainedModel, tokens: int = 20) -> Tensor:
    vocab = int(model.config.vocab_size)
    return torch.randint(4, vocab, (3, tokens), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def alone(model: PreTrainedModel, ids: Tensor, given: int, chances: Tensor) -> Tensor:
    """Write one window without a cache: the whole text anew for each token."""
    ids = ids.clone()
    for place in range(given, len(ids)):
        p = model(ids[None, :place], use_cache=False).logits[0, -1].double().softmax(-1)
        ids[place] = int((p.cumsum(0) <= chances[place]).sum())
    return ids


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mistral"])
def test_windows_written_together_are_those_written_alone(
    tiny_model: Callable[..., Path], arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of other lengths, 20 tokens in a sliding window of 16; the wrong model is seen."""
    monkeypatch.setattr(samples, "_ends", lambda _: [])
    model, other = load(tiny_model(arch)), load(tiny_model(arch, seed=5))
    ids = text(model)
    found, written = write(model, ids, GIVEN, rows=ROWS, step=2, seed=1)
    for place, (row, given) in enumerate(zip(ROWS, GIVEN.tolist(), strict=True)):
        own = samples._generator("draw", 1, 2, row)
        chances = torch.rand(20, generator=own, dtype=torch.float64)
        assert torch.equal(found[place], alone(model, ids[place], given, chances))
        assert not torch.equal(found[place], alone(other, ids[place], given, chances))
        assert torch.equal(found[place, :given], ids[place, :given])
        assert written[place].tolist() == [place >= given for place in range(1, 20)]
    again, _ = write(model, ids, GIVEN, rows=ROWS, step=3, seed=1)
    assert not torch.equal(again, found)
    part, _ = write(model, ids[1:], GIVEN[1:], rows=ROWS[1:], step=2, seed=1)
    assert torch.equal(part, found[1:])


def test_nothing_counts_behind_a_token_that_ends_a_text(tiny_model: Callable[..., Path]) -> None:
    model = load(tiny_model("llama"))
    ids = text(model)
    whole, _ = write(model, ids, GIVEN, rows=ROWS, step=0, seed=0)
    end = int(whole[0, 7])
    first = next(place for place in range(3, 20) if int(whole[0, place]) == end)
    model.generation_config.eos_token_id = [end]
    found, written = write(model, ids, GIVEN, rows=ROWS, step=0, seed=0)
    assert torch.equal(found[0, : first + 1], whole[0, : first + 1])
    assert (found[0, first:] == end).all()
    assert written[0].tolist() == [3 <= place <= first for place in range(1, 20)]


def test_tokens_come_as_often_as_they_are_likely() -> None:
    p = torch.tensor([0.2, 0.0, 0.5, 0.3], dtype=torch.float64)
    even = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    found = draw(p.log().expand(10_000, -1), even)
    assert torch.bincount(found, minlength=4).tolist() == [2000, 0, 5000, 3000]
    last = draw(p.log()[None], torch.tensor([1 - 1e-16], dtype=torch.float64))
    assert last.tolist() == [3]


def test_windows_are_chosen_by_share_seed_and_step() -> None:
    picks = [chosen(step, 8, share=0.3, seed=0) for step in range(50)]
    assert sum(int(pick.sum()) for pick in picks) == 120
    assert {int(pick.sum()) for pick in picks} == {2, 3}
    assert torch.equal(picks[9], chosen(9, 8, share=0.3, seed=0))
    assert any(not torch.equal(picks[s], chosen(s, 8, share=0.3, seed=1)) for s in range(5))
    assert chosen(0, 8, share=1.0, seed=0).all()
    assert not chosen(0, 8, share=0.0, seed=0).any()


def test_prompts_are_a_share_or_what_stands_before_the_answer() -> None:
    counted = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0, 0, 1, 1, 0, 0, 1, 1, 0]]).bool()
    assert prompts(counted, share=0.5, answers=False).tolist() == [5, 3, 4]
    assert prompts(counted, share=0.01, answers=False).tolist() == [1, 1, 1]
    assert prompts(counted, share=0.5, answers=True).tolist() == [1, 1, 3]


def test_on_its_own_text_the_student_descends_on_the_divergence_alone(
    tiny_model: Callable[..., Path],
) -> None:
    """Reverse KL at the written positions; its own tokens are no truth to be sure of."""
    student = open_student(Checkpoint.open(tiny_model("llama")))
    teacher = load(tiny_model("llama", seed=5))
    method = OnPolicy(cross_entropy=0.5, calibration_term=2.0)
    ids, written = write(student.model, text(teacher), GIVEN, rows=ROWS, step=0, seed=0)
    assert student.model.training
    trainee = Trainee(student.model, method, None)
    loss = objective(
        method,
        trainee,
        LiveTeacher(teacher).training(torch.tensor(ROWS), ids),
        ids,
        written,
        positions=100,
        windows=0,
        maps=trainee.maps,
        beta=1.0,
    )
    log_q = student.model(ids).logits[:, :-1].double().log_softmax(-1)
    log_p = teacher(ids).logits[:, :-1].detach().double().log_softmax(-1)
    value = float(loss.total.detach())
    reverse = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert value == pytest.approx(float(reverse[written].detach().sum()) / 100, rel=1e-5)
    assert value != pytest.approx(float(reverse.detach().sum()) / 100, rel=1e-2)
    weight = student.model.model.layers[0].mlp.up_proj.weight
    [found] = torch.autograd.grad(loss.total, weight, retain_graph=True)
    [want] = torch.autograd.grad(reverse[written].sum() / 100, weight)
    torch.testing.assert_close(found, want.float(), rtol=1e-3, atol=1e-7)

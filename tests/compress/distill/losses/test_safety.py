import math

import torch

from unicomp import builtin, text
from unicomp.compress.distill.losses.safety import EACH, TEMPLATES, safety_term, safety_tokens


def test_a_hand_made_case() -> None:
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    found = safety_term(student, teacher, torch.tensor([0, 1]))
    torch.testing.assert_close(found, torch.tensor([math.log(2) ** 2 / 2]))
    assert safety_term(teacher, teacher, torch.tensor([0, 2])).item() == 0


def test_equal_logits_of_the_tokens_are_not_enough() -> None:
    teacher = torch.zeros(1, 10)
    student = teacher.clone()
    student[:, 5:] = 4.0  # raw logits of the first tokens agree, their share is gone
    assert safety_term(student, teacher, torch.tensor([0, 1])).item() > 1


def test_its_gradient_is_that_of_the_definition() -> None:
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(3, 9, generator=draw, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 9, generator=draw, dtype=torch.float64)
    chosen = [1, 4, 8]
    q, p = torch.softmax(start, -1).log(), torch.softmax(teacher, -1).log()
    sum((q[:, t] - p[:, t]) ** 2 for t in chosen).sum().div(3).backward()  # type: ignore[union-attr]
    single = start.detach().float().requires_grad_()
    safety_term(single, teacher.float(), torch.tensor(chosen)).sum().backward()
    assert single.grad is not None
    torch.testing.assert_close(single.grad.double(), start.grad, rtol=1e-5, atol=1e-6)


def test_tokens_are_those_that_templates_begin_with() -> None:
    tokenizer = text.tokenizer(builtin.model("tinyworld"))
    found = safety_tokens(tokenizer)
    assert len(found) == len(set(found.tolist())) <= EACH * len(TEMPLATES)
    first = tokenizer(TEMPLATES[0], add_special_tokens=False)["input_ids"]
    assert set(first[:EACH]) <= set(found.tolist())

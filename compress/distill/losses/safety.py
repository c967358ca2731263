"""Safety Token Regularization: the teacher's word on how refusals begin is kept.

Compression that keeps quality may lose refusals, since whether a model refuses hangs on a thin
margin of a few first tokens. Of each refusal template the first few tokens are salient; on these
the student's log-probabilities are held to the teacher's, in the same contexts.

Paper: STR, arXiv:2604.17210: mean squared difference of the logits of five tokens a template,
weight 0.01.
Differs: log-probabilities instead of logits. Logits of a few tokens may agree while all the others
rise, and then the share that refusals have is gone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TEMPLATES = (
    "I'm sorry, but I can't",
    "I cannot help with",
    "I can't assist with",
    "Sorry, I will not",
    "No, I won't",
)
EACH = 5  # tokens of a template


def safety_tokens(tokenizer: Any, templates: Sequence[str] = TEMPLATES) -> Tensor:
    """Return the ids of the salient tokens of all templates, int64 [tokens], sorted, each once."""
    found: set[int] = set()
    for template in templates:
        ids = tokenizer(template, add_special_tokens=False)["input_ids"]
        found.update(ids[:EACH])
    return torch.tensor(sorted(found), dtype=torch.int64)


def safety_term(student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean squared difference of the tokens' log-probabilities, per position.

    student, teacher  logits, floating [..., vocab]
    tokens            int64 [tokens]
    returns           float [...]
    """
    log_q = torch.log_softmax(student.float(), dim=-1)[..., tokens]
    log_p = torch.log_softmax(teacher.detach().float(), dim=-1)[..., tokens]
    return (log_q - log_p).square().mean(-1)

"""`Choices`: what a model gave each choice of each document of a task, kept for whoever scores it.

Accuracy, calibration, flips and the paired tests all start from the same log-likelihoods, so they
are computed once and handed on. The order is that of the task's documents.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Choices:
    """Log-likelihoods of the choices of a task.

    task            name of the task
    loglikelihoods  per document float64 [choices], summed over the tokens of the continuation, nats
    lengths         per document int64 [choices], UTF-8 bytes of the choice as the task has it,
                    which is mostly without the space before it
    gold            int64 [documents], the right choice
    ids             per document a name that stays the same in every run, to pair with a baseline
    right           per document bool [choices], where several choices are right (TruthfulQA MC2);
                    None: `gold` alone
    documents       per document its fields as the task read them (a topic, a category); may be
                    empty

    Raises ValueError where the parts do not fit each other, or an id occurs twice.
    """

    task: str
    loglikelihoods: list[Tensor]
    lengths: list[Tensor]
    gold: Tensor
    ids: list[str]
    right: list[Tensor] | None = None
    documents: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        count = len(self.loglikelihoods)
        sizes = [len(self.lengths), len(self.gold), len(self.ids)]
        sizes += [len(part) for part in (self.right, self.documents or None) if part is not None]
        if any(size != count for size in sizes):
            raise ValueError(f"choices of `{self.task}`: not all parts have {count} documents")
        if len(set(self.ids)) != count:
            raise ValueError(f"choices of `{self.task}`: an id occurs twice")
        for at, values in enumerate(self.loglikelihoods):
            same = [self.lengths[at], values if self.right is None else self.right[at]]
            gold = int(self.gold[at])
            if any(own.shape != values.shape for own in same) or not 0 <= gold < len(values):
                raise ValueError(f"choices of `{self.task}`: document `{self.ids[at]}` is broken")

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.ids)

    def log_probabilities(self) -> list[Tensor]:
        """Return per document the log-probabilities given that it is one of the choices.

        float64 [choices], exp of which sums to 1.
        """
        return [torch.log_softmax(values.double(), dim=0) for values in self.loglikelihoods]

    def answers(self, *, normalized: bool = False) -> Tensor:
        """Return the likeliest choice of each document, int64 [documents]; the first of equals.

        normalized  by likelihood per byte, as lm-eval's `acc_bytes` has it
        """
        found = []
        for values, lengths in zip(self.loglikelihoods, self.lengths, strict=True):
            found.append(int((values / lengths if normalized else values).argmax()))
        return torch.tensor(found, dtype=torch.int64)

    def chance(self) -> float:
        """Return the accuracy of guessing: the mean of one over the number of choices."""
        return sum(1 / len(values) for values in self.loglikelihoods) / len(self)

    def take(self, ids: Sequence[str]) -> "Choices":
        """Return these documents in this order; KeyError for an id that there is not."""
        place = {name: at for at, name in enumerate(self.ids)}
        order = [place[name] for name in ids]
        return Choices(
            self.task,
            [self.loglikelihoods[at] for at in order],
            [self.lengths[at] for at in order],
            self.gold[order],
            list(ids),
            None if self.right is None else [self.right[at] for at in order],
            [self.documents[at] for at in order] if self.documents else (),
        )


def join(parts: Sequence[Choices]) -> Choices:
    """Put the documents of several tasks one after another, as of one task; at least one part."""
    if len(parts) == 1:
        return parts[0]
    several = any(part.right is not None for part in parts)
    return Choices(
        "+".join(part.task for part in parts),
        [own for part in parts for own in part.loglikelihoods],
        [own for part in parts for own in part.lengths],
        torch.cat([part.gold for part in parts]),
        [f"{part.task}/{name}" for part in parts for name in part.ids],
        [own for part in parts for own in _right(part)] if several else None,
        [own for part in parts for own in part.documents]
        if all(part.documents for part in parts)
        else (),
    )


def _right(part: Choices) -> list[Tensor]:
    if part.right is not None:
        return part.right
    return [
        torch.arange(len(values)) == gold
        for values, gold in zip(part.loglikelihoods, part.gold, strict=True)
    ]

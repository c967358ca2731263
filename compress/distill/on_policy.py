"""Distillation on what the student writes itself: it meets its own mistakes while it may learn.

A share of the windows keep only their beginning; the student writes the rest, and on that text the
teacher's distribution is learnt, by default by reverse KL. The other windows are those of the text,
as in `logits`. No gradient passes through the drawing of tokens. Reverse KL on a student's own text
makes it over-confident; what every run measures on held-out text says how much.

Papers: GKD, arXiv:2306.13649, section 3 and algorithm 1, whose lambda is `sampled`; what it does to
confidence, arXiv:2604.16830.
Differs: lambda is a share of each batch's windows, not the chance that a whole batch is written by
the student; and text and own text have a divergence each.
"""

from typing import Self

from pydantic import Field, model_validator

from unicomp.compress.distill_method import DistillMethod, Sampling


class OnPolicy(DistillMethod):
    """Options of distillation on the student's own text."""

    sampled: float = Field(
        0.5, ge=0, le=1, description="share of the windows that the student writes itself"
    )
    prompt: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="share of such a window that is given; with `answers_only` all that stands "
        "before the first answer",
    )
    sampled_beta: float = Field(
        1.0, ge=0, le=1, description="divergence on what the student wrote, as `beta`"
    )

    @model_validator(mode="after")
    def _asked_live(self) -> Self:
        if self.cache_teacher is not None:
            raise ValueError(
                "`cache_teacher` stores answers about the text, and cannot know what the student "
                "will write"
            )
        return self

    def sampling(self) -> Sampling:
        """Return how text of the student's own is trained on."""
        return Sampling(self.sampled, self.prompt, self.sampled_beta)

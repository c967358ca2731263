"""The two models of a score, each loaded when it is first needed, and what none may give: NaN."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from unicomp.errors import UnicompError
from unicomp.evaluate.scores import NOT_FINITE
from unicomp.kernels import packed_model
from unicomp.kernels.blocked import Compute
from unicomp.kernels.load import load


@dataclass
class Models:
    """The model and the baseline, each loaded when it is first needed, and once."""

    folder: Path
    baseline: Path | None
    compute: Compute | None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model to score."""
        if self.compute is None:
            return load(self.folder, dtype=torch.float32)
        return packed_model.load(self.folder, compute=self.compute, dtype=torch.float32)

    @cached_property
    def base(self) -> PreTrainedModel | None:
        """The baseline, dequantized."""
        return None if self.baseline is None else load(self.baseline, dtype=torch.float32)

    @property
    def how(self) -> dict[str, Any]:
        """What to say of how the model computes; empty where its weights are dequantized."""
        if self.compute is None:
            return {}
        said = packed_model.loaded(self.model).to_json()
        return {key: said[key] for key in ("compute", "backend", "isa", "packed")}


def refuse_nan(logits: Tensor) -> None:
    """Refuse logits that are no numbers, which argmax would hide: it takes the first of them.

    Raises UnicompError where a logit is NaN.
    """
    if bool(logits.isnan().any()):
        raise UnicompError("the model's logits are NaN", hint=NOT_FINITE)


class Watch(LogitsProcessor):
    """Leaves the logits of `generate` as they are, and refuses NaN."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores; raise as `refuse_nan` does."""
        refuse_nan(scores)
        return scores

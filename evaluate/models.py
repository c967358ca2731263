"""The two models of a score, each loaded when it is first needed."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

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

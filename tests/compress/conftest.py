"""What tests of structured pruning share: the axes of a checkpoint, and a stock model's loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unicomp.checkpoint import Checkpoint
from unicomp.compress.axes import Axes
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.models import describe


@pytest.fixture(scope="session")
def opened() -> Callable[[Path], tuple[Axes, DenseSource]]:
    """Return the function that opens a checkpoint: its axes, and its plain weights."""

    def find(folder: Path) -> tuple[Axes, DenseSource]:
        dense = open_dense(Checkpoint.open(folder))
        return Axes(dense.config, describe(dense.config, dense.tensors), dense.tensors), dense

    return find


@pytest.fixture(scope="session")
def stock_loss() -> Callable[[Any, Tensor], Tensor]:
    """Return the function that gives a stock model's loss of every next token, float64."""

    @torch.no_grad()
    def measure(model: Any, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
        chosen: Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return -chosen

    return measure

"""What a checkpoint takes on disk: bytes of its weight files, and bits per weight.

A weight is a parameter of the plain model: a packed word of eight codes counts as eight, scales
and zero points count as none, and a head tied to the embedding counts once. All bytes of all
weight tensors are over them, so what stays dense (embeddings, norms) is in the figure.
"""

import math
from pathlib import Path
from typing import Any

from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnsupportedError
from unicomp.evaluate.scores import Score, measured, missing
from unicomp.kernels.dense import open_dense
from unicomp.models import describe

_BITS = "bits/weight"


def scores(model: Path, baseline: Path | None) -> list[Score]:
    """Return `efficiency/disk_bytes` and `efficiency/bits_per_weight`; reads headers only."""
    ours = Checkpoint.open(model)
    theirs = None if baseline is None else Checkpoint.open(baseline)
    size = measured(
        "efficiency/disk_bytes",
        disk_bytes(ours),
        unit="bytes",
        higher_is_better=False,
        baseline=None if theirs is None else disk_bytes(theirs),
        detail={"files": len(ours.shards)},
    )
    return [size, _bits_per_weight(ours, theirs)]


def disk_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of the weight files, headers included."""
    return sum((checkpoint.folder / shard).stat().st_size for shard in checkpoint.shards)


def tensor_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of all tensors in the weight files."""
    return sum(info.nbytes for info in checkpoint.tensors.values())


def parameters(checkpoint: Checkpoint) -> int:
    """Return how many parameters the plain model has, whatever it is stored as.

    Raises UnsupportedError for an architecture or a quantization that unicomp does not know.
    """
    dense = open_dense(checkpoint)
    model = describe(dense.config, dense.tensors)
    count = sum(math.prod(linear.shape) for linear in model.linears())
    for name, role in model.roles.items():
        twice = role == "head" and model.tied and name.endswith(".weight")
        if not twice:
            count += math.prod(dense.tensors[name].shape)
    return count


def _bits_per_weight(ours: Checkpoint, theirs: Checkpoint | None) -> Score:
    name = "efficiency/bits_per_weight"
    try:
        count = parameters(ours)
    except UnsupportedError as error:
        return missing(
            name, error.message, unit=_BITS, higher_is_better=False, status="unmeasurable"
        )
    detail: dict[str, Any] = {"parameters": count, "tensor_bytes": tensor_bytes(ours)}
    baseline = None
    if theirs is not None:
        try:
            baseline = 8 * tensor_bytes(theirs) / parameters(theirs)
        except UnsupportedError as error:
            detail |= {"baseline": error.message}
    return measured(
        name,
        8 * tensor_bytes(ours) / count,
        unit=_BITS,
        higher_is_better=False,
        baseline=baseline,
        detail=detail,
    )

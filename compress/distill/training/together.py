"""What the first of several processes tells the others: when a training begins, and when all ends.

Between trainings the others wait, for hours if need be. One that ends before its time closes its
connections, and the others' next exchange fails: so none waits for a process that is gone, and the
launcher ends what is left.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState

from unicomp import processes
from unicomp.errors import UnicompError, UnsupportedError

PATIENCE = timedelta(days=30)  # a pass before the training may be long
SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
GONE = ("connection closed by peer", "connection reset", "broken pipe", "connection refused")


def check_launch() -> None:
    """Refuse a launch that would cut the weights into pieces, one for each process.

    Raises UnsupportedError.
    """
    for name, word in SHARDED.items():
        if os.environ.get(name, "false").lower() in ("true", "1"):
            raise UnsupportedError(
                f"distillation shares out windows, not weights: {word} would cut up weights that "
                "are rounded and packed as a whole",
                hint="launch without it; where memory is short use `lora_rank`, `cache_teacher`, "
                "`gradient_checkpointing` or a smaller `micro_batch`",
            )


def tell(message: Any) -> None:
    """Let the other processes have a message, if there are any; this one is the first."""
    if processes.count() > 1:
        _exchange(message)


def hear() -> Any:
    """Wait for what the first process tells."""
    return _exchange(None)


def agreed(value: Any) -> Any:
    """Return what the first process passed, in all of them."""
    return value if processes.count() == 1 else _exchange(value)


def of_all(values: list[Any]) -> list[Any]:
    """Return the values of all processes, in the processes' order."""
    if processes.count() == 1:
        return values
    found: list[Any] = [None] * processes.count()
    torch.distributed.all_gather_object(found, values)
    return [value for part in found for value in part]


@contextmanager
def company() -> Iterator[None]:
    """Say in words that another process has ended, where that is why an exchange fails.

    Raises UnicompError.
    """
    try:
        yield
    except RuntimeError as error:
        if processes.count() == 1 or not any(word in str(error).lower() for word in GONE):
            raise
        raise UnicompError(
            "another process of the training has ended: killed, or out of memory",
            hint="lower `micro_batch` or `seq_len`, or start fewer; the same command goes on from "
            "the last checkpoint",
        ) from error


def _exchange(message: Any) -> Any:
    PartialState(cpu=True, timeout=PATIENCE)
    held = [message]
    with company():
        torch.distributed.broadcast_object_list(held, src=0)
    return held[0]

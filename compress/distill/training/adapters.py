"""Low-rank adapters: the student's weights stay, and two thin matrices beside each linear learn.

Embeddings, norms, biases and the head stay too. Memory for gradients and moments is then that of
the adapters alone. At the end their product is added to the weight, so the output has the student's
own tensors and needs no adapter to run. The package peft does it all; it is asked for on use.

What is packed, and a linear with zeros that are to stay, cannot take a product in: the sum is
neither on the grid nor zero where it was.

Paper: LoRA, arXiv:2106.09685, section 4.1: W + (alpha / rank) B A, B beginning with zeros.
"""

import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from unicomp.compress.distill.training.student import PRUNED, Student
from unicomp.compress.distill_method import check_adapters
from unicomp.errors import UnsupportedError


def attach(student: Student, *, rank: int, alpha: int, seed: int) -> Student:
    """Freeze a student and let adapters of this rank learn; `settle` adds them to the weights.

    Raises UnsupportedError for weights that cannot take them in, and where peft is missing.
    """
    check_adapters(student.packed)
    import peft

    linears = _linears(student)
    for path, linear in linears.items():
        if float((linear.weight == 0).float().mean()) >= PRUNED:
            raise UnsupportedError(
                f"`{path}` has zeros that would not stay zero under `lora_rank`",
                hint="train all weights (leave out `lora_rank`), whose zeros stay",
            )
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        bias="none",
        target_modules=sorted(linears),
        fan_in_fan_out=any(isinstance(linear, Conv1D) for linear in linears.values()),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers by an old name
        torch.manual_seed(seed)
        return replace(student, adapters=peft.get_peft_model(student.model, config))


def _linears(student: Student) -> dict[str, Any]:
    """Return path -> module of the linears that the checkpoint stores, but for the head."""
    head = student.model.get_output_embeddings()
    stored = {path.removesuffix(".weight") for path in student.places.values()}
    return {
        path: module
        for path, module in student.model.named_modules()
        if path in stored and isinstance(module, nn.Linear | Conv1D) and module is not head
    }

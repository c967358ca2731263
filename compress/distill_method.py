"""What every method of distillation has: a teacher, a text, losses, and how it is trained."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from unicomp.compress.method import Method
from unicomp.errors import UnsupportedError

# What won most, or KL within an eighth of it, on models of width 64 to 128 (adapters: a fifth;
# benchmarks/results/distillation_rates.json); beyond, the rate of Adam falls as the width grows
# (muP, arXiv:2203.03466, table 3).
RATE, COARSE_RATE, WIDTH, COARSE_BITS = 1e-3, 3e-3, 128, 4


def usual_rate(*, width: int, coarse: bool) -> float:
    """Return the learning rate where none is said.

    width   of the states between layers
    coarse  what learns are weights of few bits, which a small step does not move from one code to
            the next, or adapters, which begin at zero
    """
    return (COARSE_RATE if coarse else RATE) * min(1.0, WIDTH / width)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How text that the student writes itself enters its training.

    share   of the windows of the training, 0 to 1
    prompt  share of such a window that is given; the student writes the rest
    beta    of the divergence on what it wrote, as the option of that name
    """

    share: float
    prompt: float
    beta: float


class DistillMethod(Method):
    """A method of the verb `distill`: a student, a teacher and a text in, a better student out.

    Every loss is a mean over the positions that count, in nats where it is a divergence.
    """

    declares: ClassVar[bool] = True

    teacher: str | None = Field(
        None,
        min_length=1,
        description="the model to learn from: a folder, a Hub id `org/name[@revision]` or "
        "`builtin:NAME`; default: the recipe's model as it was before any stage",
    )
    data: str | None = Field(
        None,
        min_length=1,
        description="text to train on; default: the recipe's calibration text, all of it",
    )
    field: str = Field("text", min_length=1, description="field of each record that holds the text")
    seq_len: int | None = Field(
        None, description="tokens per window; default 512, or the model's context if shorter"
    )
    packed: bool = Field(
        True, description="one run of tokens cut into windows; else each document has its own"
    )
    answers_only: bool = Field(
        False, description="of records with `messages`, learn what the assistant says only"
    )
    held_out: str | None = Field(
        None,
        min_length=1,
        description="text that is measured on and never trained on; default: the last tenth of "
        "the windows, at most 64; of `builtin:tinyworld` its held-out text",
    )
    max_steps: int | None = Field(
        None,
        description="steps at most; default: `passes` over the text; 0 where only layers are "
        "trained (`layer_steps`)",
    )
    max_tokens: int | None = Field(None, description="tokens at most")
    max_time: float | None = Field(None, description="seconds at most")
    passes: int = Field(
        4, ge=1, le=100_000, description="passes over the text where no steps are said"
    )
    batch: int = Field(16, ge=1, le=1 << 16, description="windows of a step, over all processes")
    micro_batch: int = Field(8, ge=1, le=1 << 16, description="windows in memory at once, at most")
    rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="highest learning rate; default 1e-3, of weights of 4 bits or fewer and of "
        "adapters 3e-3; divided by how many times wider than 128 the model is",
    )
    warmup: float = Field(
        0.05, ge=0, le=1, description="share of the steps on which the rate rises"
    )
    final_rate: float = Field(
        0.05, ge=0, le=1, description="share of the rate that is left at the end of the cosine"
    )
    weight_decay: float = Field(0.0, ge=0, le=1, description="decay of matrices, AdamW's")
    clip: float = Field(1.0, gt=0, description="longest gradient; longer ones are shortened to it")
    lora_rank: int | None = Field(
        None,
        description="train adapters of this rank beside each linear, and nothing else; they are "
        "added to the weights at the end",
    )
    lora_alpha: int = Field(16, ge=1, description="adapters count this much, divided by their rank")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="of activations; weights are trained in float32"
    )
    gradient_checkpointing: bool = Field(
        False, description="compute each layer twice to hold fewer activations"
    )
    beta: float = Field(
        0.0, ge=0, le=1, description="divergence: 0 forward KL, 1 reverse KL, between: JSD"
    )
    temperature: float = Field(1.0, gt=0, le=100, description="softens teacher and student alike")
    cross_entropy: float = Field(
        0.0, ge=0, le=1, description="share of the text's own tokens in the loss"
    )
    hidden: float = Field(0.0, ge=0, description="weight of matching hidden states, layer by layer")
    attention: float = Field(0.0, ge=0, description="weight of matching what attention adds")
    safety: float = Field(
        0.0, ge=0, description="weight of keeping the teacher's word on how refusals begin"
    )
    calibration_term: float = Field(
        0.0, ge=0, description="weight of the gap between confidence and accuracy of each window"
    )
    cache_teacher: str | None = Field(
        None,
        min_length=1,
        description="folder that the teacher's likeliest tokens are stored in, once, so that the "
        "teacher is not in memory during training",
    )
    top_k: int = Field(64, ge=1, le=1 << 20, description="tokens that `cache_teacher` stores")
    scales: Literal["learned", "absmean"] = Field(
        "learned", description="scales of packed weights; `absmean` is for ternary ones"
    )
    shadow: Literal["codes", "teacher"] = Field(
        "codes",
        description="what packed weights begin from: their codes, or the teacher's weights",
    )
    gradual: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the steps in which packed weights go over from plain to rounded",
    )
    layer_steps: int = Field(
        0,
        ge=0,
        le=1 << 20,
        description="steps in which each layer, one after the other, first learns to give what the "
        "teacher's gives; one layer is then in memory at a time",
    )
    filter_gradients: bool = Field(
        False, description="leave out windows whose gradient is far longer than the median"
    )
    early_stop: Literal["none", "nll", "ece"] = Field(
        "none", description="stop where this held-out figure no longer falls, and keep the best"
    )
    measure_every: int = Field(50, ge=1, description="steps between two held-out measurements")
    checkpoint_every: int = Field(50, ge=1, description="steps between two checkpoints")
    seed: int = Field(0, ge=0, lt=1 << 31, description="seed of the order, and of all draws")

    @model_validator(mode="after")
    def _trainable(self) -> Self:
        bounds = {
            "max_steps": None if self.max_steps == 0 and self.layer_steps else self.max_steps,
            "max_tokens": self.max_tokens,
            "seq_len": self.seq_len,
            "lora_rank": self.lora_rank,
        }
        for name, value in bounds.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` should be at least 1")
        if self.max_time is not None and self.max_time <= 0:
            raise ValueError("`max_time` should be above 0")
        if self.layer_steps and self.lora_rank is not None:
            raise ValueError("`layer_steps` trains weights, `lora_rank` leaves them as they are")
        stored = self.cache_teacher is not None
        if stored and (self.hidden or self.attention or self.safety):
            raise ValueError(
                "`cache_teacher` stores likeliest tokens, not what `hidden`, `attention` and "
                "`safety` compare"
            )
        return self

    @property
    def highest_rate(self) -> float:
        """The learning rate; ValueError where nobody has worked out yet what is not said."""
        if self.rate is None:
            raise ValueError("`rate` is not settled")
        return self.rate

    def settled(self, *, width: int, bits: int | None) -> Self:
        """Return the same with its learning rate, which follows from what is trained.

        width  of the states between layers
        bits   fewest of a packed weight; None: none is packed
        """
        if self.rate is not None:
            return self
        coarse = self.lora_rank is not None or (bits is not None and bits <= COARSE_BITS)
        return self.model_copy(update={"rate": usual_rate(width=width, coarse=coarse)})

    def sampling(self) -> Sampling | None:
        """Return how text of the student's own is trained on; None: none is."""
        return None


def check_adapters(packed: Iterable[str]) -> None:
    """Refuse `lora_rank` where peft is missing, and for a student with packed modules.

    Raises UnsupportedError.
    """
    if importlib.util.find_spec("peft") is None:
        raise UnsupportedError(
            "`lora_rank` needs the package `peft`", hint="`pip install 'unicomp[lora]'`"
        )
    for module in packed:
        raise UnsupportedError(
            f"`{module}` is packed: what `lora_rank` trains cannot be added to codes",
            hint="distil the plain model with `lora_rank`, then quantize it; or leave the option "
            "out",
        )

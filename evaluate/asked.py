"""What is asked of a score, and how it is to be run: the two halves of the command's options."""

from collections.abc import Sequence
from dataclasses import dataclass

from unicomp import suggest
from unicomp.errors import UnicompError
from unicomp.kernels.blocked import Compute

AXES = ("accuracy", "fidelity", "calibration", "safety", "efficiency")
ALONE = ("accuracy", "fidelity", "efficiency")  # without a suite or tasks
BY = ("position", "layer")


@dataclass(frozen=True, slots=True)
class What:
    """What is measured.

    axes             of `AXES`; None: all with a suite or tasks, else `ALONE`
    suite            `quick`, `standard` or `full`
    tasks            names of ours or of lm-eval's, or files: a task's `.yaml`, or rows (`.jsonl`,
                     `.txt`)
    text             what to predict, as the contract's TEXT; None: the suite's, else
                     `builtin:tinyworld` where the model is a builtin
    field            of a record of that text
    seq_len          tokens of a window; None: the model's context, at most 2048
    limit            at most this many windows, drawn by `seed`, and the first so many documents of
                     a task; None: all
    bos              a BOS token before each window; None: where the tokenizer puts one by default
    harmful, benign  prompts for safety: to refuse, and safe ones that look like them; a `.txt` or
                     `.jsonl` file each. None: the suite's
    judge            a model that tells refusals in place of the rules; as `model`
    by               some of `BY`: say where the model departs from the baseline, too

    Raises UnicompError for words that mean nothing.
    """

    axes: Sequence[str] | None = None
    suite: str | None = None
    tasks: Sequence[str] = ()
    text: str | None = None
    field: str = "text"
    seq_len: int | None = None
    limit: int | None = None
    seed: int = 0
    bos: bool | None = None
    harmful: str | None = None
    benign: str | None = None
    judge: str | None = None
    by: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.axes is not None and not self.axes:
            raise UnicompError("no axes to score", hint=f"use some of {suggest.listed(AXES)}")
        for kind, words, known in (("axis", self.axes or (), AXES), ("detail", self.by, BY)):
            for word in words:
                if word not in known:
                    raise UnicompError(f"unknown {kind}: `{word}`", hint=suggest.hint(word, known))
        if self.limit is not None and self.limit < 1:
            raise UnicompError(
                f"limit {self.limit} leaves nothing to score", hint="use 1 or more windows"
            )

    def all_axes(self) -> Sequence[str]:
        """Return the axes that are measured, asked for or not."""
        if self.axes is not None:
            return self.axes
        return AXES if self.suite is not None or self.tasks else ALONE


@dataclass(frozen=True, slots=True)
class How:
    """How it is measured.

    compute     `int8` or `exact`: leave the model's weights packed, as `unicomp.load` does; None:
                dequantize them. The baseline is always dequantized
    batch_size  requests of a task at once; None: as many as fit
    shots       examples in front of a task's question; None: as the task has it
    chat        put tasks' prompts into the chat template
    power       watts that the machine takes while a model decodes, for an estimate of its energy
                where no meter can be read
    resume      use what an interrupted score of the same things has kept
    """

    compute: Compute | None = None
    batch_size: int | None = None
    shots: int | None = None
    chat: bool = False
    power: float | None = None
    resume: bool = True

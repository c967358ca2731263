"""What the teacher says of windows: asked each time, or stored once and read back.

A stored teacher is a folder of the k likeliest tokens of every position, with the mass of all the
others, for every training and held-out window. It is made before training, when the student is not
in memory yet, and knows what it was made of: another teacher, other windows, another temperature or
another k is refused.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from unicomp.compress.distill.losses.few import keep_few
from unicomp.compress.distill.training.figures import entropy
from unicomp.compress.distill.training.states import States, watch
from unicomp.compress.distill.training.windows import Windows
from unicomp.errors import UnicompError
from unicomp.writer import Meta, Writer, write_file

SCHEMA = "unicomp.teacher/1"
NAME = "teacher.json"
PARTS = ("training", "held_out")


@dataclass(frozen=True, slots=True)
class Signal:
    """What a teacher says of some windows, at the positions before each next token.

    logits   floating [windows, positions, vocab]; None where only few tokens are known
    few      log-probabilities and ids as `losses.few.keep_few` gives them, at the temperature of
             training, of held-out windows at 1
    entropy  float [windows, positions], at temperature 1; where `few`
    states   of its layers, where they were asked for
    """

    logits: Tensor | None = None
    few: tuple[Tensor, Tensor] | None = None
    entropy: Tensor | None = None
    states: States | None = None


class Teacher(Protocol):
    """Whoever can be asked about windows."""

    def training(self, rows: Tensor, ids: Tensor, *, states: tuple[str, ...] = ()) -> Signal:
        """Return the signal of training windows; rows are their numbers, ids int64 [n, tokens]."""

    def held_out(self, rows: Tensor, ids: Tensor) -> Signal:
        """Return that of held-out windows."""


@dataclass(frozen=True, slots=True)
class LiveTeacher:
    """A teacher in memory, asked each time."""

    model: PreTrainedModel

    @torch.no_grad()
    def training(self, rows: Tensor, ids: Tensor, *, states: tuple[str, ...] = ()) -> Signal:
        """Run the windows through the model; `rows` does not matter."""
        with watch(self.model, states) as seen:
            logits = self.model(ids, use_cache=False).logits
        return Signal(logits=logits[:, :-1], states=seen)

    def held_out(self, rows: Tensor, ids: Tensor) -> Signal:
        """Run the windows through the model."""
        return self.training(rows, ids)


class StoredTeacher:
    """A teacher whose answers lie in a folder."""

    def __init__(self, folder: Path, wanted: Mapping[str, Any]) -> None:
        """Open what `store` made.

        Raises UnicompError where it is not whole, or was made of anything else than `wanted`.
        """
        self._folder = folder
        try:
            found = json.loads((folder / NAME).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UnicompError(
                f"`{folder}` holds no whole teacher cache", hint="remove it, and it is made anew"
            ) from error
        words = {
            "teacher": "another teacher",
            "training": "another training text, `seq_len` or packing",
            "held_out": "another held-out text",
            "temperature": "another `temperature`",
            "top_k": "another `top_k`",
        }
        other = [word for key, word in words.items() if found.get(key) != wanted[key]]
        if found.get("schema") != SCHEMA or other:
            raise UnicompError(
                f"the teacher cache `{folder}` was made with "
                + (", ".join(other) or "another layout"),
                hint="give another folder to `cache_teacher`, or remove this one",
            )
        self._file: Any = safe_open(folder / "model.safetensors", framework="pt")

    def training(self, rows: Tensor, ids: Tensor, *, states: tuple[str, ...] = ()) -> Signal:
        """Read what is stored of these windows."""
        if states:
            raise ValueError("inner states are not stored")
        return self._read("training", rows)

    def held_out(self, rows: Tensor, ids: Tensor) -> Signal:
        """Read what is stored of these windows."""
        return self._read("held_out", rows)

    def _read(self, part: str, rows: Tensor) -> Signal:
        def some(name: str) -> Tensor:
            stored = self._file.get_slice(f"{part}.{name}")
            return torch.cat([stored[row : row + 1] for row in rows.tolist()])

        return Signal(few=(some("log_p"), some("ids").long()), entropy=some("entropy"))


def identity(
    hashes: Mapping[str, str],
    training: Windows,
    held_out: Windows,
    *,
    temperature: float,
    top_k: int,
) -> dict[str, Any]:
    """Return what decides a cache's content; hashes are those of the teacher's files."""
    return {
        "teacher": hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest(),
        "training": training.digest,
        "held_out": held_out.digest,
        "temperature": temperature,
        "top_k": top_k,
    }


@torch.no_grad()
def store(
    folder: Path,
    model: PreTrainedModel,
    windows: Mapping[str, Windows],
    made_of: Mapping[str, Any],
    *,
    batch: int,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> None:
    """Ask a teacher about all windows and store it; the folder counts only when it is whole.

    windows  `training` and `held_out`
    made_of  as `identity` returns it
    """
    vocab = int(model.config.get_text_config().vocab_size)
    k, temperature = min(int(made_of["top_k"]), vocab), float(made_of["temperature"])
    metas = []
    for part in PARTS:
        count, positions = windows[part].counted.shape
        classes = k if k == vocab else k + 1
        metas += [
            Meta(f"{part}.log_p", "F32", (count, positions, classes)),
            Meta(f"{part}.ids", "I32", (count, positions, k)),
            Meta(f"{part}.entropy", "F32", (count, positions)),
        ]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnicompError(
            f"cannot make `{folder}`: {error.strerror}", hint="choose another `cache_teacher`"
        ) from error
    writer = Writer(folder, metas, max_shard_bytes=1 << 62)
    done, total = 0, sum(len(windows[part]) for part in PARTS)
    for part in PARTS:
        heat = temperature if part == "training" else 1.0  # figures are at temperature 1
        for start in range(0, len(windows[part]), batch):
            ids = windows[part].ids[start : start + batch]
            rows = slice(start, start + len(ids))
            logits = model(ids, use_cache=False).logits[:, :-1]
            values, tokens = keep_few(logits, k, temperature=heat)
            writer.write(f"{part}.log_p", values, rows)
            writer.write(f"{part}.ids", tokens.to(torch.int32), rows)
            spread = entropy(torch.log_softmax(logits.float(), -1))
            writer.write(f"{part}.entropy", spread, rows)
            done += len(ids)
            progress(done, total)
    writer.finish()
    write_file(folder / NAME, json.dumps({"schema": SCHEMA, **made_of}, indent=1).encode())

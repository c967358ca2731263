"""Training text: windows of token ids, which positions count, and in which order they come.

Packed text is one run of tokens cut into windows that do not overlap; unpacked, each document
begins a window of its own, and what is left of the window does not count. Of conversations only
the answers may count: what the user says is context. A text that is also a held-out text is
refused, whole or by a document of it.

The order is a function of the seed and the step alone, so a run that is resumed, or shared out over
processes, meets the same windows in the same steps.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unicomp import text
from unicomp.errors import UnicompError
from unicomp.text import Text

LEAST_DOCUMENT = 16  # characters: shorter documents may be the same by chance


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of a text.

    ids      int64 [windows, tokens]
    counted  bool [windows, tokens - 1]: whether the prediction of the next token counts
    source   what the user wrote; of a file, its name
    sha256   of the text's files
    """

    ids: Tensor
    counted: Tensor
    source: str
    sha256: str

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.ids)

    def part(self, rows: Tensor) -> "Windows":
        """Return some of them; rows int64 [windows]."""
        return Windows(self.ids[rows], self.counted[rows], self.source, self.sha256)

    @property
    def digest(self) -> str:
        """Hash of the ids and of what counts."""
        parts = self.ids.numpy().tobytes(), self.counted.numpy().tobytes()
        return hashlib.sha256(b"".join(parts)).hexdigest()


def packed(tokenizer: Any, found: Text, *, vocab: int, seq_len: int) -> Windows:
    """Cut a text into whole windows, every position of which counts.

    Raises UnicompError if it has not one.
    """
    ids = text.encode(tokenizer, found, vocab=vocab)
    bos = text.bos_token(tokenizer)
    source = f"training text `{found.source}`"
    cut = text.windows(ids, seq_len=seq_len, samples=None, seed=0, bos=bos, source=source)
    counted = torch.ones(len(cut), seq_len - 1, dtype=torch.bool)
    return Windows(cut, counted, found.source, found.sha256)


def unpacked(tokenizer: Any, found: Text, *, vocab: int, seq_len: int) -> Windows:
    """Give each document windows of its own; the end of its last one is padding."""
    bos = text.bos_token(tokenizer)
    rows = []
    for document in found.documents:
        one = Text(found.source, [document], found.sha256)
        ids = text.encode(tokenizer, one, vocab=vocab).tolist()
        rows.append(
            ([*([] if bos is None else [bos]), *ids], [True] * (len(ids) + (bos is not None)))
        )
    return _padded(rows, found.source, found.sha256, seq_len)


def answers(
    tokenizer: Any,
    conversations: Iterable[Sequence[dict[str, Any]]],
    *,
    source: str,
    sha256: str,
    vocab: int,
    seq_len: int,
) -> Windows:
    """Give each conversation windows of its own, in which only the assistant's tokens count.

    conversations  lists of messages with `role` and `content`, for the tokenizer's chat template

    Raises UnicompError if no conversation has an answer, or if the template writes the beginning
    of a conversation otherwise when more follows.
    """
    rows = []
    for messages in conversations:
        ids: list[int] = []
        marks: list[bool] = []
        for index, message in enumerate(messages):
            if message.get("role") != "assistant":
                continue
            before = _template(tokenizer, messages[:index], prompt=True)
            after = _template(tokenizer, messages[: index + 1], prompt=False)
            if after[: len(before)] != before or before[: len(ids)] != ids:
                raise UnicompError(
                    f"training text `{source}`: the chat template writes a conversation's "
                    "beginning otherwise once more follows, so answers cannot be told apart",
                    hint="leave out `answers_only`, or mend the tokenizer's chat template",
                )
            marks += [False] * (len(before) - len(ids)) + [True] * (len(after) - len(before))
            ids = after
        if any(marks):
            rows.append((ids, marks))
    if not rows:
        raise UnicompError(
            f"training text `{source}` has no answer",
            hint="each record needs `messages` with the role `assistant`",
        )
    worst = max(max(ids) for ids, _ in rows)
    if worst >= vocab:
        raise UnicompError(f"training text `{source}` has token {worst}, the model {vocab}")
    return _padded(rows, source, sha256, seq_len)


def _template(tokenizer: Any, messages: Sequence[dict[str, Any]], *, prompt: bool) -> list[int]:
    written = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=prompt
    )
    ids: list[int] = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _padded(
    rows: Sequence[tuple[list[int], list[bool]]], source: str, sha256: str, seq_len: int
) -> Windows:
    """Cut rows of (ids, whether each token is one to learn) into windows; what is short is padded.

    The padding stands behind, where no earlier position sees it, and does not count.
    """
    ids, counted = [], []
    for tokens, marks in rows:
        for start in range(0, max(1, len(tokens) - 1), seq_len - 1):
            some, learnt = tokens[start : start + seq_len], marks[start : start + seq_len]
            short = seq_len - len(some)
            if len(some) < 2 or not any(learnt[1:]):
                continue
            ids.append(some + [some[-1]] * short)
            counted.append(learnt[1:] + [False] * short)
    if not ids:
        raise UnicompError(
            f"training text `{source}` has no document of two tokens", hint="give a longer text"
        )
    return Windows(torch.tensor(ids), torch.tensor(counted), source, sha256)


def refuse_held_out(training: Text, held_out: Text) -> None:
    """Refuse to train on what is measured on: the same file, or a document that stands in both.

    Raises UnicompError, naming both.
    """
    if training.sha256 == held_out.sha256:
        raise UnicompError(
            f"the training text `{training.source}` is the held-out text `{held_out.source}`",
            hint="train on another text, or measure on another with `held_out`",
        )
    known = {_hash(document) for document in held_out.documents if _long(document)}
    shared = sum(_hash(document) in known for document in training.documents if _long(document))
    if shared:
        raise UnicompError(
            f"{shared} documents of the training text `{training.source}` stand in the held-out "
            f"text `{held_out.source}` too",
            hint="leave them out of one of the two",
        )


def _long(document: str) -> bool:
    return len(document.strip()) >= LEAST_DOCUMENT


def _hash(document: str) -> bytes:
    return hashlib.sha256(document.strip().encode()).digest()


def split(windows: Windows, held: int) -> tuple[Windows, Windows]:
    """Return the windows without the last `held`, and these: a text's end is kept out of training.

    Between the two a window is left out where there is room, so that no sentence is in both.
    """
    count = len(windows)
    gap = 1 if count > 2 * held + 1 else 0
    return (
        windows.part(torch.arange(count - held - gap)),
        windows.part(torch.arange(count - held, count)),
    )


def batches(count: int, size: int, seed: int, first: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (step, rows of its windows, int64 [size]) without end, from step `first` on.

    Every pass over the windows has an order of its own; what does not fill a batch waits for the
    next pass, of which other windows are left.
    """
    each = count // size
    step = first
    while True:
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step // each)
        order = torch.randperm(count, generator=draw)
        while True:
            place = step % each
            yield step, order[place * size : (place + 1) * size]
            step += 1
            if step % each == 0:
                break

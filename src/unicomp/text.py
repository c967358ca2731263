"""Text in, windows of token ids out: what calibration and scoring read.

A text is a `.txt`, `.jsonl` or `.parquet` file, `builtin:tinyworld`, or a Hub dataset. It is read
once, tokenized once and cut into consecutive windows that do not overlap, so that two models
scored on one text see the same tokens at the same places.

Documents are joined by an empty line, and tokenized as one run. A BOS token stands before each
window only where the tokenizer itself puts one first; it is context and is never predicted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from unicomp.errors import CheckpointError, UnicompError
from unicomp.folder import check_regular
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

Purpose = Literal["calibration", "score"]

SUFFIXES = (".txt", ".jsonl", ".parquet")
SEPARATOR = "\n\n"
_CHUNK = 1 << 20  # characters tokenized in one call; a fast tokenizer holds ~200 bytes a token


@dataclass(frozen=True, slots=True)
class Text:
    r"""A text as it was read, before any tokenizer.

    source     what the user wrote; of a local file, its name without the folder
    documents  at least one, none of them empty; line ends of a `.txt` file are `\n`
    sha256     of the bytes of the file (of several files: of their bytes one after another)
    """

    source: str
    documents: list[str]
    sha256: str


def read(
    spec: str,
    *,
    field: str = "text",
    tokenizer: Any | None = None,
    purpose: Purpose = "calibration",
    max_bytes: int | None = None,
) -> Text:
    """Read the text that `spec` names.

    spec       a `.txt`, `.jsonl` or `.parquet` file, `builtin:tinyworld`, or
               `hub:org/name[:config][/split]`
    field      of a record; a list of messages goes through the tokenizer's chat template, and
               `messages` is taken where the default field is absent
    tokenizer  needed for messages only
    purpose    which text `builtin:tinyworld` stands for: its calibration text or its held-out one
    max_bytes  stop after the first document that reaches this many UTF-8 bytes in all; a `.txt`
               file is one document and is read whole

    Raises UnicompError if the text cannot be read, is empty, or has no such field.
    """
    source, files = _files(spec, purpose)
    digest = hashlib.sha256()
    for file in files:
        try:
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
        except OSError as error:
            raise UnicompError(
                f"cannot read text `{file}`: {error.strerror or error}",
                hint=f"name a {_suffixes()} file, `builtin:tinyworld` or `hub:org/name`",
            ) from error
    documents: list[str] = []
    size = 0
    for document in (d for file in files for d in _documents(file, field, tokenizer)):
        if max_bytes is not None and size >= max_bytes:
            break
        if document.strip():
            documents.append(document)
            size += len(document.encode())
    if not documents:
        raise UnicompError(
            f"text `{source}` is empty", hint="give a file with text in it, or another `--field`"
        )
    return Text(source, documents, digest.hexdigest())


def conversations(spec: str, *, field: str = "messages") -> Iterator[list[dict[str, Any]]]:
    """Yield the messages of each record, before any chat template.

    field  that holds them; `messages` is taken where the default field of texts is named

    Raises UnicompError for a text that is not of records, or a record without messages.
    """
    source, files = _files(spec, "calibration")
    name = "messages" if field == "text" else field
    for file in files:
        if file.suffix == ".txt":
            raise UnicompError(
                f"text `{source}` has no messages", hint="give a `.jsonl` or `.parquet` file"
            )
        records = _jsonl(file) if file.suffix == ".jsonl" else _parquet(file, name)
        for place, record in records:
            value = record.get(name)
            if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
                raise UnicompError(
                    f"{place}: field `{name}` holds no messages",
                    hint="each is a list of objects with `role` and `content`",
                )
            yield value


def tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a checkpoint folder; never runs code from that folder.

    Raises CheckpointError if the folder has none, or a broken one.
    """
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
    if not any((folder / name).is_file() for name in names):
        raise CheckpointError(
            f"no tokenizer in `{folder}`",
            hint="copy `tokenizer.json` and `tokenizer_config.json` of the model into that folder",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain `Exception` on a broken file
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"cannot load the tokenizer of `{folder}`: {reason[0] if reason else error!r}",
            hint="check `tokenizer.json` and `tokenizer_config.json` against the original model's",
        ) from error


def encode(tokenizer: Any, text: Text, *, vocab: int) -> Tensor:
    """Return the ids of all documents, joined by an empty line, int64 [tokens].

    Special tokens that are written out in the text are parsed; none is added.
    vocab  size of the model's embedding

    Raises CheckpointError if an id does not fit the embedding.
    """
    parts: list[int] = []
    for chunk in _chunks(text.documents):
        parts += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(parts, dtype=torch.int64)
    if ids.numel() and int(ids.max()) >= vocab:
        worst = int(ids.max())
        token = tokenizer.convert_ids_to_tokens(worst)
        raise CheckpointError(
            f"the tokenizer does not fit the model: token `{token}` has id {worst},"
            f" but `vocab_size` is {vocab}",
            hint="use the tokenizer files that came with this model",
        )
    return ids


def token_bytes(tokenizer: Any, text: Text) -> Tensor | None:
    """Return how many UTF-8 bytes of the source each token of `encode` stands for, int64 [tokens].

    A token has the bytes from the end of the token before it to its own end, so the sum over any
    run of tokens is the length of the source between its ends: nothing counts twice, and a
    character split over several tokens counts once, at its first. Spelt-out special tokens count
    as written. None where the tokenizer cannot say where a token stands (one in pure Python).
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    # Here, not above: plans import this file, and are to be quick.
    import numpy as np

    parts: list[Tensor] = []
    for chunk in _chunks(text.documents):
        coded = tokenizer(
            chunk, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        stops = np.array([stop for _, stop in coded["offset_mapping"]], dtype=np.int64)
        if not stops.size:
            continue
        points = np.frombuffer(chunk.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
        bytes_before = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
        ends = bytes_before[np.maximum.accumulate(stops)]
        parts.append(torch.from_numpy(np.diff(ends, prepend=0)))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def windows(
    ids: Tensor,
    *,
    seq_len: int,
    samples: int | None,
    seed: int,
    bos: int | None,
    source: str = "the text",
) -> Tensor:
    """Cut ids into consecutive windows that do not overlap, int64 [n, seq_len].

    ids      int64 [tokens]; what is left after the last whole window is dropped
    samples  None: all windows; else this many, drawn by `seed` without replacement, in text order
    bos      put before each window, which then holds seq_len - 1 tokens of the text

    Raises UnicompError if there are fewer windows than asked for.
    """
    if seq_len < 2:
        raise UnicompError(
            f"seq_len {seq_len} is too short: a window predicts its next token",
            hint="use a seq_len of 2 or more",
        )
    fresh = seq_len if bos is None else seq_len - 1
    count = ids.numel() // fresh
    if ids.numel() == 0:
        raise UnicompError(f"{source} is empty", hint="give a text with words in it")
    if count == 0:
        raise UnicompError(
            f"{source} has {ids.numel()} tokens, but one window needs {fresh}",
            hint=f"give a longer text, or a `seq_len` of at most {ids.numel() + seq_len - fresh}",
        )
    if samples is not None and samples > count:
        raise UnicompError(
            f"{source} has {count} windows of {seq_len} tokens, but `samples` is {samples}",
            hint=f"give a longer text, or use `samples: {count}` or a shorter `seq_len`",
        )
    cut = ids[: count * fresh].reshape(count, fresh)
    if samples is not None:
        generator = torch.Generator().manual_seed(seed)
        cut = cut[torch.randperm(count, generator=generator)[:samples].sort().values]
    if bos is None:
        return cut.clone()
    return torch.cat([torch.full((len(cut), 1), bos, dtype=ids.dtype), cut], dim=1)


def bos_token(tokenizer: Any) -> int | None:
    """Return the id of the token that the tokenizer puts first by default, or None."""
    bos: int | None = tokenizer.bos_token_id
    if bos is None:
        return None
    first = tokenizer("a", verbose=False)["input_ids"][:1]
    return bos if first == [bos] else None


def _suffixes() -> str:
    return ", ".join(f"`{suffix}`" for suffix in SUFFIXES[:-1]) + f" or `{SUFFIXES[-1]}`"


def _files(spec: str, purpose: Purpose) -> tuple[str, list[Path]]:
    """Return how a text is called in a record, and the files that hold it."""
    if spec.startswith("builtin:"):
        from unicomp import builtin

        if spec != "builtin:tinyworld":
            raise UnicompError(f"unknown text `{spec}`", hint="the only one is `builtin:tinyworld`")
        file = builtin.calibration() if purpose == "calibration" else builtin.heldout("heldout.txt")
        return spec, [file]
    if spec.startswith("hub:"):
        from unicomp import hub

        files = [f for f in hub.dataset_files(spec) if f.suffix in SUFFIXES]
        if not files:
            raise UnicompError(
                f"dataset `{spec}` has no {_suffixes()} file",
                hint="name a dataset, config and split that is stored as parquet or jsonl",
            )
        return spec, files
    path = Path(spec).expanduser()
    if not path.exists():
        raise UnicompError(
            f"no such text: `{spec}`",
            hint=f"name a {_suffixes()} file, `builtin:tinyworld` or `hub:org/name`",
        )
    if path.is_dir() or path.suffix not in SUFFIXES:
        raise UnicompError(
            f"text `{spec}` is {'a folder' if path.is_dir() else 'of an unknown kind'}",
            hint=f"name a {_suffixes()} file",
        )
    check_regular(path)
    return path.name, [path]


def _documents(file: Path, field: str, tokenizer: Any | None) -> Iterator[str]:
    if file.suffix == ".txt":
        try:
            # As Python's text mode does: a CR that a model never saw costs it 10% perplexity.
            yield file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise UnicompError(
                f"text `{file}` is not UTF-8: byte {error.start}",
                hint="convert it, for example with `iconv -t utf-8`",
            ) from error
        return
    records = _jsonl(file) if file.suffix == ".jsonl" else _parquet(file, field)
    for place, record in records:
        yield _document(place, record, field, tokenizer)


def _document(place: str, record: dict[str, Any], field: str, tokenizer: Any | None) -> str:
    """Return the text of one record; empty where its field is null."""
    name = "messages" if field == "text" and field not in record else field
    if name not in record:
        there = ", ".join(f"`{key}`" for key in record) or "none"
        raise UnicompError(
            f"{place}: no field `{field}`", hint=f"the fields are {there}; choose with `--field`"
        )
    value = record[name]
    if value is None:
        return ""
    if isinstance(value, list):
        value = _chat(place, value, name, tokenizer)
    if not isinstance(value, str):
        raise UnicompError(
            f"{place}: field `{name}` is not text but {type(value).__name__}",
            hint="choose a field of strings or of messages with `--field`",
        )
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise UnicompError(
            f"{place}: field `{name}` holds half of a surrogate pair, which UTF-8 cannot say",
            hint="mend that record, or leave it out",
        )
    return value


def _chat(place: str, messages: list[Any], name: str, tokenizer: Any | None) -> str:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise UnicompError(
            f"{place}: field `{name}` holds messages, but the tokenizer has no chat template",
            hint="choose a field of plain text with `--field`, or a model with a chat template",
        )
    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is the model's own program: it may raise anything
        raise UnicompError(
            f"{place}: the chat template refuses these messages: {error}",
            hint="each message needs a `role` and a `content` that the model's template knows",
        ) from error


def _jsonl(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # UnicodeDecodeError and JSONDecodeError
                raise UnicompError(
                    f"{place}: not JSON: {error}", hint="a `.jsonl` file has one object a line"
                ) from error
            if not isinstance(record, dict):
                raise UnicompError(
                    f"{place}: not an object but {type(record).__name__}",
                    hint='each line is an object such as `{"text": "..."}`',
                )
            yield place, record


def _parquet(file: Path, field: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow as arrow  # type: ignore[import-untyped]
        from pyarrow import parquet
    except ImportError as error:
        raise UnicompError(
            f"reading `{file}` needs the package `pyarrow`", hint="`pip install pyarrow`"
        ) from error
    try:
        table = parquet.ParquetFile(file)
        columns = list(table.schema_arrow.names)
        wanted = "messages" if field == "text" and field not in columns else field
        if wanted not in columns:
            yield str(file), dict.fromkeys(columns)
            return
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[wanted]):
            for record in batch.to_pylist():
                yield f"{file}: row {row}", record
                row += 1
    except (arrow.ArrowException, OSError) as error:
        raise UnicompError(
            f"cannot read parquet file `{file}`: {error}", hint="download it again"
        ) from error


def _chunks(documents: list[str]) -> Iterator[str]:
    """Join documents by an empty line, in pieces that bound a tokenizer's memory.

    A piece ends after a separator, where no tokenizer that we know joins across.
    """
    part: list[str] = []
    size = 0
    for index, document in enumerate(documents):
        last = index == len(documents) - 1
        part.append(document if last else document + SEPARATOR)
        size += len(document)
        if size >= _CHUNK or last:
            yield "".join(part)
            part, size = [], 0

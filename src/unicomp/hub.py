"""Where a model or a data set comes from: a folder, the Hugging Face Hub, or the package itself.

The only file that imports huggingface_hub, and only when a name means the Hub. What was fetched
once is found again without a network; `HF_HOME`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` are honoured.
Only safetensors, JSON and tokenizer files are fetched: never pickles, never code.
"""

import glob
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from unicomp import size
from unicomp.errors import CheckpointError, UnicompError
from unicomp.folder import HEADER_LIMIT, INDEX, SINGLE, not_a_folder, parse_json, read_small

BUILTIN = "builtin:"
MODEL_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
DATASET = re.compile(r"hub:([\w.-]+/[\w.-]+)(?::([^/:]+))?(?:/([^/:]+))?", re.ASCII)

# Beside the weights; folders hold other formats of the same weights (onnx/, original/).
COMPANIONS = ["*.json", "*.model", "*.tiktoken", "*.jinja", "vocab.txt", "merges.txt"]
COMPANIONS += ["LICENSE*", "NOTICE*"]
ELSEWHERE = ["*/*", "adapter_*"]

# The branch on which the Hub keeps every public data set as `config/split/NNNN.parquet`.
CONVERTED = "refs/convert/parquet"
PATIENCE = 120  # seconds between two signs of life of a Hub that takes a push
DATA_LIMIT = 8_000_000_000
DATA_SUFFIXES = (".parquet", ".jsonl", ".txt")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder and what to call it in a record.

    id        `builtin:NAME`, the Hub id, or the folder's own name: no path of this machine
    revision  the Hub commit, else None
    """

    folder: Path
    id: str
    revision: str | None


def resolve(model: str) -> Source:
    """Return the folder of a model: `builtin:NAME`, a folder, `x.gguf`, or `org/name[@revision]`.

    A GGUF file is unpacked into a folder of the cache. A folder wins over a Hub id of the same
    spelling. From the Hub, what is not in the cache is fetched: configuration and tokenizer
    first, then the weights.

    Raises CheckpointError with what was looked for and where.
    """
    if model.startswith(BUILTIN):
        from unicomp import builtin

        return Source(builtin.model(model.removeprefix(BUILTIN)), model, None)
    folder = Path(os.path.expanduser(model))  # pathlib's raises for a user who does not exist
    if model and folder.is_dir():
        return Source(folder, folder.resolve().name, None)
    if folder.suffix == ".gguf" and folder.is_file():
        from unicomp import gguf_file

        return Source(gguf_file.folder_of(folder), folder.name, None)
    found = MODEL_ID.fullmatch(model)
    if not found:
        raise not_a_folder(folder) if model else CheckpointError("the model's name is empty")
    if folder.exists():
        raise not_a_folder(folder)
    name, revision = found.groups()
    with _said(name, revision, f"no folder `{model}` here, and no model"):
        return _fetch_model(name, revision)


def dataset_files(spec: str) -> list[Path]:
    """Return the files of one split of a Hub data set, in order, fetched if not in the cache.

    spec  `hub:org/name[:config][/split]`; config `default` or the only one, split `train`

    Raises UnicompError if there is no such data set, config or split, or too much of it.
    """
    found = DATASET.fullmatch(spec)
    if not found:
        raise UnicompError(
            f"not a data set: `{spec}`", hint="write `hub:org/name[:config][/split]`"
        )
    name, config, split = found.groups()
    with _said(name, None, "no data set"):
        for revision in (CONVERTED, "main"):
            sizes, folder = _list_dataset(name, revision)
            if sizes:
                break
        names = _choose(spec, sizes, config, split, converted=revision == CONVERTED)
        total = sum(sizes[file] for file in names)
        if total > DATA_LIMIT:
            raise UnicompError(
                f"`{spec}` is {size.show(total)} in {len(names)} files, "
                f"over the limit of {size.show(DATA_LIMIT)}",
                hint="name a smaller config or split, or download a part of it and give the file",
            )
        if folder is None:
            folder = _snapshot(name, revision, names, kind="dataset")
    return [folder / file for file in names]


def _fetch_model(name: str, revision: str | None) -> Source:
    folder = _snapshot(name, revision, COMPANIONS, ignore=ELSEWHERE)
    commit = folder.name
    index = folder / INDEX
    if index.is_file():
        weight_map = parse_json(index, read_small(index, HEADER_LIMIT)).get("weight_map") or {}
        weights = sorted({str(shard) for shard in weight_map.values()})
    else:
        weights = [SINGLE]
    wanted = [glob.escape(weight) for weight in weights if weight.endswith(".safetensors")]
    folder = _snapshot(name, commit, wanted)
    if not index.is_file() and not (folder / SINGLE).is_file():
        raise CheckpointError(
            f"`{name}` at revision `{commit}` has no safetensors weights",
            hint="pickle weights (`.bin`, `.pt`) can run code and are never loaded; use a "
            "repository or revision with safetensors, or convert it and give the folder",
        )
    return Source(folder, name, commit)


def _snapshot(
    name: str,
    revision: str | None,
    allow: list[str],
    *,
    ignore: list[str] | None = None,
    kind: str = "model",
    cached: bool = False,
) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        name,
        repo_type=kind,
        revision=revision,
        allow_patterns=allow,
        ignore_patterns=ignore,
        local_files_only=cached,
    )
    return Path(folder)


def _list_dataset(name: str, revision: str) -> tuple[dict[str, int], Path | None]:
    """Return file -> bytes of a revision, and the folder if only what is cached can be had."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().dataset_info(name, revision=revision, files_metadata=True)
        return {file.rfilename: file.size or 0 for file in info.siblings or []}, None
    except RepositoryNotFoundError:
        raise
    except RevisionNotFoundError:
        return {}, None
    except _unreachable() as error:
        try:
            folder = _snapshot(name, revision, ["-"], kind="dataset", cached=True)
        except LocalEntryNotFoundError:
            if revision == CONVERTED:
                return {}, None
            raise error from None
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}, folder


def _choose(
    spec: str, files: dict[str, int], config: str | None, split: str | None, *, converted: bool
) -> list[str]:
    names = sorted(name for name in files if name.endswith(DATA_SUFFIXES))
    if not converted:
        wanted = [word for word in (config, split or "train") if word is not None]
        chosen = [name for name in names if all(_has(name, word) for word in wanted)]
        if not chosen:
            there = ", ".join(f"`{name}`" for name in names[:8]) or "none"
            raise UnicompError(
                f"`{spec}`: no data file of {' and '.join(f'`{word}`' for word in wanted)}",
                hint=f"its data files: {there}",
            )
        suffix = Path(chosen[0]).suffix
        return [name for name in chosen if name.endswith(suffix)]
    parts = [name.split("/") for name in names if name.count("/") == 2]
    config = _one(spec, "config", config, "default", [part[0] for part in parts])
    splits = [part[1] for part in parts if part[0] == config]
    split = _one(spec, "split", split, "train", splits)
    return ["/".join(part) for part in parts if part[:2] == [config, split]]


def _one(spec: str, what: str, asked: str | None, usual: str, there: list[str]) -> str:
    known = sorted(set(there))
    chosen = asked if asked is not None else known[0] if len(known) == 1 else usual
    if chosen in known:
        return chosen
    shown = ", ".join(f"`{name}`" for name in known[:12]) or "none"
    form = "`hub:org/name:CONFIG`" if what == "config" else "`hub:org/name/SPLIT`"
    raise UnicompError(
        f"`{spec}`: no {what} `{chosen}`", hint=f"write {form}; there are {len(known)}: {shown}"
    )


def _has(name: str, word: str) -> bool:
    return re.search(rf"(^|[-_./]){re.escape(word)}([-_./]|$)", name) is not None


def push(
    folder: Path,
    files: list[str],
    name: str,
    *,
    private: bool,
    revision: str | None,
    create_pr: bool,
    message: str,
) -> str:
    """Send files of a folder to a model repository in one commit, made if it is not there.

    files     relative to the folder; nothing else is sent
    revision  a branch, made if it is not there; default `main`
    returns   the address of the commit or of the pull request

    Files that an interrupted push left on the Hub are not sent again. The token is whatever
    huggingface_hub finds in its own places; it is in no message of ours.

    Raises UnicompError in two lines for whatever the Hub refuses, and where it does not answer for
    two minutes, or for the seconds that `HF_HUB_DOWNLOAD_TIMEOUT` says.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _pushed(name), _patient():
        if not create_pr:
            api.create_repo(name, private=private, exist_ok=True)
        if revision is not None and not create_pr:
            api.create_branch(name, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=[glob.escape(file) for file in files],
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
        )
    return str(done.pr_url or done.commit_url)


@contextmanager
def _patient() -> Iterator[None]:
    """Bound how long the client waits for an answer: left alone, it waits for ever."""
    from huggingface_hub import constants, get_session

    asked = "HF_HUB_DOWNLOAD_TIMEOUT" in os.environ
    session = get_session()
    before = session.timeout
    session.timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT if asked else PATIENCE
    try:
        yield
    finally:
        session.timeout = before


@contextmanager
def _pushed(name: str) -> Iterator[None]:
    """Turn what a push raises into two lines, by the Hub's answer."""
    from huggingface_hub import errors

    again = "run the same command again: what arrived is not sent twice"
    hints = {
        401: "log in with `hf auth login`, or set `HF_TOKEN`",
        403: "this account may not write there: use another name, or `--create-pr`",
        404: "check the spelling; `--create-pr` needs a repository that is there",
        409: f"another commit came in between; {again}",
        413: "a file is larger than the Hub takes",
    }
    try:
        yield
    except errors.HFValidationError as error:
        raise UnicompError(f"`{name}` is no Hub id", hint="write `org/name`") from error
    except errors.LocalTokenNotFoundError as error:
        raise UnicompError(f"`{name}`: no token to write with", hint=hints[401]) from error
    except errors.OfflineModeIsEnabled as error:
        raise UnicompError(
            f"`{name}`: `HF_HUB_OFFLINE` is set, nothing was sent", hint="unset it"
        ) from error
    except _unreachable() as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        if status is None:
            kind = type(error).__name__
            raise UnicompError(
                f"`{name}`: the Hub does not answer ({kind})", hint=f"once it does, {again}"
            ) from error
        hint = hints.get(status, again if status >= 500 else "see the repository's settings")
        raise UnicompError(f"`{name}`: the Hub answers {status}", hint=hint) from error
    except RuntimeError as error:
        # A file's own upload is retried inside, and ends in a RuntimeError without the answer.
        raise UnicompError(f"`{name}`: a file could not be sent", hint=again) from error


def _unreachable() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises when nobody answers: the client's and the system's."""
    from huggingface_hub import errors

    transport: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return (transport, OSError)


@contextmanager
def _said(name: str, revision: str | None, absent: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into two lines."""
    from huggingface_hub import errors

    at = f" at revision `{revision}`" if revision else ""
    try:
        yield
    except UnicompError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"`{name}` is gated, and this account may not read it",
            hint="accept its terms on its page, then log in with `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{absent} `{name}` on the Hub",
            hint="check the spelling; for a private one, log in with `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"`{name}` has no revision `{revision}`",
            hint="use a branch, a tag or a commit of that repository",
        ) from error
    except errors.HFValidationError as error:
        raise CheckpointError(
            f"`{name}` is no Hub id: {error}", hint="write `org/name[@revision]`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{absent} `{name}`{at} in the Hub's cache, and the Hub cannot be reached",
            hint=_offline_hint(),
        ) from error
    except _unreachable() as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"`{name}`{at} cannot be fetched: {reason}", hint=_offline_hint()
        ) from error


def _offline_hint() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "`HF_HUB_OFFLINE` is set: unset it, or give a folder or `builtin:tinyworld`"
    return (
        f"check the network and the address `{constants.ENDPOINT}` (`HF_ENDPOINT`), "
        "or give a folder or `builtin:tinyworld`"
    )

"""The files of a checkpoint folder: which hold weights, which belong beside them, what is refused.

Hugging Face layout: `config.json`, and either `model.safetensors` or shards with
`model.safetensors.index.json`, which maps each tensor to its shard.
"""

import fnmatch
import json
import re
import shlex
from pathlib import Path
from typing import Any

from unicomp.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")

HEADER_LIMIT = 100_000_000
"""Longest header or index read, in bytes; the limit of the safetensors library."""

CONFIG_LIMIT = 10_000_000
"""Longest `config.json` read, in bytes."""

DAMAGED = "the file is damaged, or was written by a faulty tool: download or save it again"

# What belongs to a checkpoint beside its weights. Not here: the manifest, report and card of a run,
# which describe other files, and Python files, which nothing of ours executes.
_COMPANIONS = (
    "config.json", "generation_config.json", "*token*.json", "tekken.json", "vocab.*",
    "merges.txt", "normalizer.json", "*.model", "*.tiktoken", "chat_template.*",
    "additional_chat_templates/*.jinja", "*processor_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_weights(folder: Path) -> dict[str, str] | None:
    """Find the weights: None for a single file, else the index's map from tensor to shard."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
    shards = [name for name in names if SHARD.fullmatch(name)]
    if INDEX in names:
        indexed = _read_index(folder)
        named = set(indexed.values())
        if SINGLE in names and SINGLE not in named:
            raise CheckpointError(
                f"`{folder}`: holds both `{SINGLE}` and `{INDEX}`, which does not name it",
                hint="two checkpoints are mixed in one folder: remove the one you do not mean",
            )
        totals = {match[2] for match in map(SHARD.fullmatch, named) if match}
        for name in shards:
            if name not in named and name.split("-of-")[1][:5] in totals:
                raise CheckpointError(
                    f"`{folder}`: shard `{name}` is not named by `{INDEX}`",
                    hint="the index is not of these shards: download it again",
                )
        return indexed
    if SINGLE in names:
        return None
    if shards:
        raise CheckpointError(
            f"`{folder}`: `{INDEX}` is absent beside {len(shards)} shards (`{shards[0]}`, ...)",
            hint="the download may be incomplete: fetch the missing file",
        )
    raise _no_weights(folder, names)


def companions(folder: Path) -> list[str]:
    """Return the files that belong beside the weights: configuration, tokenizer, licence."""
    found = set()
    for pattern in _COMPANIONS:
        for path in folder.glob(pattern):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not fnmatch.fnmatch(name, "*.index.json"):
                found.add(name)
    return sorted(found)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json`, which must be an object and name the architecture."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"`{folder}`: weights without `config.json`",
            hint="the configuration names the architecture: fetch it from where the weights are",
        )
    try:
        config = json.loads(read_small(path, CONFIG_LIMIT).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}` is not JSON: {quote(str(error))}", hint="fetch or mend the file"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"`{path}` is not a JSON object", hint="fetch or mend the file")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"`{path}` has no `model_type`, which names the architecture",
            hint='add it, for example `"model_type": "llama"`, or convert the checkpoint to '
            "Hugging Face layout",
        )
    return config


def quote(name: str) -> str:
    """Return a name from a file in a form that is safe to print: no control codes, not endless."""
    shown = name if name.isprintable() else ascii(name)[1:-1]
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """Parse the JSON object of a header or index.

    A key that stands twice is an error, not a silent choice; so is text that is not UTF-8.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise CheckpointError(f"`{path}`: `{quote(key)}` stands twice", hint=DAMAGED)
            found[key] = value
        return found

    try:
        text = data.decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("it does not start with {")
        header: dict[str, Any] = json.loads(text, object_pairs_hook=unique)
        for name in header:
            name.encode("utf-8")  # JSON can spell half a character, which no file can hold
        return header
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"`{path}`: not a JSON object: {quote(str(error))}", hint=DAMAGED
        ) from error


def read_small(path: Path, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            if size > limit:
                raise CheckpointError(
                    f"`{path}`: {size} bytes are over the limit of {limit} bytes", hint=DAMAGED
                )
            return file.read(size)
    except OSError as error:
        raise unreadable(path, error) from error


def check_regular(path: Path) -> None:
    """Refuse what is no file before it is opened: opening a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"`{path}` is not a regular file", hint="put the file itself there")


def not_a_folder(folder: Path) -> CheckpointError:
    """Say what stands, or does not, where a checkpoint folder was expected."""
    if not folder.exists():
        return CheckpointError(
            f"`{folder}`: no such folder",
            hint="give a folder in Hugging Face layout, a Hub id or `builtin:tinyworld`",
        )
    return CheckpointError(
        f"`{folder}` is a file, not a folder",
        hint=f"give the folder that holds it: `{folder.parent}`",
    )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Turn an operating system's refusal to read into an error of ours."""
    return CheckpointError(
        f"`{path}` cannot be read: {error.strerror or error}",
        hint="check the file, its permissions and the disk",
    )


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX
    index = parse_json(path, read_small(path, HEADER_LIMIT))
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{path}`: no `weight_map` from tensor to shard", hint=DAMAGED)
    plain: set[str] = set()  # of ten thousands of tensors each shard is looked at once
    for name, shard in weight_map.items():
        if isinstance(shard, str) and (shard in plain or _plain_name(shard)):
            plain.add(shard)
        else:
            raise CheckpointError(
                f"`{path}`: shard of `{quote(name)}` is not a `.safetensors` file of this folder: "
                f"`{quote(str(shard))}`",
                hint="an index names files beside it, never a path or another kind of file",
            )
    return weight_map


def _plain_name(shard: str) -> bool:
    return (
        shard.endswith(".safetensors")
        and not shard.startswith(".")
        and shard.isprintable()
        and not set(shard) & set('/\\:*?"<>|')
    )


def _no_weights(folder: Path, names: list[str]) -> CheckpointError:
    """Say why a folder without safetensors weights is refused, and what to do about it."""
    pickles = [name for pattern in _PICKLES for name in fnmatch.filter(names, pattern)]
    if pickles:
        first = next((name for name in pickles if name.startswith("pytorch_model")), pickles[0])
        return CheckpointError(
            f"`{folder}`: only pickle weights (`{first}`), which can run code when loaded",
            hint=_conversion(folder, first),
        )
    if others := fnmatch.filter(names, "*.safetensors"):
        return CheckpointError(
            f"`{folder}`: no `{SINGLE}` and no `{INDEX}`, but `{others[0]}`",
            hint=f"if this is the whole model, rename it: `mv {others[0]} {SINGLE}`",
        )
    if gguf := fnmatch.filter(names, "*.gguf"):
        return CheckpointError(
            f"`{folder}`: only GGUF weights (`{gguf[0]}`)",
            hint=f"give the file itself: `{folder / gguf[0]}`",
        )
    if "config.json" in names:
        return CheckpointError(
            f"`{folder}`: `config.json` without weights",
            hint=f"fetch `{SINGLE}`, or `{INDEX}` and its shards",
        )
    return CheckpointError(
        f"`{folder}`: not a checkpoint: neither `config.json` nor `{SINGLE}`",
        hint="give a folder in Hugging Face layout",
    )


def _conversion(folder: Path, pickle: str) -> str:
    """Return one command that turns the pickle into safetensors without running its code."""
    if pickle.startswith("pytorch_model"):
        code = (
            "import sys; from transformers import AutoModelForCausalLM as M; "
            "M.from_pretrained(sys.argv[1], dtype='auto').save_pretrained(sys.argv[2])"
        )
        paths = [str(folder), f"{folder}-safetensors"]
        lead = "convert it, then copy the tokenizer's files"
    else:
        code = (
            "import sys, torch; from safetensors.torch import save_file; "
            "d = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
            "d = d.get('state_dict', d.get('model', d)); "
            "save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in d.items()}, "
            "sys.argv[2])"
        )
        paths = [str(folder / pickle), str(folder / SINGLE)]
        lead = "convert it"
    return f'{lead}: `python -c "{code}" {shlex.join(paths)}`'

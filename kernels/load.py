"""A checkpoint folder -> a transformers model with dense weights, whatever it is quantized with.

transformers makes the module tree and places the weights, so that its own rules hold for names,
experts, tied heads and buffers; each weight is read and dequantized when it is placed. The result
is the reference for what stock loaders make of the same files: nothing may be missing and nothing
left over.
"""

import contextlib
import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import EllipsisType

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from unicomp.checkpoint import DTYPES, Checkpoint
from unicomp.errors import CheckpointError, UnicompError, UnsupportedError
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.models import ARCHITECTURES


def load(path: Path | str, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a checkpoint folder in evaluation mode, on the CPU.

    dtype  of the model; codes are multiplied by their scales in float32 and rounded once to it

    Raises CheckpointError if the folder and the model that its config describes do not fit.
    """
    checkpoint = Checkpoint.open(Path(path))
    name = next((name for name, kind in DTYPES.items() if kind == dtype), None)
    if name not in ("F32", "F16", "BF16"):
        raise UnsupportedError(f"a model cannot be loaded as {dtype}", hint="use float32")
    source = open_dense(checkpoint, dtype=name)
    return build(source, dtype=dtype)


def build(source: DenseSource, *, dtype: torch.dtype) -> PreTrainedModel:
    """Make the model that a source's config describes and fill it; see `load`."""
    folder = source.checkpoint.folder
    if "model_type" not in source.config:
        raise CheckpointError(f"`{folder / 'config.json'}` has no `model_type`")
    named = {key: value for key, value in source.config.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(source.config["model_type"], **copy.deepcopy(named))
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
    except ValueError as error:
        raise UnsupportedError(
            f"`{folder / 'config.json'}`: transformers has no causal language model for it: {error}"
        ) from error
    errors: list[UnicompError] = []
    lazy = {
        name: _Lazy(source, name, errors) for name in source.tensors if not _legacy(source, name)
    }
    try:
        with _quiet():
            model, info = kind.from_pretrained(
                None,
                config=config,
                state_dict=lazy,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are in `info`, and refused below
            )
    except RuntimeError as error:
        raise (errors or [_unfit(folder, str(error))])[0] from error
    _check(folder, info)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


class _Lazy:
    """A weight that transformers reads when it places it, as it does a slice of a file.

    What goes wrong is kept in `errors` too: transformers reports it as a conversion's failure.
    """

    def __init__(self, source: DenseSource, name: str, errors: list[UnicompError]) -> None:
        self.source = source
        self.name = name
        self.errors = errors

    def __getitem__(self, index: EllipsisType) -> Tensor:
        try:
            return self.source.read(self.name)
        except UnicompError as error:
            self.errors.append(error)
            raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting on the terminal what is checked here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _legacy(source: DenseSource, name: str) -> bool:
    """Say whether a tensor is one that old files hold and no model wants."""
    row = ARCHITECTURES.get(str(source.config["model_type"]))
    return row is not None and any(re.search(pattern, name) for pattern in row.legacy)


def _check(folder: Path, info: Mapping[str, object]) -> None:
    found = {key: value for key, value in info.items() if value}
    if found:
        raise _unfit(folder, "; ".join(f"{key}: {_few(own)}" for key, own in sorted(found.items())))


def _unfit(folder: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"`{folder}` does not fit the model that its config describes: {reason}",
        hint="config.json may be another model's, or the download incomplete",
    )


def _few(keys: object) -> str:
    names = sorted(map(str, keys)) if isinstance(keys, (set, list, tuple)) else [str(keys)]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more

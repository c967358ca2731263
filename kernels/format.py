"""What an on-disk layout of quantized weights must be able to do, and where layouts are found.

The folder `kernels/formats/` is the registry: `gptq.py` there is `--format gptq` and defines
exactly one subclass of `Format`. Words have hyphens on the command line and underscores on disk.
A format is a frozen value; every method is a pure function of it and its arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

from unicomp import entries, suggest
from unicomp.errors import UnsupportedError
from unicomp.kernels import formats as folder
from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.writer import Meta

if TYPE_CHECKING:
    from torch import Tensor


class Wish(NamedTuple):
    """What a recipe asks for one linear of a model.

    module      its name in the output, without `.weight`
    shape       (out, in)
    scheme      None: leave it dense
    transposed  the model holds it [in, out] (GPT-2's Conv1D)
    expert      it belongs to one expert: `<path>.experts.<index>.<name>`
    """

    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    transposed: bool = False
    expert: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """What a format makes of the wishes for a whole model.

    format   writes this model from here on: it knows which writing its loaders need
    schemes  of every wish, in order; None: dense
    why      module -> reason, where the scheme is not the one asked for, or stored unusually
    stacked  `<path>.experts` of layers whose dense experts loaders want as two 3-D tensors under
             the names of the transformers model, `gate_up_proj` and `down_proj`
    """

    format: Format
    schemes: Mapping[str, Scheme | None]
    why: Mapping[str, str] = field(default_factory=dict)
    stacked: tuple[str, ...] = ()


class Format(ABC):
    """One on-disk layout of packed linear weights.

    A weight belongs to a module, `<module>.weight` [out, in] in the source; the format replaces it
    by tensors named `<module>.<suffix>`. Everything else of the checkpoint stays as it is. One
    instance writes one checkpoint: `settle` for writing and `reading` for reading return it.
    """

    name: ClassVar[str]

    @abstractmethod
    def settle(self, wishes: Sequence[Wish], loaders: Iterable[str]) -> Settled:
        """Decide how each linear of a model is stored so that loaders take the file whole.

        wishes   every linear that could be quantized, those to leave dense included
        loaders  of `transformers`, `vllm`, `llama.cpp`: what must load it; none named:
                 transformers must, the others where that costs nothing
        """

    def reading(self, config: Mapping[str, Any]) -> Self:
        """Return the instance that reads files with this `quantization_config`."""
        return self

    @abstractmethod
    def refuses(self, shape: tuple[int, int], scheme: Scheme) -> str | None:
        """Say why a weight [out, in] cannot be stored in this scheme; None if it can."""

    @abstractmethod
    def scale_dtype(self, dtype: str) -> str:
        """Return the dtype of stored scales; `dtype` is the model's, as safetensors writes it."""

    @abstractmethod
    def layout(self, module: str, shape: tuple[int, int], scheme: Scheme, dtype: str) -> list[Meta]:
        """Return the tensors that `pack` will give for a weight [out, in]."""

    @abstractmethod
    def pack(self, module: str, packed: PackedTensor) -> dict[str, Tensor]:
        """Return the tensors to store, names, dtypes and shapes as `layout` says."""

    @abstractmethod
    def unpack(
        self,
        module: str,
        read: Callable[[str], Tensor],
        shape: tuple[int, int],
        scheme: Scheme,
    ) -> PackedTensor:
        """Return what `pack` was given; `read` fetches a stored tensor by its full name."""

    @abstractmethod
    def config(self, schemes: Mapping[str, Scheme], dense: Sequence[str]) -> dict[str, Any]:
        """Return the value of config.json's `quantization_config`.

        schemes  every quantized module, by its full name in the loaded model, with its scheme
        dense    every other linear module, likewise: loaders must leave these alone
        """

    @abstractmethod
    def scheme(self, config: Mapping[str, Any], module: str) -> Scheme | None:
        """Read how a module is stored from a `quantization_config`; None if it is dense."""

    def extra_files(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Return further files of the checkpoint, name to text, for a `quantization_config`."""
        return {}


def formats() -> list[str]:
    """Return the names of all formats, sorted."""
    return [entries.word(file) for file in entries.files(folder.__path__)]


def find(name: str) -> Format:
    """Return the format of that name; UnsupportedError with near names if there is none."""
    if name not in formats():
        raise UnsupportedError(f"unknown format `{name}`", hint=suggest.hint(name, formats()))
    module = f"unicomp.kernels.formats.{name.replace('-', '_')}"
    found: Format = entries.only(module, Format)()  # type: ignore[type-abstract]  # subclasses are not
    return found

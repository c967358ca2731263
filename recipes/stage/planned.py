"""What every plan of one pass over the model says, to a run and to a reader."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from unicomp.checkpoint import Checkpoint
from unicomp.compress.method import Method
from unicomp.compress.sparsity import Sparsity
from unicomp.errors import UnicompError
from unicomp.hub import Source
from unicomp.kernels.dense import DenseSource
from unicomp.kernels.packed import Scheme
from unicomp.models import Model
from unicomp.recipes.lint.output import Output
from unicomp.recipes.lint.rules import refusals
from unicomp.recipes.schema import Recipe, Stage

# What a limit has to leave above the forecast, as a share of it. Freed memory comes to lie in
# pieces: peaks of equal layers of one run differed by 8 %, those of one command by 37 %. A pass
# over layers returns freed memory before it goes past this; cuts and deltas were measured below it.
ALLOWANCE = 0.25


def most(parts: Mapping[str, int]) -> int:
    """Return what a run is not to exceed: the forecast and its allowance, in bytes."""
    return int(sum(parts.values()) * (1 + ALLOWANCE))


def decline(
    parts: Mapping[str, int],
    limit: int | None,
    instead: str = "a shorter `seq_len`",
) -> None:
    """Raise UnicompError where the forecast with its allowance is over what the user allows."""
    needed = most(parts)
    if limit is not None and needed > limit:
        raise UnicompError(
            f"--max-memory {limit} bytes is too small: the least that this run needs is "
            f"{needed} bytes",
            hint=f"give at least {-(-needed // (1 << 20))}MiB, or {instead}",
        )


class Fate(NamedTuple):
    """What becomes of one tensor.

    name       the module's name for a linear of a layer, else the tensor's, both in the output
    role       linear, embedding, head, norm, bias, router or other
    scheme     how it is quantized, None where it is not
    sparsity   its zeros, None where it is not pruned
    why        why it stays as it is, or is stored otherwise than asked; None where as asked
    """

    name: str
    role: str
    shape: tuple[int, ...]
    scheme: Scheme | None
    why: str | None
    bytes_in: int
    bytes_out: int
    sparsity: Sparsity | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "name": self.name,
            "role": self.role,
            "shape": list(self.shape),
            "bits": self.scheme.bits if self.scheme else None,
            "group_size": self.scheme.group_size if self.scheme else None,
            "symmetric": self.scheme.symmetric if self.scheme else None,
            "sparsity": str(self.sparsity) if self.sparsity else None,
            "why": self.why,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(ABC):
    """What every plan of one pass over the model says.

    recipe      what was asked, its calibration settled
    text        the recipe as written, or as its defaults and overrides make it
    stage       what is carried out
    method      its options
    dense       the plain weights of `checkpoint`, or what an earlier pass will make of them
    model       which of them are which
    batch       windows computed together
    memory      part -> bytes at the moment of the greatest need; their sum is the forecast
    disk_bytes  most that the run takes on disk, the output included
    times       part -> seconds; their sum is the forecast
    basis       what that forecast rests on
    notes       what the user must know
    """

    recipe: Recipe
    text: str
    stage: Stage
    method: Method
    source: Source
    dense: DenseSource
    checkpoint: Checkpoint
    model: Model
    batch: int
    memory: Mapping[str, int]
    disk_bytes: int
    times: Mapping[str, float]
    basis: str
    notes: tuple[str, ...]

    @property
    @abstractmethod
    def params(self) -> int:
        """Parameters of the output."""

    @property
    @abstractmethod
    def bytes_in(self) -> int:
        """Bytes of all tensors of the source."""

    @property
    @abstractmethod
    def bytes_out(self) -> int:
        """Bytes of all tensors of the output."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Hash of what will be done."""

    @abstractmethod
    def output(self) -> Output:
        """Return what a loader will find."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""

    @property
    def stages(self) -> list[Stage]:
        """What is carried out, in order."""
        return [self.stage]

    @property
    def bits_per_weight(self) -> float:
        """Bits that the output takes per parameter."""
        return 8 * self.bytes_out / self.params

    @property
    def peak_host_bytes(self) -> int:
        """The forecast of the process's greatest resident size."""
        return sum(self.memory.values())

    @property
    def most_host_bytes(self) -> int:
        """The forecast and its allowance: what `max_memory` has to have room for."""
        return most(self.memory)

    @property
    def seconds(self) -> float:
        """The forecast of the time."""
        return sum(self.times.values())

    def loaders(self) -> dict[str, str | None]:
        """Return stock loader -> why it does not take the output; None: it does."""
        return refusals(self.output())

    def figures(self) -> dict[str, Any]:
        """Return what plans of every kind say, as plain JSON values."""
        return {
            "schema": "unicomp.plan/1",
            "source": {"id": self.source.id, "revision": self.source.revision},
            "architecture": self.model.type,
            "stages": [{"verb": stage.verb, "method": stage.method} for stage in self.stages],
            "format": self.recipe.format,
            "params": self.params,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "bits_per_weight": self.bits_per_weight,
            "peak_host_bytes": self.peak_host_bytes,
            "most_host_bytes": self.most_host_bytes,
            "memory": dict(self.memory),
            "peak_gpu_bytes": None,
            "disk_bytes": self.disk_bytes,
            "batch": self.batch,
            "seconds": self.seconds,
            "times": dict(self.times),
            "basis": self.basis,
            "loaders": self.loaders(),
            "notes": list(self.notes),
        }

"""What every plan of one pass over the model says, to a run and to a reader."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unicomp.checkpoint import Checkpoint
from unicomp.compress.method import Method
from unicomp.compress.sparsity import Sparsity
from unicomp.hub import Source
from unicomp.kernels.dense import DenseSource
from unicomp.kernels.packed import Scheme
from unicomp.models import Model
from unicomp.recipes.schema import Recipe, Stage


@dataclass(frozen=True, slots=True)
class Fate:
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


class Planned(Protocol):
    """What every plan of one pass over the model says."""

    @property
    def recipe(self) -> Recipe:
        """What was asked, its calibration settled."""

    @property
    def text(self) -> str:
        """The recipe as written."""

    @property
    def source(self) -> Source:
        """Where the model comes from."""

    @property
    def dense(self) -> DenseSource:
        """Its plain weights."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Its files."""

    @property
    def method(self) -> Method:
        """The method that gathers statistics."""

    @property
    def batch(self) -> int:
        """Calibration windows computed together."""

    @property
    def disk_bytes(self) -> int:
        """Most that the run takes on disk, in bytes."""

    @property
    def sha256(self) -> str:
        """Hash of what will be done."""


class Shown(Planned, Protocol):
    """A plan of which figures are shown."""

    @property
    def model(self) -> Model:
        """Which tensors are which."""

    @property
    def stages(self) -> list[Stage]:
        """What is carried out, in order."""

    @property
    def params(self) -> int:
        """Parameters of the output."""

    @property
    def bytes_in(self) -> int:
        """Bytes of all tensors of the source."""

    @property
    def bytes_out(self) -> int:
        """Bytes of all tensors of the output."""

    @property
    def peak_host_bytes(self) -> int:
        """The forecast of the process's greatest resident size."""

    @property
    def most_host_bytes(self) -> int:
        """The same with an allowance: what a limit has to have room for."""

    @property
    def memory(self) -> Mapping[str, int]:
        """Part -> bytes at the moment of the greatest need."""

    @property
    def seconds(self) -> float:
        """The forecast of the time."""

    @property
    def times(self) -> Mapping[str, float]:
        """Part -> seconds; their sum is the forecast."""

    @property
    def basis(self) -> str:
        """What that forecast rests on."""

    @property
    def loaders(self) -> Mapping[str, str | None]:
        """Loader -> why it does not take the output; None: it does."""

    @property
    def notes(self) -> Sequence[str]:
        """What the user must know."""


def figures(plan: Shown) -> dict[str, Any]:
    """Return what plans of every kind say, as plain JSON values."""
    return {
        "schema": "unicomp.plan/1",
        "source": {"id": plan.source.id, "revision": plan.source.revision},
        "architecture": plan.model.type,
        "stages": [{"verb": stage.verb, "method": stage.method} for stage in plan.stages],
        "format": plan.recipe.format,
        "params": plan.params,
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "bits_per_weight": 8 * plan.bytes_out / plan.params,
        "peak_host_bytes": plan.peak_host_bytes,
        "most_host_bytes": plan.most_host_bytes,
        "memory": dict(plan.memory),
        "peak_gpu_bytes": None,
        "disk_bytes": plan.disk_bytes,
        "batch": plan.batch,
        "seconds": plan.seconds,
        "times": dict(plan.times),
        "basis": plan.basis,
        "loaders": dict(plan.loaders),
        "notes": list(plan.notes),
    }

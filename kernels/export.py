"""What another on-disk layout makes of codes that are already chosen, and where layouts are found.

The folder `kernels/exports/` is the registry: `gguf.py` there is `export --format gguf` and defines
exactly one subclass of `Export`. Each answers for every linear of a model, before anything is
written, with one of three verdicts: its codes and scales go over exactly; it is stored otherwise,
in a way that is named; or the format is refused for it, with the reason. `table` shows the answers
for every kind of codes that quantizers make.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from unicomp import entries, suggest
from unicomp.errors import UnsupportedError
from unicomp.kernels import exports as folder
from unicomp.kernels.packed import PackedTensor, Scheme

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Codes:
    """What decides where the weight of one linear can go.

    shape       (out, in)
    scheme      None: the weight is plain
    ternary     every code is -1, 0 or 1
    one_scale   all groups and rows share one scale
    exact_in    dtypes that hold every scale exactly
    expert      it belongs to one expert
    transposed  the model holds it [in, out]
    """

    module: str
    shape: tuple[int, int]
    scheme: Scheme | None
    ternary: bool = False
    one_scale: bool = False
    exact_in: frozenset[torch.dtype] = frozenset(FLOATS)
    expert: bool = False
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one linear.

    kind    exact: the same codes and scales; fallback: stored otherwise; refused
    stored  as what: a scheme in words, a type of the format, or `dense`
    why     None where exact
    """

    kind: Literal["exact", "fallback", "refused"]
    stored: str
    why: str | None = None


class Export(ABC):
    """One layout that codes can be moved to.

    name   on the command line
    types  what `--type` chooses among, the default first
    """

    name: ClassVar[str]
    types: ClassVar[tuple[str, ...]]

    @abstractmethod
    def decide(
        self, weights: Sequence[Codes], kind: str | None, dtype: torch.dtype
    ) -> dict[str, Verdict]:
        """Return a verdict for every linear, by module.

        kind   of `types`; None: whatever is exact and smallest
        dtype  of the model
        """


def facts(
    module: str,
    packed: PackedTensor,
    *,
    expert: bool = False,
    transposed: bool = False,
) -> Codes:
    """Return what formats must know of a weight whose codes were read."""
    low, high = (int(packed.codes.min()), int(packed.codes.max()))
    scale = packed.scale.float()
    return Codes(
        module,
        (packed.codes.shape[0], packed.codes.shape[1]),
        packed.scheme,
        ternary=packed.zero_point is None and low >= -1 and high <= 1,
        one_scale=bool((scale == scale.flatten()[0]).all()),
        exact_in=frozenset(
            dtype for dtype in FLOATS if bool((scale.to(dtype).float() == scale).all())
        ),
        expert=expert,
        transposed=transposed,
    )


def words(scheme: Scheme) -> str:
    """Return a scheme in words."""
    group = "per channel" if scheme.group_size == -1 else f"group {scheme.group_size}"
    return f"{scheme.bits} bits, {group}{'' if scheme.symmetric else ', asymmetric'}"


def exports() -> list[str]:
    """Return the names of all formats to export to, sorted."""
    return [entries.word(file) for file in entries.files(folder.__path__)]


def find(name: str) -> Export:
    """Return the format of that name; UnsupportedError with near names if there is none."""
    if name not in exports():
        raise UnsupportedError(f"unknown format `{name}`", hint=suggest.hint(name, exports()))
    module = f"unicomp.kernels.exports.{name.replace('-', '_')}"
    found: Export = entries.only(module, Export)()  # type: ignore[type-abstract]  # subclasses are not
    return found


def check_type(export: Export, kind: str | None) -> None:
    """Raise UnsupportedError if a format has no such type."""
    if kind is not None and kind not in export.types:
        raise UnsupportedError(
            f"format `{export.name}` has no type `{kind}`",
            hint=f"its types: {', '.join(export.types)}",
        )


KINDS: Mapping[str, Codes] = {
    "plain weights": Codes("m", (512, 512), None),
    "4 bits, group 128": Codes("m", (512, 512), Scheme(4, 128)),
    "4 bits, per channel": Codes("m", (512, 512), Scheme(4, -1)),
    "4 bits, group 128, asymmetric": Codes("m", (512, 512), Scheme(4, 128, False)),
    "4 bits, group 48": Codes("m", (528, 528), Scheme(4, 48)),
    "4 bits, rows of 172, per channel": Codes("m", (512, 172), Scheme(4, -1)),
    "3 bits, group 128": Codes("m", (512, 512), Scheme(3, 128)),
    "5 bits, group 128": Codes("m", (512, 512), Scheme(5, 128)),
    "8 bits, group 128": Codes("m", (512, 512), Scheme(8, 128)),
    "ternary, group 128": Codes("m", (512, 512), Scheme(2, 128), ternary=True),
    "ternary, per channel": Codes("m", (512, 512), Scheme(2, -1), ternary=True),
    "ternary, one scale": Codes("m", (512, 512), Scheme(2, -1), ternary=True, one_scale=True),
}
"""Kinds of codes for `table`, each one linear of a float16 model."""


def table() -> Iterable[tuple[str, str, Verdict]]:
    """Yield (kind of codes, format, verdict) for everything in `KINDS`."""
    for kind, codes in KINDS.items():
        for name in exports():
            yield kind, name, find(name).decide([codes], None, torch.float16)["m"]

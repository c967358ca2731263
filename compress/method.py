"""The shapes of a compression method, and what a method may ask of its driver.

A method is a frozen set of options (its fields are the recipe's keys) and one function, `solve`.
It declares the statistics it needs and never hooks a model: the driver gathers each statistic
once for all who ask.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    WithJsonSchema,
    model_validator,
)

from unicomp.compress.decompose import How, decompose
from unicomp.compress.linalg import Factor
from unicomp.compress.masked import Given, Mask
from unicomp.compress.patterns import Pattern, matches
from unicomp.compress.sparsity import Sparsity, Target, parse
from unicomp.kernels.delta import Layout, PackedDelta
from unicomp.kernels.packed import PackedTensor, Scheme
from unicomp.later import torch

if TYPE_CHECKING:
    from torch import Tensor

PER_CHANNEL = -1
LEAST_GROUP = 8
LARGEST_GROUP = 1 << 20
# How far a linear's share of zeros may be from the common one: what was measured at the common
# share holds near it.
WITHIN = 0.05

Allocation = Literal["uniform", "sensitivity"]


class Need(StrEnum):
    """A statistic of a linear layer's input over the calibration tokens."""

    HESSIAN = "hessian"
    NORM = "norm"
    CROSS = "cross"


@dataclass(frozen=True, slots=True)
class Stats:
    """The statistics of one linear layer's input.

    tokens   how many tokens reached the layer
    hessian  float32 [in, in], mean of x.xT over those tokens; x from the compressed layers before
    norm     float32 [in], root mean square of x
    cross    float32 [in, in], mean of (x_original - x).xT, x_original from the uncompressed model
    memo     what a method worked out of these (a factor), for the next weight with the same input
    """

    tokens: int
    hessian: Tensor | None = None
    cross: Tensor | None = None
    norm: Tensor | None = None
    memo: dict[object, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Solution:
    """A quantized weight and what is known of its error, row by row so that it can be split.

    Errors are squared output errors, mean over tokens: diag(E H ET), E = weight - dequantized.

    error      float32 [out], with the undamped hessian
    rounding   float32 [out], the same error of round-to-nearest on the same bits and groups
    reference  float32 [out], diag(W H WT), what the errors are relative to
    predicted  float32 [out], expected error from the pivots before rounding; None without pivots
    clipped    int64 [out], codes that hit the end of the range
    damp       fraction of the mean diagonal that was added; None without a hessian
    """

    packed: PackedTensor
    error: Tensor
    rounding: Tensor
    reference: Tensor
    predicted: Tensor | None
    clipped: Tensor
    damp: float | None

    @property
    def weight(self) -> Tensor:
        """What the layer computes with from here on, float32 [out, in]."""
        return self.packed.dequantize()

    def rows(self, start: int, stop: int) -> Self:
        """Return the part that belongs to the output rows `start:stop`."""
        return replace(
            self,
            packed=self.packed.rows(start, stop),
            error=self.error[start:stop],
            rounding=self.rounding[start:stop],
            reference=self.reference[start:stop],
            predicted=_cut(self.predicted, start, stop),
            clipped=self.clipped[start:stop],
        )

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Put solutions of successive rows together; they have one scheme and one damping."""
        first = parts[0]
        if len(parts) == 1:
            return first
        zeros = [part.packed.zero_point for part in parts]
        return replace(
            first,
            packed=PackedTensor(
                torch.cat([part.packed.codes for part in parts]),
                torch.cat([part.packed.scale for part in parts]),
                _cat(zeros),
                first.packed.scheme,
            ),
            error=torch.cat([part.error for part in parts]),
            rounding=torch.cat([part.rounding for part in parts]),
            reference=torch.cat([part.reference for part in parts]),
            predicted=_cat([part.predicted for part in parts]),
            clipped=torch.cat([part.clipped for part in parts]),
        )


def _cut(value: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if value is None else value[start:stop]


def _cat(values: Sequence[Tensor | None]) -> Tensor | None:
    whole = [value for value in values if value is not None]
    return torch.cat(whole) if whole else None


@dataclass(frozen=True, slots=True)
class Pruning:
    """What a quantizer is asked to make zero on its way.

    method  says which weights, by its `mask`
    target  how many
    """

    method: PruneMethod
    target: Target


@dataclass(frozen=True, slots=True)
class Pruned:
    """A weight with zeros and what is known of its error, as in `Solution`; None: nothing is.

    weight     float32 [out, in]
    error      float32 [out], with the undamped hessian
    magnitude  float32 [out], the same error where the least magnitudes become zero instead
    reference  float32 [out], diag(W H WT)
    damp       fraction of the mean diagonal that was added
    """

    weight: Tensor
    error: Tensor | None = None
    magnitude: Tensor | None = None
    reference: Tensor | None = None
    damp: float | None = None

    def rows(self, start: int, stop: int) -> Self:
        """Return the part that belongs to the output rows `start:stop`."""
        return replace(
            self,
            weight=self.weight[start:stop],
            error=_cut(self.error, start, stop),
            magnitude=_cut(self.magnitude, start, stop),
            reference=_cut(self.reference, start, stop),
        )


class Method(BaseModel):
    """Options of a method; every field is a key of its recipe stage.

    A subclass adds fields and fills in what its verb's class declares; another public function
    would never be called, so it is refused when the class is made.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True
    )

    needs: ClassVar[frozenset[Need]] = frozenset()
    declares: ClassVar[bool] = False  # set by a class that says what methods of a kind have

    def wants(self) -> frozenset[Need]:
        """Return the statistics that these options ask for, of all that the method may need."""
        return self.needs

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse public functions that no base class declares."""
        if cls.__module__ == __name__ or vars(cls).get("declares"):
            return
        known = {name for base in cls.__mro__[1:] for name in vars(base)}
        for name, value in vars(cls).items():
            public = not name.startswith("_") and name not in known
            if public and isinstance(value, FunctionType | classmethod | staticmethod | property):
                raise TypeError(
                    f"`{cls.__name__}.{name}`: a method has no such function; "
                    "misspelt, or private and then `_` first"
                )


def _group_size(value: int) -> int:
    if value != PER_CHANNEL and value < LEAST_GROUP:
        raise ValueError(
            f"input should be {PER_CHANNEL} (one group per row) or at least {LEAST_GROUP}"
        )
    return value


def _sparsity(value: float | str) -> float | str:
    parse(value)
    return value


Bits = Annotated[int, Field(ge=2, le=8)]
GroupSize = Annotated[
    int,
    Field(le=LARGEST_GROUP),
    AfterValidator(_group_size),
    WithJsonSchema(
        {
            "type": "integer",
            "anyOf": [
                {"const": PER_CHANNEL},
                {"minimum": LEAST_GROUP, "maximum": LARGEST_GROUP},
            ],
        }
    ),
]
Patterns = Annotated[tuple[Pattern, ...], Strict(False)]  # a list in a recipe


class Override(BaseModel):
    """What is different for the modules of one pattern; None: as the stage says."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.bits is None and self.group_size is None and self.symmetric is None:
            raise ValueError("give `bits`, `group_size` or `symmetric`")
        return self


class LayerMethod(Method):
    """A method that takes one linear weight after the other, with statistics of its input."""

    ignore: Patterns = Field(
        ("lm_head",),
        description="modules left as they are, by a full name, its last part, or `re:` and a "
        "regular expression for the full name; wins over `modules`",
    )

    def unmatched(self, modules: Collection[str]) -> list[tuple[str, str]]:
        """Return (key, pattern) of every pattern that means none of the modules.

        `lm_head` under `ignore` never is: it is the default, and a tied head is no module.
        """
        return [
            (key, pattern)
            for key, pattern in self._patterns()
            if not any(matches(pattern, module) for module in modules)
        ]

    def _patterns(self) -> list[tuple[str, str]]:
        return [("ignore", pattern) for pattern in self.ignore if pattern != "lm_head"]

    def _ignores(self, module: str) -> bool:
        return any(matches(pattern, module) for pattern in self.ignore)

    def workspace_bytes(self, rows: int, columns: int) -> int:
        """Return the most bytes that `solve` takes for a float32 weight [rows, columns].

        The result is counted, the weight and its statistics are not. Here: copies of the weight,
        its target, the dequantized one and their difference, and the codes.
        """
        return 4 * 4 * rows * columns + 2 * rows * columns

    def solve_work(self, rows: int, columns: int) -> dict[str, float]:
        """Return what `solve` has to do for a weight [rows, columns], by what limits it.

        product, thin, half, factor  operations of products in float32, of those with few rows, in
                                     bfloat16, and of factors and triangular solves
        memory                       bytes that elementwise work reads and writes
        sort, line                   numbers put in order row by row, and all of a block at once
        grid, rounding               weights whose scales are searched, and that a walk rounds

        Here: two grids, codes of each, and their errors, a temporary a step.
        """
        return {"memory": 32.0 * 4 * rows * columns, "grid": float(rows * columns)}


# One object for all that are alike: a model of many experts has ten thousands of linears.
_scheme = lru_cache(maxsize=64)(Scheme)


class QuantizeMethod(LayerMethod):
    """A method of the verb `quantize`: one linear weight in, codes and scales out."""

    bits: Bits = Field(4, description="bits per weight, 2 to 8")
    group_size: GroupSize = Field(
        128, description="input columns that share a scale; -1: one scale per output row"
    )
    symmetric: bool = Field(True, description="no zero point")
    scale_search: Literal["minmax", "mse"] = Field(
        "mse",
        description="how a group's scale is found: by its extremes, or by least squared error",
    )
    modules: Mapping[Pattern, Override] = Field(
        default_factory=dict,
        description="other bits, group_size or symmetric by module: a full name, its last part, "
        "or `re:` and a regular expression for the full name; the first that matches counts",
    )

    def scheme(self, module: str) -> Scheme | None:
        """Return how the module of this full name is to be quantized, or None if it is ignored."""
        if self._ignores(module):
            return None
        found = next((o for p, o in self.modules.items() if matches(p, module)), None)
        if found is None:
            return _scheme(self.bits, self.group_size, self.symmetric)
        return _scheme(
            self.bits if found.bits is None else found.bits,
            self.group_size if found.group_size is None else found.group_size,
            self.symmetric if found.symmetric is None else found.symmetric,
        )

    def _patterns(self) -> list[tuple[str, str]]:
        return [("modules", pattern) for pattern in self.modules] + super()._patterns()

    @abstractmethod
    def solve(
        self,
        weight: Tensor,
        stats: Stats,
        scheme: Scheme,
        *,
        scale_dtype: object,
        pruning: Pruning | None = None,
    ) -> Solution:
        """Quantize one weight, and with `pruning` make some of it zero; see the method's file."""


class PruneMethod(LayerMethod):
    """A method of the verb `prune` that makes weights zero: shapes stay as they are."""

    sparsity: Annotated[float | str, AfterValidator(_sparsity)] = Field(
        "0.5", description="share of zeros, 0 to 1, or `n:m`: n of every m neighbours stay"
    )

    @model_validator(mode="after")
    def _shared_out(self) -> Self:
        if self.allocates() and parse(self.sparsity).m is not None:
            raise ValueError(
                f"`allocation: sensitivity` shares out single zeros, `{self.sparsity}` is the same "
                "everywhere"
            )
        return self

    def allocates(self) -> bool:
        """Tell whether each linear's share of zeros is measured before the work."""
        return getattr(self, "allocation", "uniform") == "sensitivity"

    def target(self, module: str, columns: int) -> Sparsity | None:
        """Return the module's zeros; None if it is ignored or its rows cannot have the pattern."""
        wanted = parse(self.sparsity)
        if self.allocates():
            wanted = replace(wanted, within=WITHIN)
        return None if self._ignores(module) or not wanted.fits(columns) else wanted

    def spread(self) -> bool:
        """Tell whether the share of zeros is one of the whole model, and not of each row."""
        return False

    def mask(self, weight: Tensor, stats: Stats, target: Target, factor: Factor) -> Mask:
        """Return which weights stay, for a method that quantizes the rest in the same walk.

        Here: those that `solve` leaves, decided before the walk.
        """
        stays = self.solve(weight, stats, target).weight != 0
        return Given(stays.T[factor.order])

    def solve_work(self, rows: int, columns: int) -> dict[str, float]:
        """Return what `solve` has to do: scores, their order, and a mask."""
        return {"memory": 12.0 * 4 * rows * columns, "sort": float(rows * columns)}

    @abstractmethod
    def solve(self, weight: Tensor, stats: Stats, target: Target) -> Pruned:
        """Make weights zero; see the method's file."""


class DeltaMethod(Method):
    """A method of the verb `delta`: what a fine-tune adds to a weight in, a packed delta out.

    spread  the bytes are shared out over the whole model by what the singular values say, instead
            of each weight having its own ratio
    """

    spread: ClassVar[bool] = False

    base: str = Field(
        min_length=1,
        description="the model that was fine-tuned: a folder, a Hub id `org/name[@revision]` or "
        "`builtin:NAME`",
    )
    ratio: float = Field(
        0.125,
        gt=0,
        le=1,
        description="most bytes that the delta's matrices take, as a share of theirs in 16 bits",
    )
    seed: int = Field(0, ge=0, lt=1 << 31, description="seed of the random projections")
    ignore: Patterns = Field(
        (),
        description="modules whose weights are stored as they are, as in `quantize`; their bytes "
        "count",
    )
    steps: int = Field(
        200,
        ge=1,
        le=100_000,
        description="steps of training the scales on the calibration text, where one is given",
    )

    @abstractmethod
    def layouts(self) -> tuple[Layout, ...]:
        """Return the ways to keep a weight's delta that this method chooses from, of rank 0."""

    def ranked(self) -> bool:
        """Say whether the budget that planes leave is spent on factors."""
        return True

    def spreads(self) -> bool:
        """Say whether these options share the bytes out over the whole model."""
        return self.spread

    def importance(self, depth: float) -> float:
        """Return what a squared error counts; depth is 0 at the first layer, 1 at the last."""
        return 1.0

    def how(self, seed: int) -> How:
        """Return how a weight is decomposed; the seed is that weight's own."""
        return How(seed=seed)

    def bought(self, shape: tuple[int, int], layout: Layout) -> float:
        """Return the ranks, with a fraction, that a weight [out, in] may have by its own budget.

        The planes count without their scales, one bit a weight, as in the paper's formula.
        """
        size = shape[0] * shape[1]
        if not self.ranked() or size == 0:
            return 0.0
        room = 2 * self.ratio * size - layout.planes * size / 8
        return min(max(0.0, room / layout.rank_bytes(shape)), *shape)

    def rank(self, shape: tuple[int, int], layout: Layout) -> int:
        """Return the rank of a weight [out, in] by its own budget: what fits, rounded down."""
        return int(self.bought(shape, layout) + 1e-9)

    def solve(self, delta: Tensor, layout: Layout, seed: int) -> PackedDelta:
        """Decompose the delta of one weight.

        delta   float32 [out, in], finite; not modified
        layout  what is kept of it
        """
        return decompose(delta, layout, self.how(seed))

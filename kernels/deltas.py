"""One base and many fine-tunes of it in memory: each row of a batch picks one.

The base is loaded once, dense or packed. Of every delta its bits and factors are held as they are
stored, and a linear computes `y = W x + a (sign x) + U (V x)` for the rows that picked it
(`kernels/delta_product.py`); norms and biases, which are stored whole, are exchanged.

What is refused: deltas of experts, which transformers holds as 3-D parameters, and of a vocabulary
of another size than the base's.

Papers: D-QRELO, arXiv:2604.16940; serving many over one base, BitDelta, arXiv:2402.10193.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unicomp import hub, machine
from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.folder import quote
from unicomp.kernels import backend as backends
from unicomp.kernels import packed_model
from unicomp.kernels.blocked import Compute
from unicomp.kernels.delta_folder import (
    DeltaFolder,
    check_base,
    open_delta,
    quantized_from_base,
    unserved,
)
from unicomp.kernels.delta_product import DeltaProduct
from unicomp.kernels.linear import PackedLinear

BASE = -1  # the choice that means the base itself


Rows = Tensor | slice


class Choice:
    """Which delta each row of a batch takes: one number for all rows, or one a row."""

    def __init__(self, rows: tuple[int, ...] = (BASE,)) -> None:
        self.pick(rows)

    def pick(self, rows: tuple[int, ...]) -> None:
        """Choose for the calls that follow."""
        self.rows = rows
        self._groups: list[tuple[int, Rows]] = []
        if len(rows) == 1:
            self._groups = [] if rows[0] == BASE else [(rows[0], slice(None))]
            return
        for own in sorted({*rows} - {BASE}):
            places = [place for place, delta in enumerate(rows) if delta == own]
            adjoining = places[-1] - places[0] + 1 == len(places)
            span = slice(places[0], places[-1] + 1)
            self._groups.append((own, span if adjoining else torch.tensor(places)))

    def groups(self, batch: int) -> list[tuple[int, Rows]]:
        """Return (delta, its rows) of those that some row takes, the base left out."""
        if len(self.rows) not in (1, batch):
            raise UnicompError(
                f"{len(self.rows)} rows were chosen for, the batch has {batch}",
                hint="choose one delta for all rows, or one for each",
            )
        return self._groups


@dataclass(slots=True)
class _Part:
    """What one delta changes in a module: a product, or parameters stored whole."""

    product: DeltaProduct | None = None
    whole: dict[str, Tensor] = field(default_factory=dict)


class Switched(nn.Module):
    """A module of the base whose rows take one delta or another.

    inner  the base's linear, embedding or norm; rows are the first dimension of its input
    """

    def __init__(self, inner: nn.Module, choice: Choice) -> None:
        super().__init__()
        self.inner = inner
        self.choice = choice
        self.parts: dict[int, _Part] = {}
        self.products = nn.ModuleDict()

    def __getattr__(self, name: str) -> Any:
        """Return what the base's module has under this name, where this one has nothing."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def part(self, delta: int) -> _Part:
        """Return what a delta changes here, nothing at first."""
        return self.parts.setdefault(delta, _Part())

    def forward(self, x: Tensor, *rest: Any, **words: Any) -> Tensor:
        """Return the base's output, changed for the rows that picked a delta."""
        found: Tensor = self.inner(x, *rest, **words)
        groups = [
            (self.parts[delta], rows)
            for delta, rows in self.choice.groups(len(x))
            if delta in self.parts
        ]
        if not groups:
            return found
        if not isinstance(self.inner, nn.Embedding | nn.Linear | PackedLinear):
            found = found.clone()
            for part, rows in groups:
                found[rows] = torch.func.functional_call(
                    self.inner, part.whole, (x[rows],), strict=False
                )
            return found
        total = found.to(torch.float32, copy=True)
        for part, rows in groups:
            total[rows] += self._added(part, x[rows])
        return total.to(found.dtype)

    def _added(self, part: _Part, x: Tensor) -> Tensor | float:
        """Return what a delta adds to the output for these inputs, float32."""
        if isinstance(self.inner, nn.Embedding):
            scale = getattr(self.inner, "embed_scale", 1.0)  # of gemma3's embedding, inside it
            return 0.0 if part.product is None else part.product.rows(x) * scale
        total: Tensor | float = 0.0 if part.product is None else part.product(x)
        if "bias" in part.whole:
            bias: Any = self.inner.bias
            total = total + (part.whole["bias"].float() - bias.float())
        return total


def load_deltas(
    base: str | Path,
    deltas: Sequence[str | Path],
    *,
    device: str | None = None,
    backend: str | None = None,
    compute: Compute = "int8",
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load one base with many deltas; until `choose` says otherwise, all rows take the first.

    base, device, backend, compute, dtype    as `unicomp.load` takes them; deltas are multiplied as
            packed weights are, also over a dense base
    deltas  folders that `unicomp delta compress` made over this very base, or over the one that
            unicomp quantized this one from: the sum is then as near as the quantized base is

    Raises CheckpointError for another base and for deltas that are not whole, UnsupportedError for
    deltas of experts or of another vocabulary.
    """
    opened = [open_delta(Path(delta)) for delta in deltas]
    checkpoint = Checkpoint.open(hub.resolve(str(base)).folder)
    checked: list[dict[str, str]] = []
    for delta in opened:
        own = delta.manifest.base.sha256
        if own not in checked and not quantized_from_base(delta, checkpoint):
            check_base(delta, checkpoint)
        checked.append(own)
    model = packed_model.load(base, device=device, backend=backend, compute=compute, dtype=dtype)
    chosen = backends.choose(backend, torch.device(device or "cpu").type)
    choice = Choice((0,) if opened else (BASE,))
    homes = _Homes(model, choice, chosen, compute)
    freed = 0
    for index, delta in enumerate(opened):
        homes.products.append({})
        for name, stored in delta.manifest.tensors.items():
            if stored.kind != "same":
                _add(homes, index, delta, name)
            freed += prod(stored.shape)  # signs, a byte each on their way into panels
            if freed > packed_model.FREED_MAX:
                freed = 0
                machine.return_freed_memory()
    machine.return_freed_memory()
    known: Any = model
    known.unicomp_products = homes.products
    known.unicomp_choice, known.unicomp_deltas = choice, len(opened)
    known.unicomp_loaded = replace(
        packed_model.loaded(model),
        backend=chosen,
        isa=backends.isa(chosen),
        missing=backends.missing(),
    )
    known.save_pretrained = _refuse_saving
    return model


def choose(model: nn.Module, rows: int | Sequence[int]) -> None:
    """Say which delta the next calls of a model take.

    rows  one number for all rows of a batch, or one for each row; -1 is the base itself
    """
    choice, count = getattr(model, "unicomp_choice", None), getattr(model, "unicomp_deltas", 0)
    if not isinstance(choice, Choice):
        raise ValueError("this model has no deltas")
    wanted = (rows,) if isinstance(rows, int) else tuple(rows)
    for own in wanted:
        if not BASE <= own < count:
            raise UnicompError(
                f"there is no delta {own}: {count} are loaded", hint="count from 0; -1 is the base"
            )
    if not wanted:
        raise UnicompError("no row was chosen for", hint="choose one delta for all rows")
    choice.pick(wanted)


class _Homes:
    """Finds the module of a stored tensor, and switches it on first use."""

    def __init__(
        self, model: PreTrainedModel, choice: Choice, backend: str, compute: Compute
    ) -> None:
        self.model = model
        self.choice = choice
        self.backend, self.compute = backend, compute
        self.prefix = f"{model.base_model_prefix}."
        self.tied = _tied(model)
        self.products: list[dict[str, DeltaProduct]] = []

    def of(self, module: str) -> list[Switched]:
        """Return the modules that use a stored weight: a tied head beside its embedding."""
        found = []
        for path in (module, self.prefix + module, module.removeprefix(self.prefix)):
            try:
                inner = self.model.get_submodule(path)
            except AttributeError:
                continue
            found.append(self._switched(path, inner))
            break
        if not found:
            raise UnsupportedError(
                f"`{quote(module)}` has a delta, and the model holds it in no module of its own",
                hint="restore the fine-tune instead: `unicomp delta restore`",
            )
        inner = found[0].inner
        if isinstance(inner, nn.Embedding) and self.tied is not None:
            embedding, head = self.tied
            if inner is embedding or self._inner(embedding) is inner:
                found.append(self._switched(head, self.model.get_submodule(head)))
        return found

    def _inner(self, module: nn.Module) -> nn.Module:
        return module.inner if isinstance(module, Switched) else module

    def _switched(self, path: str, inner: nn.Module) -> Switched:
        if isinstance(inner, Switched):
            return inner
        made = Switched(inner, self.choice)
        self.model.set_submodule(path, made)
        return made.eval()


def _tied(model: PreTrainedModel) -> tuple[nn.Module, str] | None:
    """Return the embedding and the path of the head that shares its weight, if one does."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is not getattr(embedding, "weight", 0):
        return None
    return embedding, next(path for path, own in model.named_modules() if own is head)


def products(model: nn.Module, index: int) -> dict[str, DeltaProduct]:
    """Return tensor's name -> the product of a delta of the model, in the order of its folder."""
    found: list[dict[str, DeltaProduct]] = getattr(model, "unicomp_products", [])
    return found[index]


def _add(homes: _Homes, index: int, delta: DeltaFolder, name: str) -> None:
    own = delta.manifest.tensors[name]
    if (reason := unserved(name, own)) is not None:
        raise UnsupportedError(
            f"`{delta.folder}`: {reason}, which is not served",
            hint="restore the fine-tune instead: `unicomp delta restore`",
        )
    module, _, kind = name.rpartition(".")
    switched = homes.of(module)
    if own.kind == "exact":
        for one in switched:
            held: Any = getattr(one.inner, kind)
            one.part(index).whole[kind] = delta.read(name).to(held.dtype)
        return
    for one in switched:
        if not _is_embedding(one.inner) and not isinstance(one.inner, nn.Linear | PackedLinear):
            raise UnsupportedError(
                f"`{quote(name)}` is in a `{type(one.inner).__name__}`, whose deltas are not "
                "served",
                hint="restore the fine-tune instead: `unicomp delta restore`",
            )
    # An embedding wants rows, which lie in the stored layout as they are; a head wants products.
    looked_up = all(_is_embedding(one.inner) for one in switched)
    how = "torch" if looked_up else homes.backend
    product = DeltaProduct(delta.deltas(name)[0], backend=how, compute=homes.compute)
    homes.products[index][name] = product
    for one in switched:
        one.part(index).product = product
        one.products[str(index)] = product


def _is_embedding(module: nn.Module) -> bool:
    return type(module) is nn.Embedding or hasattr(module, "embed_scale")


def _refuse_saving(*_: object, **__: object) -> None:
    raise UnsupportedError(
        "a model with deltas cannot be saved by transformers",
        hint="copy the folders of the base and of the deltas",
    )

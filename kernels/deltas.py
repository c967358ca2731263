"""One base and many fine-tunes of it in memory: each row of a batch picks one.

The base is loaded once, dense or packed. Of every delta its bits and factors are held as they are
stored, and a linear computes `y = W x + a (sign x) + U (V x)` for the rows that picked it; norms
and biases, which are stored whole, are exchanged. The product with signs unpacks them a few rows at
a time.

What is refused: deltas of experts, which transformers holds as 3-D parameters, and of a vocabulary
of another size than the base's.

Papers: D-QRELO, arXiv:2604.16940; serving many over one base, BitDelta, arXiv:2402.10193.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from unicomp import hub
from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.folder import quote
from unicomp.kernels import packed_model
from unicomp.kernels.blocked import Compute
from unicomp.kernels.delta import PackedDelta, unpack_signs
from unicomp.kernels.delta_folder import (
    DeltaFolder,
    check_base,
    open_delta,
    quantized_from_base,
)
from unicomp.kernels.linear import PackedLinear

BASE = -1  # the choice that means the base itself
PIECE = 1 << 20  # signs unpacked at once: 4 MB, which stay in the cache


@dataclass(slots=True)
class Choice:
    """Which delta each row of a batch takes: one number for all rows, or one a row."""

    rows: tuple[int, ...] = (BASE,)

    def groups(self, batch: int) -> list[tuple[int, Tensor | None]]:
        """Return (delta, its rows or None for all) of those that some row takes, base left out."""
        if len(self.rows) == 1:
            return [] if self.rows[0] == BASE else [(self.rows[0], None)]
        if len(self.rows) != batch:
            raise UnicompError(
                f"{len(self.rows)} rows were chosen for, the batch has {batch}",
                hint="choose one delta for all rows, or one for each",
            )
        kinds = torch.tensor(self.rows)
        return [(own, (kinds == own).nonzero()[:, 0]) for own in sorted({*self.rows} - {BASE})]


class DeltaProduct(nn.Module):
    """The delta of one weight as it is stored, ready to multiply.

    Buffers are those of `PackedDelta`; `state_dict` leaves them out: the delta's folder has them.
    """

    def __init__(self, packed: PackedDelta) -> None:
        super().__init__()
        self.shape = packed.shape
        self.count = len(packed.planes)
        for index, plane in enumerate(packed.planes):
            self.register_buffer(f"sign{index}", plane.sign, persistent=False)
            self.register_buffer(f"scale{index}", plane.scale, persistent=False)
        self.rank = 0 if packed.factors is None else packed.factors.u.shape[1]
        if packed.factors is not None:
            own = packed.factors
            for name in ("u", "v", "u_scale", "v_scale"):
                self.register_buffer(name, getattr(own, name), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, float32 [..., out], of floating [..., in]."""
        x = x.float()
        total = x.new_zeros(*x.shape[:-1], self.shape[0])
        step = max(1, PIECE // max(self.shape[1], 1))
        for index in range(self.count):
            sign, scale = getattr(self, f"sign{index}"), getattr(self, f"scale{index}")
            for start in range(0, self.shape[0], step):
                part = slice(start, start + step)
                own = unpack_signs(sign[part], self.shape[1]).to(x.dtype).mul_(2).sub_(1)
                by_row = scale[part, 0] if scale.ndim == 2 else scale
                total[..., part] += (x @ own.T) * by_row
        if self.rank:
            inner = x @ self._wide("v").T
            total += inner @ self._wide("u").T
        return total

    def rows(self, index: Tensor) -> Tensor:
        """Return rows of the delta, float32 [..., in], for int64 [...]: what an embedding adds."""
        total = torch.zeros(*index.shape, self.shape[1], device=index.device)
        for plane in range(self.count):
            sign, scale = getattr(self, f"sign{plane}"), getattr(self, f"scale{plane}")
            own = unpack_signs(sign[index.reshape(-1)], self.shape[1]).float().mul_(2).sub_(1)
            by_row = scale[index] if scale.ndim == 2 else scale
            total += own.view(total.shape) * by_row
        if self.rank:
            total += self._wide("u")[index] @ self._wide("v")
        return total

    def _wide(self, name: str) -> Tensor:
        values: Tensor = getattr(self, name).float()
        scale = getattr(self, f"{name}_scale")
        if scale is None:
            return values
        wide: Tensor = values * (scale if name == "u" else scale[:, None])
        return wide


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
        for delta, rows in self.choice.groups(len(x)):
            part = self.parts.get(delta)
            if part is None:
                continue
            own = x if rows is None else x[rows]
            out = found if rows is None else found[rows]
            out = self._changed(part, own, out)
            found = out if rows is None else found.index_copy(0, rows, out)
        return found

    def _changed(self, part: _Part, x: Tensor, out: Tensor) -> Tensor:
        if isinstance(self.inner, nn.Embedding):
            if part.product is None:
                return out
            scale = getattr(self.inner, "embed_scale", 1.0)  # of gemma3's embedding, inside it
            return (out + part.product.rows(x) * scale).to(out.dtype)
        if isinstance(self.inner, nn.Linear | PackedLinear):
            total = out.float()
            if part.product is not None:
                total = total + part.product(x)
            if "bias" in part.whole:
                bias: Any = self.inner.bias
                total = total + (part.whole["bias"].float() - bias.float())
            return total.to(out.dtype)
        changed: Tensor = torch.func.functional_call(self.inner, part.whole, (x,), strict=False)
        return changed


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

    base, device, backend, compute, dtype    as `unicomp.load` takes them
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
    choice = Choice((0,) if opened else (BASE,))
    homes = _Homes(model, choice)
    for index, delta in enumerate(opened):
        for name, stored in delta.manifest.tensors.items():
            if stored.kind != "same":
                _add(homes, index, delta, name)
    known: Any = model
    known.unicomp_choice, known.unicomp_deltas = choice, len(opened)
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
    choice.rows = wanted


class _Homes:
    """Finds the module of a stored tensor, and switches it on first use."""

    def __init__(self, model: PreTrainedModel, choice: Choice) -> None:
        self.model = model
        self.choice = choice
        self.prefix = f"{model.base_model_prefix}."
        self.tied = _tied(model)

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


def _add(homes: _Homes, index: int, delta: DeltaFolder, name: str) -> None:
    own = delta.manifest.tensors[name]
    module, _, kind = name.rpartition(".")
    if own.rows is not None and own.rows != own.shape[0]:
        raise UnsupportedError(
            f"`{delta.folder}`: `{quote(name)}` has other rows than the base's",
            hint="restore the fine-tune instead: `unicomp delta restore`",
        )
    if len(own.shape) > 2 or ".experts." in name or kind not in ("weight", "bias"):
        raise UnsupportedError(
            f"`{delta.folder}`: `{quote(name)}` is of experts, whose deltas are not served",
            hint="restore the fine-tune instead: `unicomp delta restore`",
        )
    switched = homes.of(module)
    if own.kind == "exact":
        if len(own.shape) > 1:
            raise UnsupportedError(
                f"`{delta.folder}`: `{quote(name)}` is a matrix stored whole, which is not served",
                hint="restore the fine-tune, or compress it without `ignore`",
            )
        for one in switched:
            held: Any = getattr(one.inner, kind)
            one.part(index).whole[kind] = delta.read(name).to(held.dtype)
        return
    product: DeltaProduct | None = None
    for one in switched:
        packed = delta.deltas(name)[0]
        held_by = type(one.inner)
        own_embedding = held_by is nn.Embedding or hasattr(one.inner, "embed_scale")
        if not own_embedding and not isinstance(one.inner, nn.Linear | PackedLinear):
            raise UnsupportedError(
                f"`{quote(name)}` is in a `{held_by.__name__}`, whose deltas are not served",
                hint="restore the fine-tune instead: `unicomp delta restore`",
            )
        product = DeltaProduct(packed) if product is None else product
        one.part(index).product = product
        one.products[str(index)] = product


def _refuse_saving(*_: object, **__: object) -> None:
    raise UnsupportedError(
        "a model with deltas cannot be saved by transformers",
        hint="copy the folders of the base and of the deltas",
    )

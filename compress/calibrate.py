"""Run a causal model one decoder layer at a time and gather statistics of its linears' inputs.

Only one layer's weights are in memory; hidden states lie in a file that the operating system
caches, so that memory is bounded by a batch and an interrupted run finds them again. The model's
own code computes everything: embeddings, masks and position embeddings come from its forward pass
with every layer replaced by a recorder, and each layer is then called with what it was given.
Within a layer the statistics are gathered step by step (q, k, v, then o, then gate and up, then
down), so every linear is solved for inputs that the already compressed linears before it produce.

No product is computed twice. Steps come in pairs (`models.py`): what q, k and v give reaches the
rest of the layer only through what o reads, and so with gate, up and down. What the second of a
pair reads is kept in a file when its statistics are gathered; later passes read it from there, and
the first of the pair then answers zeros, which nothing looks at.

Differs: Hessians are means of x.xT (GPTQ's code has a factor 2, which cancels). States and sums are
float32; the linears of a bfloat16 model multiply in bfloat16, as they will when the model is used,
where the processor has instructions for it.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from unicomp.compress.method import Stats
from unicomp.errors import CheckpointError
from unicomp.models import Layer, Linear, Model, Part


class Weights(Protocol):
    """Where plain weights are read from."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, in its stored dtype."""


class HiddenStates:
    """Hidden states of every calibration window, in a file.

    path    the file; made when written first
    shape   (windows, seq_len, hidden); float32
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        self.shape = shape

    @property
    def nbytes(self) -> int:
        """The file's size in bytes once it is whole."""
        windows, seq_len, width = self.shape
        return windows * seq_len * width * 4

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the windows in order, `size` at a time: float32 [size, seq_len, hidden]."""
        windows, seq_len, width = self.shape
        with self.path.open("rb", buffering=0) as file:
            for start in range(0, windows, size):
                batch = torch.empty(min(size, windows - start), seq_len, width)
                view = _bytes(batch)
                while view:
                    got = file.readinto(view)
                    if not got:
                        raise CheckpointError(
                            f"`{self.path}` is shorter than {self.nbytes} bytes",
                            hint="start over with --fresh",
                        )
                    view = view[got:]
                yield batch

    def write(self, batches: Iterator[Tensor]) -> int:
        """Write every window, in order; return the crc32 of the file's bytes."""
        crc = 0
        with self.path.open("wb", buffering=0) as file:
            for batch in batches:
                view = _bytes(batch)
                crc = zlib.crc32(view, crc)
                _write_all(file, view)
        return crc

    def crc32(self) -> int | None:
        """Return the crc32 of the file's bytes, or None where it is absent or of another size."""
        if not self.path.is_file() or self.path.stat().st_size != self.nbytes:
            return None
        crc = 0
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 22):
                crc = zlib.crc32(chunk, crc)
        return crc


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor; of its own memory if it is contiguous."""
    return memoryview(cast(Any, tensor.contiguous().numpy())).cast("B")


def _write_all(file: FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with, passes the states through."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: its parameters stay on meta
        self.seen: tuple[Tensor, tuple[Any, ...], dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        """Answer for the layer (`attention_type`, which some models ask of it)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.seen = (hidden, args, kwargs)
        return hidden


class _Experts(nn.ModuleList):
    """The experts of a layer as separate linears, so that each has an input of its own."""

    def __init__(
        self, count: int, names: tuple[str, str, str], activation: Callable[[Tensor], Tensor]
    ):
        super().__init__()
        self._names = names
        self.__dict__["activation"] = activation  # a module, but none of the experts
        for _ in range(count):
            self.append(nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in names}))

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden)
        for index, module in enumerate(self):
            token, slot = torch.where(top_k_index == index)
            if not token.numel():
                continue
            expert = cast(nn.ModuleDict, module)
            gate, up, down = (cast(nn.Linear, expert[name]) for name in self._names)
            states = hidden[token]
            states = down(self.__dict__["activation"](gate(states)) * up(states))
            total.index_add_(0, token, states * top_k_weights[token, slot, None])
        return total


class _HalfLinear(nn.Linear):
    """A linear that multiplies in bfloat16 and speaks float32."""

    def forward(self, states: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        product = nn.functional.linear(states.to(self.weight.dtype), self.weight).float()
        return product if bias is None else product + bias


class _InputsSeen(Exception):  # noqa: N818 - it is no error: it ends a forward pass early
    """Every input that was asked for has been seen."""


@dataclass(slots=True)
class _Call:
    """What the model calls one layer with, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Decoder:
    """A causal model on the meta device whose layers are brought into memory one at a time.

    model    what the checkpoint's tensors are
    config   config.json, without any quantization_config
    weights  where plain weights are read from
    batch    windows that are computed together
    scratch  folder for what the linears of a layer read
    half     linears multiply in bfloat16
    """

    def __init__(
        self,
        model: Model,
        config: Mapping[str, Any],
        weights: Weights,
        *,
        batch: int,
        scratch: Path,
        half: bool = False,
    ) -> None:
        self.model = model
        self.weights = weights
        self.batch = batch
        self.scratch = scratch
        self.half = half
        self._kept: dict[str, HiddenStates] = {}
        settings = CONFIG_MAPPING[model.type].from_dict(dict(config))
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        self._skeleton = skeleton.eval()
        self._layers = list(cast(nn.ModuleList, skeleton.get_submodule(model.architecture.layers)))
        self._calls: dict[int, list[_Call]] = {}

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Iterator[Tensor]:
        """Yield the first layer's input for every batch; learn how each layer is called.

        ids  int64 [windows, seq_len]
        """
        base = self._skeleton.base_model
        stack = cast(nn.ModuleList, self._skeleton.get_submodule(self.model.architecture.layers))
        recorders = [_Recorder(layer) for layer in self._layers]
        for index, recorder in enumerate(recorders):
            stack[index] = recorder
        held = self._load_outside(base, torch.unique(ids))
        try:
            for batch in torch.split(ids, self.batch):
                base(input_ids=batch, use_cache=False)
                seen = [cast(Any, recorder.seen) for recorder in recorders]
                self._calls[len(batch)] = [_Call(args, kwargs) for _, args, kwargs in seen]
                yield seen[0][0].float()
        finally:
            for index, layer in enumerate(self._layers):
                stack[index] = layer
            for module, leaf in held:
                _to_meta(module, leaf)

    def _load_outside(self, base: nn.Module, ids: Tensor) -> list[tuple[nn.Module, str]]:
        """Load what stands outside the layers; of the embedding only the rows of `ids`."""
        disk = {canonical: name for name, canonical in self.model.names.items()}
        embedding = self._skeleton.get_input_embeddings()
        held: list[tuple[nn.Module, str]] = []
        prefix = self.model.architecture.layers + "."
        for name, parameter in list(self._skeleton.named_parameters()):
            if name.startswith(prefix) or not parameter.is_meta:
                continue
            path, _, leaf = name.rpartition(".")
            module = self._skeleton.get_submodule(path)
            if module is self._skeleton.get_output_embeddings() and module is not embedding:
                continue
            if name not in disk:
                raise _missing(name)
            if module is embedding:
                value = self._rows(disk[name], parameter.shape, ids)
            else:
                value = self._finite(disk[name], self.weights.read(disk[name]))
            _assign(module, leaf, value, name)
            held.append((module, leaf))
        return held

    def _rows(self, name: str, shape: torch.Size, ids: Tensor) -> Tensor:
        """Return the embedding with only the rows of `ids` filled; the rest costs no memory."""
        table = torch.zeros(shape)  # untouched pages of a fresh allocation are not resident
        step = max(1, (1 << 26) // (shape[1] * 4))
        for start in range(0, shape[0], step):
            wanted = ids[(ids >= start) & (ids < start + step)]
            if wanted.numel():
                rows = self.weights.read(name, slice(start, min(start + step, shape[0])))
                table[wanted] = self._finite(name, rows[wanted - start])
        return table

    def load(self, layer: Layer) -> nn.Module:
        """Return the layer with its weights in float32; `release` it when done."""
        module = self._layers[layer.index]
        experts = self.model.architecture.experts
        used = [linear for linear in layer.linears() if linear.expert is not None]
        if experts is not None and used:
            parent, _, leaf = experts.path.rpartition(".")
            owner = module.get_submodule(parent)
            count = 1 + max(cast(int, linear.expert) for linear in used)
            setattr(
                owner, leaf, _Experts(count, experts.names, getattr(owner, leaf).act_fn).to("meta")
            )
        for linear in layer.linears():
            self.replace(module, linear, self.weight(linear))
        for inner, part in layer.others.items():
            path, _, leaf = inner.rpartition(".")
            value = self._finite(part.tensor, self.weights.read(part.tensor))
            _assign(_submodule(module, path, part.tensor), leaf, value, part.tensor)
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise _missing(f"{self.model.architecture.layers}.{layer.index}.{name}")
        return module

    def release(self, layer: Layer) -> None:
        """Give the layer's memory back, and the disk that its linears' inputs took."""
        for kept in self._kept.values():
            kept.path.unlink(missing_ok=True)
        self._kept = {}
        module = self._layers[layer.index]
        for child in module.modules():
            for leaf, value in list(child._parameters.items()):
                if value is not None:
                    _to_meta(child, leaf)

    def weight(self, linear: Linear) -> Tensor:
        """Return a linear's weight, float32 [out, in]; CheckpointError where it is not finite."""
        return read_weight(self.weights, linear)

    def replace(self, module: nn.Module, linear: Linear, weight: Tensor) -> None:
        """Put a weight [out, in] in a linear's place."""
        owner = _submodule(module, linear.inner, linear.part.tensor)
        stored = weight.T.contiguous() if linear.transposed else weight
        if isinstance(owner, nn.Linear) and owner.weight.shape != stored.shape:
            if linear.expert is None:
                raise _misshapen(linear.part.tensor, stored.shape, owner.weight.shape)
            owner.out_features, owner.in_features = stored.shape
        if self.half and isinstance(owner, nn.Linear):
            owner.__class__ = _HalfLinear
            stored = stored.bfloat16()
        owner.weight = nn.Parameter(stored, requires_grad=False)

    @torch.no_grad()
    def forward(self, module: nn.Module, layer: Layer, states: Tensor) -> Tensor:
        """Return the layer's output for one batch of hidden states."""
        call = self._calls[len(states)][layer.index]
        return cast(Tensor, module(states, *call.args, **call.kwargs))

    def record(
        self,
        layer: Layer,
        module: nn.Module,
        states: HiddenStates,
        after: HiddenStates,
        inputs: Mapping[str, HiddenStates],
    ) -> int:
        """Run the uncompressed layer over all windows, keeping what some linears read.

        states  the layer's inputs; `after` is written: its outputs
        inputs  inner name of a linear -> where its inputs are written
        returns  crc32 of `after`
        """
        with contextlib.ExitStack() as stack:
            for inner, target in inputs.items():
                file = stack.enter_context(target.path.open("wb", buffering=0))

                def keep(_: nn.Module, args: tuple[Any, ...], file: FileIO = file) -> None:
                    _write_all(file, _bytes(args[0].float()))

                handle = module.get_submodule(inner).register_forward_pre_hook(keep)
                stack.callback(handle.remove)
            return after.write(
                self.forward(module, layer, batch) for batch in states.batches(self.batch)
            )

    @torch.no_grad()
    def statistics(
        self,
        layer: Layer,
        module: nn.Module,
        shared: Sequence[Sequence[Linear]],
        states: HiddenStates,
        original: HiddenStates | None = None,
    ) -> list[Stats]:
        """Gather what is known of the inputs that each of `shared` reads, over all windows.

        module    the layer as compressed so far
        shared    linears that read one input, from one step of the layer; often just one such tuple
        states    the layer's inputs from the compressed layers before it
        original  what the one of `shared` reads in the uncompressed model, where the cross
                  statistic is wanted; never for experts, whose routes may differ
        """
        totals = [_Moments(linears[0].shape[1], original is not None) for linears in shared]
        others = None if original is None else original.batches(self.batch)
        reach = next(i for i, step in enumerate(layer.steps) if shared[0] in step)
        first = shared[0][0]
        with contextlib.ExitStack() as stack:
            turn = stack.enter_context(self._playing(layer, module, reach))
            file = None
            if first.expert is None and reach % 2:
                kept = HiddenStates(
                    self.scratch / f"kept-{first.inner}.bin", (*states.shape[:2], first.shape[1])
                )
                file = stack.enter_context(kept.path.open("wb", buffering=0))
            for batch in states.batches(self.batch):
                turn()
                found = self._inputs(layer, module, shared, batch)
                other = None if others is None else next(others)
                if file is not None:
                    _write_all(file, _bytes(found[0]))
                for position, total in enumerate(totals):
                    if position in found:
                        total.add(found[position], other)
        if file is not None:
            self._kept[first.inner] = kept
        return [total.stats() for total in totals]

    def outputs(
        self, layer: Layer, module: nn.Module, states: HiddenStates, after: HiddenStates
    ) -> int:
        """Write the outputs of a layer as compressed to `after`; return the crc32 of its bytes."""

        def batches(turn: Callable[[], None]) -> Iterator[Tensor]:
            for batch in states.batches(self.batch):
                turn()
                yield self.forward(module, layer, batch)

        with self._playing(layer, module, len(layer.steps)) as turn:
            return after.write(batches(turn))

    @contextlib.contextmanager
    def _playing(self, layer: Layer, module: nn.Module, reach: int) -> Iterator[Callable[[], None]]:
        """Let linears before the step `reach` read what was kept; call the result at each batch."""
        streams: dict[str, Iterator[Tensor]] = {}
        current: dict[str, Tensor] = {}
        changed: list[nn.Module] = []

        def read(target: nn.Module, inner: str) -> Callable[[Tensor], Tensor]:
            plain = target.forward
            return lambda given: cast(Tensor, plain(current[inner].reshape(given.shape)))

        def silent(features: int) -> Callable[[Tensor], Tensor]:
            return lambda given: given.new_zeros(*given.shape[:-1], features)

        for index in range(1, reach, 2):
            inner = layer.steps[index][0][0].inner
            if inner not in self._kept:
                continue
            streams[inner] = self._kept[inner].batches(self.batch)
            for linear in layer.steps[index][0]:
                target = module.get_submodule(linear.inner)
                target.__dict__["forward"] = read(target, inner)
                changed.append(target)
            for linear in layer.steps[index - 1][0]:
                target = module.get_submodule(linear.inner)
                target.__dict__["forward"] = silent(linear.shape[0])
                changed.append(target)

        def turn() -> None:
            current.update((inner, next(stream)) for inner, stream in streams.items())

        try:
            yield turn
        finally:
            for target in changed:
                del target.__dict__["forward"]

    def _inputs(
        self,
        layer: Layer,
        module: nn.Module,
        shared: Sequence[Sequence[Linear]],
        batch: Tensor,
    ) -> dict[int, Tensor]:
        """Run a layer until the inputs of `shared` are known; experts may have seen none."""
        found: dict[int, Tensor] = {}
        routed = shared[0][0].expert is not None

        def hook(position: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def see(_: nn.Module, args: tuple[Any, ...]) -> None:
                found[position] = args[0].reshape(-1, args[0].shape[-1])
                if not routed and len(found) == len(shared):
                    raise _InputsSeen

            return see

        handles = [
            module.get_submodule(linears[0].inner).register_forward_pre_hook(hook(position))
            for position, linears in enumerate(shared)
        ]
        try:
            self.forward(module, layer, batch)
        except _InputsSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _finite(self, name: str, value: Tensor) -> Tensor:
        return finite(name, value)


class _Moments:
    """Running sums of one input's second moments, upper triangle only."""

    STRIP = 512  # columns a product; the strips below the diagonal are skipped

    def __init__(self, columns: int, cross: bool) -> None:
        self.tokens = 0
        self.second = torch.zeros(columns, columns)
        self.cross = torch.zeros(columns, columns) if cross else None

    def add(self, inputs: Tensor, original: Tensor | None) -> None:
        inputs = inputs.float()
        self.tokens += len(inputs)
        for start in range(0, inputs.shape[1], self.STRIP):
            strip = inputs[:, start : start + self.STRIP]
            self.second[start : start + self.STRIP, start:].addmm_(strip.T, inputs[:, start:])
        if self.cross is not None and original is not None:
            self.cross.addmm_((original.reshape(inputs.shape) - inputs).T, inputs)

    def stats(self) -> Stats:
        """Return the means."""
        tokens = max(self.tokens, 1)
        for start in range(0, len(self.second), self.STRIP):
            stop = start + self.STRIP
            block = self.second[start:stop, start:stop]
            block.copy_(torch.triu(block) + torch.triu(block, 1).T)
            self.second[stop:, start:stop] = self.second[start:stop, stop:].T
        self.second /= tokens
        if self.cross is not None:
            self.cross /= tokens
        return Stats(self.tokens, self.second, self.cross)


def read_weight(weights: Weights, linear: Linear) -> Tensor:
    """Return a linear's weight, float32 [out, in]; CheckpointError where it is not finite."""
    value = read_part(weights, linear.part)
    value = finite(linear.part.tensor, value)
    return (value.T if linear.transposed else value).contiguous()


def read_part(weights: Weights, part: Part) -> Tensor:
    """Return a whole tensor, or the rows of one expert, in its stored dtype."""
    if part.expert is None:
        return weights.read(part.tensor)
    value = weights.read(part.tensor, slice(part.expert, part.expert + 1))[0]
    return value if part.rows is None else value[slice(*part.rows)]


def finite(name: str, value: Tensor) -> Tensor:
    """Return the tensor in float32; CheckpointError where it holds NaN or Inf."""
    value = value.float()
    if not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        first = (~torch.isfinite(value)).nonzero()[0].tolist()
        raise CheckpointError(
            f"tensor `{name}` holds {bad} values that are NaN or Inf, the first at {first}",
            hint="the checkpoint is damaged or was trained to divergence; "
            "download it again or use an earlier one",
        )
    return value


def _submodule(module: nn.Module, path: str, tensor: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError:
        raise CheckpointError(
            f"tensor `{tensor}` has no place in the model that config.json describes",
            hint="the weight files do not fit config.json; take both from one checkpoint",
        ) from None


def _assign(module: nn.Module, leaf: str, value: Tensor, tensor: str) -> None:
    held = module._parameters.get(leaf)
    if held is None:
        raise CheckpointError(
            f"tensor `{tensor}` has no place in the model that config.json describes",
            hint="the weight files do not fit config.json; take both from one checkpoint",
        )
    if held.shape != value.shape:
        raise _misshapen(tensor, value.shape, held.shape)
    module._parameters[leaf] = nn.Parameter(value.float(), requires_grad=False)


def _to_meta(module: nn.Module, leaf: str) -> None:
    held = module._parameters[leaf]
    if held is not None:
        module._parameters[leaf] = nn.Parameter(held.to("meta"), requires_grad=False)


def _missing(name: str) -> CheckpointError:
    return CheckpointError(
        f"tensor `{name}` is missing from the checkpoint",
        hint="config.json promises it; download the checkpoint again",
    )


def _misshapen(tensor: str, found: torch.Size, wanted: torch.Size) -> CheckpointError:
    return CheckpointError(
        f"tensor `{tensor}` has shape {list(found)}, config.json asks for {list(wanted)}",
        hint="the weight files do not fit config.json; take both from one checkpoint",
    )

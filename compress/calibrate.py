"""Run a causal model one decoder layer at a time and gather statistics of its linears' inputs.

Only one layer's weights are in memory; hidden states lie in a file that the operating system
caches, so that an interrupted run finds them again. The model's
own code computes everything: embeddings, masks and position embeddings come from its forward pass
with every layer replaced by a recorder, and each layer is then called with what it was given.
Within a layer the statistics are gathered step by step (q, k, v, then o, then gate and up, then
down), so every linear is solved for inputs that the already compressed linears before it produce.

No product is computed twice. Steps come in pairs (`models.py`): what q, k and v give reaches the
rest of the layer only through what o reads, and so with gate, up and down. What the second of a
pair reads is kept when its statistics are gathered; in later passes the module that owns
the pair (attention, MLP) answers with the second linear of what was kept, and nothing else is run;
that answer is kept in its turn where another pass will want it.

Differs: Hessians are means of x.xT (GPTQ's code has a factor 2, which cancels). States and sums are
float32; the linears and the attention of a bfloat16 model multiply in bfloat16, as they will when
the model is used, where the processor has instructions for it, and so do the second moments of what
they read.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from unicomp import machine
from unicomp.checkpoint import check_finite
from unicomp.compress.deferred import Deferred
from unicomp.compress.method import Need, Stats
from unicomp.compress.moments import Moments, Norms
from unicomp.compress.states import HiddenStates
from unicomp.errors import CheckpointError
from unicomp.models import Layer, Linear, Model, Part

Put = Callable[[Tensor], None]


class Weights(Protocol):
    """Where plain weights are read from."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Return a tensor, or some of its rows, in its stored dtype."""


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


class Experts(nn.ModuleList):
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
        """Return what the chosen experts make of each token, [tokens, hidden]."""
        total = torch.zeros_like(hidden)
        for index, module in enumerate(self):
            token, slot = torch.where(top_k_index == index)
            if not token.numel() and not torch.is_grad_enabled():
                continue  # in training whoever saw nothing has a gradient too: zeros
            expert = cast(nn.ModuleDict, module)
            gate, up, down = (cast(nn.Linear, expert[name]) for name in self._names)
            states = hidden[token]
            states = down(self.__dict__["activation"](gate(states)) * up(states))
            total.index_add_(0, token, states * top_k_weights[token, slot, None])
        return total


class _HalfLinear(nn.Linear):
    """A linear that multiplies in bfloat16; it answers in float32 unless told otherwise."""

    answers: torch.dtype = torch.float32

    def forward(self, states: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        version, half = getattr(states, "unicomp_half", (None, states))
        if states.dtype != self.weight.dtype and version != states._version:
            half = states.to(self.weight.dtype)  # q, k and v read one input: once is enough
            states.unicomp_half = states._version, half  # type: ignore[attr-defined]
        product = nn.functional.linear(half, self.weight)
        if bias is not None:
            product = product.float() + bias
        return product.to(self.answers)


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
    scratch  folder for what is kept of a layer; None: it is kept in memory
    half     linears multiply in bfloat16
    between  bytes that may be resident when a pass over the layer begins or ends: where it is more,
             freed memory is returned, which costs time; None: only after each layer
    """

    def __init__(
        self,
        model: Model,
        config: Mapping[str, Any],
        weights: Weights,
        *,
        batch: int,
        scratch: Path | None,
        half: bool = False,
        between: int | None = None,
    ) -> None:
        # Here, not above: plans import this file for its types, and are to be quick and small.
        from accelerate import init_empty_weights
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        from unicomp.kernels import attention

        self.model = model
        self.weights = weights
        self.batch = batch
        self.scratch = scratch
        self.half = half
        self.between = between
        self._dtype = torch.bfloat16 if half else torch.float32
        self._kept: dict[str, HiddenStates] = {}
        self._answers: dict[str, HiddenStates] = {}
        self._rooms: dict[tuple[object, ...], HiddenStates] = {}
        settings = CONFIG_MAPPING[model.type].from_dict(dict(config))
        with init_empty_weights(include_buffers=False):
            skeleton = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        if half and skeleton.config._attn_implementation == "sdpa":
            skeleton.set_attn_implementation(attention.HALF)
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
                owner, leaf, Experts(count, experts.names, getattr(owner, leaf).act_fn).to("meta")
            )
        for linear in layer.linears():
            self.replace(module, linear, self.weight(linear))
        for shared in layer.steps[-2] if self.half else ():
            for linear in shared:  # what gate and up give goes to down, which rounds it anyway
                module.get_submodule(linear.inner).__dict__["answers"] = torch.bfloat16
        for inner, part in layer.others.items():
            path, _, leaf = inner.rpartition(".")
            value = self._finite(part.tensor, self.weights.read(part.tensor))
            _assign(_submodule(module, path, part.tensor), leaf, value, part.tensor)
        for name, parameter in module.named_parameters():
            if parameter.is_meta:
                raise _missing(f"{self.model.architecture.layers}.{layer.index}.{name}")
        return module

    def release(self, layer: Layer) -> None:
        """Give the layer's memory back; what its linears read is overwritten by the next."""
        self._kept, self._answers = {}, {}
        module = self._layers[layer.index]
        for child in module.modules():
            for leaf, value in list(child._parameters.items()):
                if value is not None:
                    _to_meta(child, leaf)
        machine.return_freed_memory()  # else what lies between grows from layer to layer

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
        return self.call(module, layer, states)

    def call(self, module: nn.Module, layer: Layer, states: Tensor) -> Tensor:
        """Return the same, with its gradient."""
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
        with self._pass() as stack:
            for inner, target in inputs.items():
                put = stack.enter_context(target.filling())

                def keep(_: nn.Module, args: tuple[Any, ...], put: Put = put) -> None:
                    put(args[0])

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
        *,
        needs: frozenset[Need] = frozenset({Need.HESSIAN}),
        skip: int = 0,
    ) -> list[Stats]:
        """Gather what is known of the inputs that each of `shared` reads, over all windows.

        module    the layer as compressed so far
        shared    linears that read one input, from one step of the layer; often just one such tuple
        states    the layer's inputs from the compressed layers before it
        original  what the one of `shared` reads in the uncompressed model, where the cross
                  statistic is wanted; never for experts, whose routes may differ
        needs     what to gather
        skip      tokens at the start of each window that do not count, but for experts, who do
                  not see where a token stands
        """
        others = None if original is None else original.batches(self.batch)
        reach = next(i for i, step in enumerate(layer.steps) if shared[0] in step)
        first = shared[0][0]
        totals: list[Moments | Norms] = [
            Moments(linears[0].shape[1], original is not None)
            if Need.HESSIAN in needs
            else Norms(linears[0].shape[1])
            for linears in shared
        ]
        with self._pass() as stack:
            turn = stack.enter_context(self._playing(layer, module, reach))
            put = None
            if first.expert is None and reach % 2:
                shape = (*states.shape[:2], first.shape[1])
                kept = self._room(f"kept-{first.inner}", shape, self._dtype)
                put = stack.enter_context(kept.filling())
            for batch in states.batches(self.batch):
                turn()
                found = {
                    position: seen.to(self._dtype)
                    for position, seen in self._inputs(layer, module, shared, batch).items()
                }
                other = None if others is None else next(others)
                if skip and other is not None:
                    other = other[:, skip:]
                if put is not None:
                    put(found[0])
                for position, total in enumerate(totals):
                    if position in found:
                        seen = found[position]
                        if skip and first.expert is None:
                            seen = seen.view(*batch.shape[:2], -1)[:, skip:].flatten(0, 1)
                        total.add(seen, other)
        if put is not None:
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

        with self._pass() as stack:
            turn = stack.enter_context(self._playing(layer, module, len(layer.steps)))
            return after.write(batches(turn))

    @contextlib.contextmanager
    def _pass(self) -> Iterator[contextlib.ExitStack]:
        """Keep what is resident before and after a pass below `between`."""
        self._settle()
        with contextlib.ExitStack() as stack:
            yield stack
        self._settle()

    def _settle(self) -> None:
        if self.between is not None and machine.resident_bytes() > self.between:
            machine.return_freed_memory()

    @contextlib.contextmanager
    def _playing(self, layer: Layer, module: nn.Module, reach: int) -> Iterator[Callable[[], None]]:
        """Let linears before the step `reach` read what was kept; call the result at each batch."""
        streams: dict[str, Iterator[Tensor]] = {}
        current: dict[str, Tensor] = {}
        changed: list[nn.Module] = []
        files = contextlib.ExitStack()

        def replay(target: nn.Module, answer: Callable[..., object]) -> None:
            target.__dict__["forward"] = answer
            changed.append(target)

        def read(linear: nn.Module, inner: str) -> Callable[[Tensor], Tensor]:
            plain = linear.forward
            return lambda given: cast(Tensor, plain(current[inner].reshape(given.shape)))

        def silent(features: int) -> Callable[[Tensor], Tensor]:
            return lambda given: given.new_zeros(*given.shape[:-1], features)

        def owner_of(linear: nn.Module, inner: str, pair: int) -> Callable[..., object]:
            put = None
            if inner in self._kept and reach < len(layer.steps):
                exact = isinstance(linear, _HalfLinear) and linear.bias is None
                shape = (*self._kept[inner].shape[:2], layer.steps[2 * pair + 1][0][0].shape[0])
                dtype = torch.bfloat16 if exact else torch.float32
                made[inner] = self._room(f"answer-{inner}", shape, dtype)
                put = files.enter_context(made[inner].filling())

            def forward(*_: object, **__: object) -> object:
                found = current[inner]
                if inner in self._kept:
                    found = linear(found)
                    if put is not None:
                        put(found)
                found = found.float()
                return found if pair else (found, None)  # attention has its weights to show

            return forward

        made: dict[str, HiddenStates] = {}
        for index in range(1, reach, 2):
            inner = layer.steps[index][0][0].inner
            stream = self._kept.get(inner) or self._answers.get(inner)
            if stream is None:
                continue
            streams[inner] = stream.batches(self.batch)
            linear = module.get_submodule(inner)
            owner = inner.rpartition(".")[0]
            if owner:
                replay(module.get_submodule(owner), owner_of(linear, inner, index // 2))
                continue
            replay(linear, read(linear, inner))
            for before in layer.steps[index - 1][0]:
                replay(module.get_submodule(before.inner), silent(before.shape[0]))
        for child in module.children() if streams else ():
            if _is_norm(child):  # what nobody reads now need not be computed
                replay(child, partial(Deferred.of, compute=child.forward))

        def turn() -> None:
            current.update((inner, next(stream)) for inner, stream in streams.items())

        try:
            with files:
                yield turn
        finally:
            for target in changed:
                del target.__dict__["forward"]
        for inner, answers in made.items():  # they stand for what was kept
            self._answers[inner] = answers
            del self._kept[inner]

    def _room(self, name: str, shape: tuple[int, int, int], dtype: torch.dtype) -> HiddenStates:
        """Return room for what all windows have at one place of a layer; the next uses it again."""
        path = None if self.scratch is None else self.scratch / f"{name}.bin"
        if (name, shape, dtype) not in self._rooms:
            self._rooms[name, shape, dtype] = HiddenStates(path, shape, dtype)
        return self._rooms[name, shape, dtype]

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


def _is_norm(module: nn.Module) -> bool:
    """Tell whether a module has gains for each channel and nothing else."""
    own = list(module.parameters())
    return bool(own) and not list(module.children()) and all(one.dim() == 1 for one in own)


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
    check_finite(name, value)
    return value.float()


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

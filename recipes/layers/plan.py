"""Recipe + checkpoint headers -> plan: every tensor's fate and why, bytes, memory and time.

No weight is read. The plan decides what a run later does, module by module, so that what it says
and what happens cannot differ: schemes, what stays dense and for which reason, the exact bytes of
the output, how many windows are computed together under a memory limit. Memory is forecast as a
sum of named parts; time from counted operations and rates measured on this machine.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unicomp import machine
from unicomp.checkpoint import DTYPE_BITS, DTYPES, TORCH_NAMES, Checkpoint, is_float
from unicomp.compress import counted
from unicomp.compress.method import LayerMethod, Need, PruneMethod, QuantizeMethod
from unicomp.compress.sparsity import Sparsity, notes, parse
from unicomp.errors import CheckpointError, UnicompError, UnsupportedError
from unicomp.hub import Source, resolve
from unicomp.kernels import format as formats
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.kernels.format import Format, Settled, Wish
from unicomp.kernels.packed import Scheme
from unicomp.models import Layer, Linear, Model, context_length, describe
from unicomp.recipes.layers import timing
from unicomp.recipes.layers.forecast import hidden_bytes, hidden_size, memory
from unicomp.recipes.lint.output import Output
from unicomp.recipes.lint.rules import refusals
from unicomp.recipes.schema import Recipe, Stage
from unicomp.recipes.stage import throughput
from unicomp.recipes.stage.planned import Fate, Planned
from unicomp.writer import Meta

if TYPE_CHECKING:
    import torch

# Axes whose scores need a text that no recipe names yet; only the builtin models bring one.
READING = ("accuracy", "fidelity", "calibration", "safety")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(Planned):
    """What a run will do; `to_json` is what the user sees of it.

    pruning         a stage that is carried out in the same pass, before it
    fates           name -> what becomes of it, for every tensor, in the order of the output
    schemes         module -> scheme, for every linear that is quantized
    stacked         layers whose dense experts are written as two 3-D tensors
    moment_bytes    most memory that one pass's statistics may take
    held            what is kept of a layer stays in memory
    between         bytes that may be resident between two passes over a layer
    half            linears multiply in bfloat16 while the calibration text runs through them
    scored          axes that the result is scored on, against the source
    held_out        the text to score on, as `unicomp.text.read` takes it; None: there is none
    """

    method: LayerMethod
    pruning: Stage | None
    format: Format
    fates: Mapping[str, Fate]
    schemes: Mapping[str, Scheme]
    stacked: frozenset[int]
    moment_bytes: int
    held: bool
    between: int
    half: bool
    scored: tuple[str, ...]
    held_out: str | None

    @property
    def stages(self) -> list[Stage]:
        """What is carried out, in order."""
        return [self.stage] if self.pruning is None else [self.pruning, self.stage]

    @property
    def pruner(self) -> PruneMethod | None:
        """The options of the stage that is carried out in the same pass."""
        options = None if self.pruning is None else self.pruning.options
        return options if isinstance(options, PruneMethod) else None

    @property
    def targets(self) -> dict[str, Scheme | Sparsity]:
        """Module -> how it is quantized or pruned."""
        sparse = {name: f.sparsity for name, f in self.fates.items() if f.sparsity is not None}
        return {**sparse, **self.schemes}

    @property
    def bytes_in(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(fate.bytes_in for fate in self.fates.values())

    @property
    def bytes_out(self) -> int:
        """Bytes of all tensors of the output."""
        return sum(fate.bytes_out for fate in self.fates.values())

    @property
    def params(self) -> int:
        """Parameters of the model: elements of all its plain tensors."""
        return sum(math.prod(fate.shape) for fate in self.fates.values())

    @property
    def sha256(self) -> str:
        """Hash of what will be done: the recipe and every tensor's fate."""
        content = {"recipe": self.recipe.to_dict(), "fates": list(self.rows())}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def layout(self, some: Collection[str] | None = None) -> list[Meta]:
        """Return every tensor of the output, in the order in which shards are filled.

        some  linears to leave the others out of; None: all
        """
        plain = {canonical: name for name, canonical in self.model.names.items()}
        linears = {one.module: one for one in self._linears(some)}
        stacks: dict[str, list[Meta]] = {}
        for layer in self.model.layers:
            if layer.index in self.stacked:
                experts = [one.module for one in layer.linears() if one.expert is not None]
                stacks |= {name: [] for name in experts} | {experts[0]: self._stack(layer)}
        metas: list[Meta] = []
        for fate in self.fates.values():
            if fate.role == "linear" and fate.name not in linears:
                continue
            if fate.scheme is not None:
                shape = linears[fate.name].shape
                metas += self.format.layout(fate.name, shape, fate.scheme, self.dtype)
            elif fate.role == "linear":
                linear = linears[fate.name]
                if linear.module in stacks:
                    metas += stacks.pop(linear.module)
                    continue
                stored = self.dense.tensors[linear.part.tensor]
                shape = linear.shape[::-1] if linear.transposed else linear.shape
                metas.append(Meta(f"{fate.name}.weight", stored.dtype, shape))
            else:
                stored = self.dense.tensors[plain[fate.name]]
                metas.append(Meta(fate.name, stored.dtype, tuple(stored.shape)))
        return metas

    def _stack(self, layer: Layer) -> list[Meta]:
        """Return the two tensors of a layer's dense experts."""
        (gate, up), (down,) = layer.steps[-2][0], layer.steps[-1][0]
        stored = self.dense.tensors[gate.part.tensor].dtype
        count = len(layer.steps[-1])
        both, columns = gate.shape[0] + up.shape[0], gate.shape[1]
        path = self.stack_path(layer.index)
        return [
            Meta(f"{path}.gate_up_proj", stored, (count, both, columns)),
            Meta(f"{path}.down_proj", stored, (count, *down.shape)),
        ]

    def stack_path(self, layer: int) -> str:
        """Return the name, in the transformers model, under which a layer's experts stand."""
        row = self.model.architecture
        if row.experts is None:
            raise ValueError(f"{self.model.type} has no experts")
        return f"{row.layers}.{layer}.{row.experts.path}"

    @property
    def dtype(self) -> str:
        """The dtype in which loaders hold the model, as safetensors writes it."""
        return _dtype(self.dense, self.model)

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype in which scales are stored."""
        return DTYPES[self.format.scale_dtype(self.dtype)]

    def config(self, some: Collection[str] | None = None) -> dict[str, Any]:
        """Return the output's config.json.

        some  linears to leave the others out of; None: all
        """
        linears = [fate.name for fate in self.fates.values() if fate.role == "linear"]
        if some is not None:
            linears = [name for name in linears if name in some]
        dense = [*(name for name in linears if name not in self.schemes), "lm_head"]
        schemes = {name: self.schemes[name] for name in linears if name in self.schemes}
        config = dict(self.dense.config)
        if schemes:
            config["quantization_config"] = self.format.config(schemes, dense)
        return config

    def output(self, some: Collection[str] | None = None) -> Output:
        """Return what a loader will find.

        some  linears to leave the others out of; None: all
        """
        known = {one.module: one.shape for one in self._linears(some)}
        metas = {meta.name: meta for meta in self.layout(some)}
        return Output(self.config(some), metas, known)

    def _linears(self, some: Collection[str] | None) -> Iterator[Linear]:
        return (one for one in self.model.linears() if some is None or one.module in some)

    def loaders(self) -> dict[str, str | None]:
        """Return stock loader -> why it does not take the output; None: it does.

        Of layers that are alike, and of a layer's experts, one is asked: to ask all of a large
        model would take longer than the rest of its plan.
        """
        some: set[str] = set()
        layers = set()
        for layer in self.model.layers:
            parts: dict[int | None, list[Linear]] = {}
            for linear in layer.linears():
                parts.setdefault(linear.expert, []).append(linear)
            own = {tuple(map(self._alike, linears)): linears for linears in parts.values()}
            if (key := frozenset(own)) not in layers:
                layers.add(key)
                some.update(linear.module for linears in own.values() for linear in linears)
        return refusals(self.output(some))

    def _alike(self, linear: Linear) -> tuple[object, ...]:
        """Return what two linears have in common that loaders cannot tell apart but by number."""
        fate = self.fates[linear.module]
        leaf = linear.module.rpartition(".")[2]
        return leaf, fate.shape, fate.scheme, fate.bytes_out, linear.expert is None

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values."""
        return {**self.figures(), "tensors": list(self.rows())}

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield what becomes of each tensor, as plain JSON values."""
        return (fate.to_json() for fate in self.fates.values())


def plan(
    recipe: Recipe,
    *,
    model: str | None = None,
    text: str | None = None,
    max_memory: int | None = None,
) -> Plan:
    """Work out what a recipe does to a model, from headers only.

    model       instead of the recipe's
    text        the recipe as the user wrote it; default: as `recipe.dump()` writes it
    max_memory  bytes of resident memory that the run may take

    Raises RecipeError or UnicompError where the recipe cannot be carried out on this model or
    within `max_memory`.
    """
    source = find_source(recipe, model)
    checkpoint = Checkpoint.open(source.folder)
    return plan_source(recipe, text, source, checkpoint, open_dense(checkpoint), max_memory)


def find_source(recipe: Recipe, model: str | None) -> Source:
    """Return where the model is: the one given, else the recipe's; UnicompError without any."""
    wanted = model or recipe.model
    if wanted is None:
        raise UnicompError(
            "the recipe names no model", hint="add `model:`, or give MODEL on the command line"
        )
    return resolve(wanted)


def plan_source(
    recipe: Recipe,
    text: str | None,
    source: Source,
    checkpoint: Checkpoint,
    dense: DenseSource,
    max_memory: int | None,
) -> Plan:
    """Work out what a recipe does to plain weights, of which names and shapes are enough.

    dense  the weights of `checkpoint`, or what an earlier stage will make of them

    Raises as `plan` does.
    """
    pruning, stage = _stages(recipe)
    method = _layer_method(stage)
    asked = method if pruning is None else pruning.options
    pruner = asked if isinstance(asked, PruneMethod) else None
    description = describe(dense.config, dense.tensors)
    if recipe.calibration is not None:
        text_settled = recipe.calibration.settled(context_length(dense.config))
        recipe = recipe.model_copy(update={"calibration": text_settled})
    modules = [linear.module for linear in description.linears()]
    for one in {id(method): method, id(pruner): pruner or method}.values():
        _check_patterns(one, modules)
    loaders = {re.split(r"[=!~<>]", target)[0] for target in recipe.target}
    if isinstance(method, QuantizeMethod):
        settled = formats.find(recipe.format).settle(_wishes(description, method), loaders)
    else:
        settled = _as_it_is(recipe, description)
    made = _fates(dense, description, settled, pruner)
    fates = {fate.name: fate for fate in made}
    schemes = {name: fate.scheme for name, fate in fates.items() if fate.scheme is not None}
    sparse = {name for name, fate in fates.items() if fate.sparsity}
    targets = schemes.keys() | sparse if sparse else schemes.keys()
    if not targets or (pruner and not sparse):
        raise _nothing(pruner or method, fates)
    scored, held_out = what_is_scored(recipe, source)
    # GPT-2's Conv1D has no product in bfloat16 of its own here.
    plain = not any(linear.transposed for linear in description.linears())
    half = plain and _dtype(dense, description) == "BF16" and machine.multiplies_bfloat16()
    chosen = memory(recipe, method, dense, description, targets, max_memory, bool(held_out), half)
    out = sum(fate.bytes_out for fate in fates.values())
    rates = throughput.rates()
    times = timing.times(
        recipe, method, dense, description, targets, half=half, bytes_out=out, rates=rates
    )
    disk = hidden_bytes(recipe, method, dense, description, targets, chosen.held)
    if pruner is not None and pruner.allocates() and recipe.calibration is not None:
        layers, width = description.layers, hidden_size(dense.config)
        tokens = recipe.calibration.samples * recipe.calibration.length
        head = width * int(dense.config.get("vocab_size") or 0)
        measuring = counted.sharing_operations(layers, targets, tokens, head)
        times["sharing out"] = measuring / (rates.half if half else rates.product)
        disk += counted.sharing_bytes(layers, targets, tokens, width)
    return Plan(
        recipe=recipe,
        text=recipe.dump() if text is None else text,
        stage=stage,
        method=method,
        pruning=pruning,
        source=source,
        dense=dense,
        checkpoint=checkpoint,
        model=description,
        format=settled.format,
        stacked=_stacked(description, settled),
        fates=fates,
        schemes=schemes,
        batch=chosen.batch,
        moment_bytes=chosen.moment_bytes,
        held=chosen.held,
        between=chosen.between,
        half=half,
        memory=chosen.parts,
        disk_bytes=out + disk,
        times=times,
        basis=timing.words(times, rates),
        scored=scored,
        held_out=held_out,
        notes=(*dense.notes, *_notes(description, method, pruner, recipe, fates, source)),
    )


def what_is_scored(recipe: Recipe, source: Source) -> tuple[tuple[str, ...], str | None]:
    """Return the axes to score after the run, and the text for those that read one."""
    if source.id.startswith("builtin:"):
        reads = any(axis in READING for axis in recipe.score)
        return tuple(recipe.score), "builtin:tinyworld" if reads else None
    return tuple(axis for axis in recipe.score if axis not in READING), None


def _stages(recipe: Recipe) -> tuple[Stage | None, Stage]:
    """Return the stage to carry out, and one that is carried out in the same pass before it."""
    if len(recipe.stages) == 1:
        return None, recipe.stages[0]
    first, last = recipe.stages[0], recipe.stages[-1]
    if len(recipe.stages) == 2 and fuse(first, last):
        return first, last
    words = ", ".join(f"{stage.verb}: {stage.method}" for stage in recipe.stages)
    raise UnsupportedError(
        f"these stages cannot be carried out in one run: {words}",
        hint="run them one after another, each on the folder that the last one made; "
        "`prune` and then `quantize: gptq` go together",
    )


def fuse(first: Stage, last: Stage) -> bool:
    """Tell whether two stages go in one pass: zeros and grid chosen together."""
    prune, quantize = first.options, last.options
    return (
        isinstance(prune, PruneMethod)
        and isinstance(quantize, QuantizeMethod)
        and not prune.spread()
        and (Need.HESSIAN in quantize.wants() or not prune.wants())
    )


def _layer_method(stage: Stage) -> LayerMethod:
    if not isinstance(stage.options, LayerMethod):
        raise UnsupportedError(
            f"`{stage.verb}` is no stage of a recipe that runs yet",
            hint="use `quantize` or `prune`",
        )
    return stage.options


def _as_it_is(recipe: Recipe, model: Model) -> Settled:
    """Return how a checkpoint without quantized weights is stored: as transformers holds it."""
    experts = model.architecture.experts
    stacked = tuple(
        f"{model.architecture.layers}.{layer.index}.{experts.path}"
        for layer in model.layers
        if experts is not None and any(one.expert is not None for one in layer.linears())
    )
    schemes: dict[str, Scheme | None] = {linear.module: None for linear in model.linears()}
    return Settled(format=formats.find(recipe.format), schemes=schemes, stacked=stacked)


def _nothing(method: LayerMethod, fates: Mapping[str, Fate]) -> UnicompError:
    done = "pruned" if isinstance(method, PruneMethod) else "quantized"
    whys = sorted({fate.why for fate in fates.values() if fate.role == "linear" and fate.why})
    return UnicompError(
        f"nothing would be {done}: {'; '.join(whys)}",
        hint="see `unicomp plan` for each module's reason",
    )


def _check_patterns(method: LayerMethod, modules: list[str]) -> None:
    unmatched = method.unmatched(modules)
    if unmatched:
        listed = ", ".join(f"`{pattern}` under `{key}`" for key, pattern in unmatched)
        example = modules[len(modules) // 2]
        raise UnicompError(
            f"no module matches {listed}",
            hint=f"a pattern is a full name such as `{example}`, its last part "
            f"`{example.rpartition('.')[2]}`, or `re:` and a regular expression for the full name",
        )


def _dtype(dense: DenseSource, model: Model) -> str:
    named = dense.config.get("dtype") or dense.config.get("torch_dtype")
    for name, own in TORCH_NAMES.items():
        if own == named:
            return name
    return dense.tensors[next(model.linears()).part.tensor].dtype


def _fates(
    dense: DenseSource, model: Model, settled: Settled, pruner: PruneMethod | None
) -> Iterator[Fate]:
    """Yield every tensor's fate: embeddings first, then layer by layer, then the rest."""
    prefix = model.architecture.layers + "."
    outside = [name for name in model.names if not model.names[name].startswith(prefix)]
    early = [name for name in outside if model.roles[name] == "embedding"]
    dtype = _dtype(dense, model)
    for name in early:
        yield _kept(dense, model, name)
    for layer in model.layers:
        for part in layer.others.values():
            yield _kept(dense, model, part.tensor)
        for linear in layer.linears():
            yield _linear(dense, linear, settled, pruner, dtype)
    for name in outside:
        if name not in early:
            yield _kept(dense, model, name)


IGNORED = "ignored by the recipe"
_WHY = {
    "embedding": "an embedding is a table: no product reads it whole",
    "head": "the head decides every token: kept unless a format and a loader take it",
    "norm": "a vector",
    "bias": "a vector",
    "router": "a router decides which expert computes",
}


def _kept(dense: DenseSource, model: Model, name: str) -> Fate:
    stored = dense.tensors[name]
    role = model.roles[name]
    size = stored.nbytes
    why = _WHY.get(role, "no linear of a decoder layer")
    return Fate(model.names[name], role, tuple(stored.shape), None, why, size, size)


def _wishes(model: Model, method: QuantizeMethod) -> list[Wish]:
    return [
        Wish(
            linear.module,
            linear.shape,
            method.scheme(linear.module),
            transposed=linear.transposed,
            expert=linear.expert is not None,
        )
        for linear in model.linears()
    ]


def _linear(
    dense: DenseSource, linear: Linear, settled: Settled, pruner: PruneMethod | None, dtype: str
) -> Fate:
    stored = dense.tensors[linear.part.tensor]
    if not is_float(stored.dtype):
        raise CheckpointError(
            f"tensor `{linear.part.tensor}` of dtype `{stored.dtype}` is no weight",
            hint="config.json has no `quantization_config` that says what these integers mean; "
            "use the original checkpoint",
        )
    size = linear.shape[0] * linear.shape[1] * DTYPE_BITS[stored.dtype] // 8
    sparsity = None if pruner is None else pruner.target(linear.module, linear.shape[1])
    scheme = settled.schemes[linear.module]
    why = settled.why.get(linear.module)
    if pruner is not None and sparsity is None:
        wanted = parse(pruner.sparsity)
        dense_why = IGNORED
        if not wanted.fits(linear.shape[1]):
            dense_why = f"in_features {linear.shape[1]} is not a multiple of {wanted.m}: not pruned"
        why = why or dense_why
    if scheme is None:
        why = None if sparsity is not None else why or IGNORED
        return Fate(linear.module, "linear", linear.shape, None, why, size, size, sparsity)
    metas = settled.format.layout(linear.module, linear.shape, scheme, dtype)
    out = sum(meta.nbytes for meta in metas)
    return Fate(linear.module, "linear", linear.shape, scheme, why, size, out, sparsity)


def _stacked(model: Model, settled: Settled) -> frozenset[int]:
    """Return the layers whose dense experts are written as two 3-D tensors."""
    experts = model.architecture.experts
    if experts is None:
        return frozenset()
    return frozenset(
        layer.index
        for layer in model.layers
        for path in (experts.disk, experts.path)
        if f"{model.architecture.layers}.{layer.index}.{path}" in settled.stacked
    )


def _notes(
    model: Model,
    method: LayerMethod,
    pruner: PruneMethod | None,
    recipe: Recipe,
    fates: Mapping[str, Fate],
    source: Source,
) -> Iterator[str]:
    warning = getattr(method, "warning", None)
    if warning:
        yield str(warning)
    if pruner is not None:
        yield from notes(next(fate.sparsity for fate in fates.values() if fate.sparsity))
        if pruner is not method:
            yield (
                "pruned and quantized in one pass: zeros and grid are chosen together, by the "
                "quantizer's options and in the columns' own order"
            )
    changed: dict[str, int] = {}
    linears = [fate for fate in fates.values() if fate.role == "linear"]
    for fate in linears:
        if fate.why is not None and fate.why != IGNORED:
            changed[fate.why] = changed.get(fate.why, 0) + 1
    for why, count in changed.items():
        yield f"{count} of {len(linears)} linears: {why}"
    if model.tied:
        yield "the head shares the embedding's weight: both are kept as they are"
    unread = [axis for axis in recipe.score if axis in READING]
    if unread and not source.id.startswith("builtin:"):
        yield (
            f"{', '.join(unread)}: not scored, for want of a held-out text; afterwards: "
            f"`unicomp score OUT --baseline {source.id} --text FILE`"
        )

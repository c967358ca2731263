"""Plan of structured pruning -> output folder, in two walks over the layers, journalled.

The first walk runs the calibration text through the original and notes what channels, heads,
experts and layers are worth; then the method chooses. The second walk writes the smaller model:
sliced, and where `compensate` asks refitted, with the states of the original and of the smaller
model side by side. As in `layers/run.py` states lie in files, tensors are written in place, and the
journal has a line for each layer of either walk, so that an interrupted run ends in the same bytes.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicomp import machine, manifest
from unicomp.compress.calibrate import Decoder, read_part
from unicomp.compress.compensate import Refitted, refit_head, refit_layer
from unicomp.compress.cuts import Cut, CutSource, LayerCut
from unicomp.compress.importance import LayerScores, observe
from unicomp.compress.readout import Readout
from unicomp.compress.search import losses
from unicomp.compress.states import HiddenStates
from unicomp.errors import UnicompError
from unicomp.manifest import Manifest
from unicomp.models import Layer, Linear, Model, describe
from unicomp.recipes.cut.plan import CutPlan
from unicomp.recipes.stage.journal import Journal
from unicomp.recipes.stage.prepare import (
    CalibrationWindows,
    begin,
    check_values,
    check_whole,
    copy_tensor,
    fingerprint,
    learn,
    read_calibration,
    workplace,
    write_beside,
)
from unicomp.recipes.stage.progress import Progress, Show
from unicomp.writer import Writer


@dataclass(slots=True)
class _Work:
    """Everything that a run holds while it goes on."""

    plan: CutPlan
    folder: Path
    journal: Journal
    show: Show
    calibration: CalibrationWindows
    began: float
    modules: dict[str, manifest.Module] = field(default_factory=dict)
    seconds: float = 0.0
    peak: int = 0

    def states(self, stream: str, layer: int, width: int) -> HiddenStates:
        """Return the file of what stands before a layer in one of the streams."""
        windows, seq_len = self.calibration.ids.shape
        return HiddenStates(
            self.journal.folder / f"{stream}-{layer:05}.bin", (windows, seq_len, width)
        )

    def note(self, entry: dict[str, Any], start: float) -> None:
        """Journal a finished layer with its time."""
        self.seconds += time.monotonic() - start
        self.peak = max(self.peak, machine.peak_rss_bytes())
        self.journal.append(entry | {"seconds": time.monotonic() - start, "peak": self.peak})


def run_cut(
    plan: CutPlan,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: Show = lambda _: None,
) -> Manifest:
    """Carry out a plan as `run` does; the folder has no scores and no card yet.

    Raises UnicompError for whatever the user can mend.
    """
    folder = begin(out, plan.notes, overwrite=overwrite, progress=progress)
    progress(Progress("prepare", 0, 0, "hashing the source"))
    hashes = plan.checkpoint.sha256()
    calibration = read_calibration(plan)
    if calibration is None:
        raise UnicompError("there is no calibration text", hint="give `--calibration`")
    mark = fingerprint(plan, hashes, calibration)
    with workplace(plan, folder, out, mark, overwrite=overwrite, resume=resume) as place:
        if not place.journal.entries:
            progress(Progress("prepare", 0, 0, "checking the source's values"))
            check_values(plan)
        work = _Work(plan, folder, place.journal, progress, calibration, time.monotonic())
        place.begun = True
        cut = _chosen(work)
        source = CutSource(plan.axes, cut, plan.sizes, plan.dense)
        writer = Writer(folder, list(source.tensors.values()))
        _write(work, source, writer)
        return _finish(work, source, writer, hashes)


def _chosen(work: _Work) -> Cut:
    """Walk through the original, and let the method choose; or what it chose before."""
    plan, method = work.plan, work.plan.method
    for entry in work.journal.entries:
        if "cut" in entry:
            _count(work, entry)
            return _cut_from(entry["cut"])
    decoder = _decoder(work, plan.model, plan.dense.config, plan.dense)
    seen = _observe(work, decoder)
    start = time.monotonic()

    def loss(sets: Sequence[tuple[int, ...]]) -> list[float]:
        readout = Readout(plan.model, plan.dense.config, plan.dense)
        total = len(plan.model.layers)

        def step(layer: int) -> None:
            what = f"the loss without {len(sets[0])} layers, {len(sets)} ways"
            work.show(Progress("search", layer, total, what))

        # A layer with experts can be loaded once only.
        fresh = _decoder(work, plan.model, plan.dense.config, plan.dense, eager=False)
        return losses(fresh, readout, work.calibration.ids, sets, step)

    cut = method.choose(plan.axes, plan.sizes, seen, loss)
    work.note({"cut": _cut_json(cut)}, start)
    return cut


def _count(work: _Work, entry: Mapping[str, Any]) -> None:
    work.seconds += entry["seconds"]
    work.peak = max(work.peak, entry["peak"])


def _decoder(
    work: _Work, model: Model, config: Mapping[str, Any], weights: Any, eager: bool | None = None
) -> Decoder:
    if work.plan.method.sees_attention() if eager is None else eager:
        config = {**config, "attn_implementation": "eager"}
    return Decoder(model, config, weights, batch=work.plan.batch, scratch=work.journal.folder)


def _observe(work: _Work, decoder: Decoder) -> list[LayerScores]:
    """Return what every layer showed; of layers seen before, from the journal."""
    plan = work.plan
    sizes, method = plan.axes.sizes, plan.method
    total = len(plan.model.layers)
    done = [entry for entry in work.journal.entries if "seen" in entry]
    states = work.states("seen", len(done), sizes.hidden)
    if done and len(done) < total and states.crc32() != done[-1]["crc"]:
        work.show(Progress("prepare", 0, 0, "", note="hidden states are lost: starting over"))
        work.journal.restart()
        done = []
    if done:
        learn(decoder, work.calibration.ids)
    else:
        states = work.states("seen", 0, sizes.hidden)
        work.show(Progress("prepare", 0, 0, "embedding the calibration text"))
        states.write(decoder.embed(work.calibration.ids))
    found = []
    for entry in done:
        _count(work, entry)
        found.append(LayerScores.from_json(entry["scores"]))
    for layer in plan.model.layers[len(done) :]:
        start = time.monotonic()
        work.show(Progress("importance", layer.index, total, f"layer {layer.index}"))
        module = decoder.load(layer)
        after = work.states("seen", layer.index + 1, sizes.hidden)
        scores, crc = observe(
            decoder,
            layer,
            module,
            states,
            after,
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            sink=method.sees_attention(),
            second_order=method.second_order(),
            damp=method.damp,
        )
        decoder.release(layer)
        found.append(scores)
        work.note({"seen": layer.index, "scores": scores.to_json(), "crc": crc}, start)
        states.path.unlink()
        states = after
    states.path.unlink(missing_ok=True)
    return found


def _cut_json(cut: Cut) -> dict[str, Any]:
    def plain(value: Tensor | None) -> list[int] | None:
        return None if value is None else value.tolist()

    return {
        "kept": list(cut.kept),
        "hidden": plain(cut.hidden),
        "layers": {
            str(index): {
                "heads": plain(one.heads),
                "kv_heads": plain(one.kv_heads),
                "experts": plain(one.experts),
                "ffn": None if one.ffn is None else [plain(some) for some in one.ffn],
            }
            for index, one in cut.layers.items()
        },
    }


def _cut_from(data: Mapping[str, Any]) -> Cut:
    def vector(value: list[int] | None) -> Tensor | None:
        return None if value is None else torch.tensor(value, dtype=torch.int64)

    layers = {}
    for index, one in data["layers"].items():
        ffn = None if one["ffn"] is None else tuple(torch.tensor(some) for some in one["ffn"])
        names = ("heads", "kv_heads", "experts")
        layers[int(index)] = LayerCut(**{name: vector(one[name]) for name in names}, ffn=ffn)
    return Cut(tuple(data["kept"]), vector(data["hidden"]), layers)


@dataclass(slots=True)
class _Pair:
    """The original and the smaller model, side by side, and the states of both before a layer."""

    whole: Decoder
    small: Decoder
    model: Model
    original: HiddenStates
    states: HiddenStates


def _write(work: _Work, source: CutSource, writer: Writer) -> None:
    """Write every tensor of the smaller model."""
    plan, total = work.plan, len(source.cut.kept)
    model = describe(source.config, source.tensors)
    done = [entry for entry in work.journal.entries if "layer" in entry]
    outside = [name for name, place in source.origin.items() if place.layer is None]
    head = _refitted_head(plan, model)
    pair = _pair(work, source, model, done) if plan.method.compensate else None
    done = [entry for entry in work.journal.entries if "layer" in entry]
    for entry in done:
        _count(work, entry)
        work.modules |= {n: manifest.Module(**m) for n, m in entry["modules"].items()}
        writer.mark(_of_layer(source, source.cut.kept[entry["layer"]]))
    for name in outside:
        if name != head:
            _copy(source, writer, name)
    for number in range(len(done), total):
        start = time.monotonic()
        layer = model.layers[number]
        refitted: dict[str, Refitted] = {}
        crcs: dict[str, int] = {}
        if pair is not None:
            refitted, crcs = _refit(work, source, pair, layer)
        names = _of_layer(source, source.cut.kept[number])
        for name in names:
            if name in refitted:
                one = refitted[name]
                weight = one.weight.T if one.linear.transposed else one.weight
                writer.write(name, weight.to(_dtype(source, name)))
            else:
                _copy(source, writer, name)
        writer.sync()
        modules = _modules(source, layer, names, refitted, plan)
        work.modules |= modules
        work.note(
            {
                "layer": number,
                "modules": {name: one.model_dump() for name, one in modules.items()},
                "crcs": crcs,
            },
            start,
        )
        errors = [one.error_after for one in modules.values() if one.error_after is not None]
        spent = (time.monotonic() - work.began) / (number + 1 - len(done))
        work.show(
            Progress(
                "layers",
                number + 1,
                total,
                f"layer {number}",
                error=max(errors) if errors else None,
                seconds_left=spent * (total - number - 1),
            )
        )
    if head is not None:
        _write_head(work, source, model, pair, writer, head)
    writer.sync()


def _dtype(source: CutSource, name: str) -> torch.dtype:
    return source.read(name, slice(0, 1)).dtype


def _of_layer(source: CutSource, old: int) -> list[str]:
    return [name for name, place in source.origin.items() if place.layer == old]


def _copy(source: CutSource, writer: Writer, name: str) -> None:
    """Write a sliced tensor, in pieces."""
    copy_tensor(writer, name, source.tensors[name].shape, partial(source.read, name))


def _refitted_head(plan: CutPlan, model: Model) -> str | None:
    """Return the name of the head's tensor, where it is refitted."""
    if model.tied or not plan.method.compensate:
        return None
    heads = [name for name, role in model.roles.items() if role == "head"]
    return next((name for name in heads if name.endswith(".weight")), None)


def _pair(work: _Work, source: CutSource, model: Model, done: Sequence[Mapping[str, Any]]) -> _Pair:
    """Bring both models to where they stood after the layers that are done."""
    plan = work.plan
    whole = _decoder(work, plan.model, plan.dense.config, plan.dense, eager=False)
    small = _decoder(work, model, source.config, source, eager=False)
    widths = (plan.axes.sizes.hidden, plan.sizes.hidden)
    streams = dict(zip(("original", "states"), widths, strict=True))
    files = {name: work.states(name, len(done), width) for name, width in streams.items()}
    if done and any(files[name].crc32() != done[-1]["crcs"][name] for name in streams):
        work.show(Progress("prepare", 0, 0, "", note="hidden states are lost: starting over"))
        kept = [entry for entry in work.journal.entries if "layer" not in entry]
        work.journal.restart()
        for entry in kept:
            work.journal.append(entry)
        done = []
        files = {name: work.states(name, 0, width) for name, width in streams.items()}
    if done:
        learn(whole, work.calibration.ids)
        learn(small, work.calibration.ids)
    else:
        work.show(Progress("prepare", 0, 0, "embedding the calibration text"))
        files["original"].write(whole.embed(work.calibration.ids))
        files["states"].write(small.embed(work.calibration.ids))
        files["original"] = _skip(work, whole, files["original"], 0, source.cut.kept[0])
    return _Pair(whole, small, model, files["original"], files["states"])


def _skip(work: _Work, whole: Decoder, states: HiddenStates, start: int, stop: int) -> HiddenStates:
    """Run the original's states through layers that are left out, in place of `states`."""
    for index in range(start, stop):
        layer = whole.model.layers[index]
        module = whole.load(layer)
        after = HiddenStates(states.path.with_suffix(".next"), states.shape)
        whole.record(layer, module, states, after, {})
        whole.release(layer)
        after.path.replace(states.path)
    return states


def _refit(
    work: _Work, source: CutSource, pair: _Pair, layer: Layer
) -> tuple[dict[str, Refitted], dict[str, int]]:
    """Refit one layer and move both streams past it; tensor name -> new weight, and the crc32s."""
    plan, kept = work.plan, source.cut.kept
    old = pair.whole.model.layers[kept[layer.index]]
    number = layer.index + 1
    following = kept[number] if number < len(kept) else plan.axes.sizes.layers
    module = pair.whole.load(old)
    inputs = {
        step[0][0].inner: HiddenStates(
            work.journal.folder / f"{step[0][0].inner}.bin",
            (*pair.original.shape[:2], step[0][0].shape[1]),
        )
        for step in old.steps
        if step[0][0].expert is None
    }
    target = work.states("original", number, pair.original.shape[2])
    pair.whole.record(old, module, pair.original, target, inputs)
    pair.whole.release(old)
    _skip(work, pair.whole, target, old.index + 1, following)
    small = pair.small.load(layer)
    by_inner = {linear.inner: linear for linear in old.linears()}

    def weights(linear: Linear) -> Tensor:
        before = by_inner[linear.inner]
        weight = read_part(plan.dense, before.part).float()
        weight = weight.T if before.transposed else weight
        place = plan.axes.places[before.part.tensor]
        rows = source.rows_of(place, 1 if before.transposed else 0)
        return weight if rows is None else weight[rows]

    found = {
        one.linear.part.tensor: one
        for one in refit_layer(
            pair.small,
            layer,
            small,
            pair.states,
            inputs,
            weights,
            target,
            source.cut.hidden,
            plan.method.damp,
        )
    }
    after = work.states("states", number, pair.states.shape[2])
    crc = pair.small.record(layer, small, pair.states, after, {})
    pair.small.release(layer)
    for states in (*inputs.values(), pair.original, pair.states):
        states.path.unlink()
    pair.original, pair.states = target, after
    return found, {"original": target.crc32() or 0, "states": crc}


def _write_head(
    work: _Work,
    source: CutSource,
    model: Model,
    pair: _Pair | None,
    writer: Writer,
    head: str,
) -> None:
    if pair is None:
        raise ValueError("no states to refit the head on")
    plan = work.plan
    work.show(Progress("head", 0, 0, "refitting the head"))
    whole = Readout(plan.model, plan.dense.config, plan.dense)
    small = Readout(model, source.config, source)
    dtype = _dtype(source, head)
    for rows, weight in refit_head(
        whole, small, pair.original, pair.states, plan.batch, plan.method.damp
    ):
        writer.write(head, weight.to(dtype), rows)


def _modules(
    source: CutSource,
    layer: Layer,
    names: Sequence[str],
    refitted: Mapping[str, Refitted],
    plan: CutPlan,
) -> dict[str, manifest.Module]:
    """Return the report of a layer's linears, by the module that is stored."""
    linears = {linear.part.tensor for linear in layer.linears()}
    whys = {fate.name: fate.why for fate in plan.fates}
    found: dict[str, manifest.Module] = {}
    for name in (name for name in names if name in linears):
        one = refitted.get(name)
        module, _, leaf = name.rpartition(".")
        stack = leaf != "weight"
        relative = one is not None and one.reference > 0
        size = source.tensors[name].nbytes
        if stack and module in found:
            size += found[module].bytes
        found[module] = manifest.Module(
            bits=None,
            group_size=None,
            bytes=size,
            error_before=(one.before / one.reference) ** 0.5 if one and relative else None,
            error_after=(one.after / one.reference) ** 0.5 if one and relative else None,
            damp=one.damp if one else None,
            clip_fraction=None,
            tokens=one.tokens if one else 0,
            fallback=None if one else whys.get(source.origin[name].meta.name),
        )
    return found


def _finish(work: _Work, source: CutSource, writer: Writer, hashes: dict[str, str]) -> Manifest:
    """Write everything beside the weights; the caller adds scores and card."""
    plan, folder = work.plan, work.folder
    work.show(Progress("finish", 0, 0, "writing the configuration and manifest"))
    writer.finish()
    write_beside(plan, folder, source.config)
    params = sum(torch.Size(meta.shape).numel() for meta in source.tensors.values())
    size = sum(meta.nbytes for meta in source.tensors.values())
    if (params, size) != (plan.params, plan.bytes_out):
        raise RuntimeError(f"{params} parameters in {size} bytes are not what was planned")
    kept = {"layers": list(source.cut.kept)}
    made = Manifest(
        source=manifest.Source(id=plan.source.id, revision=plan.source.revision, sha256=hashes),
        recipe_sha256=sha256(plan.text.encode()).hexdigest(),
        calibration=work.calibration.record,
        stages=[
            manifest.Stage(
                verb=plan.stage.verb,
                method=plan.stage.method,
                options=plan.stage.options.model_dump(mode="json"),
                seconds=work.seconds,
                peak_rss_bytes=max(work.peak, machine.peak_rss_bytes()),
                peak_gpu_bytes=None,
                modules=work.modules,
                shape=manifest.Shape(
                    before=plan.axes.sizes.to_json(), after=plan.sizes.to_json(), kept=kept
                ),
            )
        ],
        totals=manifest.Totals(
            params=params,
            params_in=plan.params_in,
            bytes_in=plan.bytes_in,
            bytes_out=size,
            bits_per_weight=8 * size / params,
        ),
        files=manifest.hashes(folder),
        versions=machine.versions(),
        machine=machine.describe(),
        seeds={"calibration": work.calibration.record.seed},
        notes=list(plan.notes),
    )
    manifest.write(folder, made)
    check_whole(folder)
    return made

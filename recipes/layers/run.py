"""Plan -> output folder: layer by layer, journalled, published when whole.

Work happens in `OUT.partial/`. The weight files are laid out first, so a full disk is found before
the work; then tensors are written in place as they are made. After each layer the files are synced
and the journal gets a line, so that the same command resumes at the next layer and the finished
files are byte for byte those of a run that nothing interrupted: the next layer's inputs are read
back from the file that the interrupted process wrote, never computed again.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unicomp import machine, manifest
from unicomp.compress.calibrate import Decoder, read_part, read_weight
from unicomp.compress.counted import compared
from unicomp.compress.layerwise import Solved, compress_layer, solve_alone
from unicomp.compress.method import Need, Pruned, PruneMethod, Pruning
from unicomp.compress.readout import Readout
from unicomp.compress.sensitivity import shares
from unicomp.compress.sparsity import Budget, Sparsity, Target, parse
from unicomp.compress.states import HiddenStates
from unicomp.kernels.packed import Scheme
from unicomp.manifest import Manifest
from unicomp.models import Layer, Linear
from unicomp.recipes.layers import record
from unicomp.recipes.layers.forecast import hidden_size
from unicomp.recipes.layers.plan import Plan
from unicomp.recipes.lint.rules import refused
from unicomp.recipes.publish import card
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
    score_output,
    workplace,
    write_beside,
)
from unicomp.recipes.stage.progress import Progress, Show
from unicomp.writer import Writer, write_file


@dataclass(slots=True)
class _Work:
    """Everything that a run holds while it goes on."""

    plan: Plan
    folder: Path
    journal: Journal
    writer: Writer
    show: Show
    calibration: CalibrationWindows | None
    targets: Mapping[str, Scheme | Target]
    shares: Mapping[str, Sparsity]
    modules: dict[str, manifest.Module] = field(default_factory=dict)
    seconds: float = 0.0
    peak: int = 0


def run(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    resume: bool = True,
    progress: Show = lambda _: None,
) -> Manifest:
    """Carry out a plan; the output stands under its name only when whole.

    out        the folder to make; `<out>.partial` is used on the way
    overwrite  replace a checkpoint folder of that name
    resume     go on where an interrupted run of the same plan stopped; False: start over
    progress   called at every step

    Raises UnicompError for whatever the user can mend; what was done so far then stays in
    `<out>.partial`, unless nothing was.
    """
    notes = [*plan.notes, *refused(plan.loaders())]
    folder = begin(out, notes, overwrite=overwrite, progress=progress)
    progress(Progress("prepare", 0, 0, "hashing the source and checking its values"))
    with ThreadPoolExecutor(1) as beside:
        hashing = beside.submit(plan.checkpoint.sha256)
        calibration = read_calibration(plan)
        check_values(plan)
    hashes = hashing.result()
    mark = fingerprint(plan, hashes, calibration)
    with workplace(plan, folder, out, mark, overwrite=overwrite, resume=resume) as place:
        writer = Writer(folder, plan.layout())
        own = _shares(plan, place.journal, calibration, progress)
        targets = _targets(plan, progress)
        if isinstance(plan.method, PruneMethod):
            targets |= own
        work = _Work(plan, folder, place.journal, writer, progress, calibration, targets, own)
        place.begun = True
        _copy_dense(work)
        _layers(work)
        return _finish(work, hashes)


def _targets(plan: Plan, progress: Show) -> dict[str, Scheme | Target]:
    """Return module -> how it is quantized or pruned; zeros of the whole model are shared out."""
    found: dict[str, Scheme | Target] = {**plan.targets}
    if not (isinstance(plan.method, PruneMethod) and plan.method.spread()):
        return found
    budget = Budget(parse(plan.method.sparsity).share)
    linears = [linear for linear in plan.model.linears() if linear.module in found]
    for number in range(Budget.PASSES):
        progress(Progress("prepare", 0, 0, f"sharing out zeros, pass {number + 1}"))
        for linear in linears:
            zeros = budget.add(read_weight(plan.dense, linear))
            if zeros is not None:
                found[linear.module] = zeros
        budget.turn()
    return found


def _shares(
    plan: Plan, journal: Journal, calibration: CalibrationWindows | None, progress: Show
) -> dict[str, Sparsity]:
    """Return module -> its own share of zeros, where those are measured before the work."""
    pruner = plan.pruner or plan.method
    if calibration is None or not isinstance(pruner, PruneMethod) or not pruner.allocates():
        return {}
    known = next((entry["shares"] for entry in journal.entries if "shares" in entry), None)
    if known is None:
        wanted = {name: fate.sparsity for name, fate in plan.fates.items() if fate.sparsity}
        total = len(plan.model.layers)

        def step(layer: int) -> None:
            progress(Progress("prepare", layer, total, "measuring what zeros cost each linear"))

        known = shares(
            Decoder(
                plan.model,
                plan.dense.config,
                plan.dense,
                batch=plan.batch,
                scratch=journal.folder,
                half=plan.half,
            ),
            Readout(plan.model, plan.dense.config, plan.dense),
            calibration.ids,
            wanted,
            next(iter(wanted.values())),
            journal.folder,
            step,
        )
        journal.append({"shares": known})
    return {name: Sparsity(share) for name, share in known.items()}


def _copy_dense(work: _Work) -> None:
    """Copy what stays as it is, in pieces."""
    plan = work.plan
    kept = {plan.model.names[name]: name for name in plan.model.names}
    names = [fate.name for fate in plan.fates.values() if fate.scheme is None and fate.name in kept]
    if any("dense" in entry for entry in work.journal.entries):
        work.writer.mark(names)
        return
    for name in names:
        stored = plan.dense.tensors[kept[name]]
        work.show(Progress("copy", 0, 0, name))
        copy_tensor(work.writer, name, stored.shape, partial(plan.dense.read, kept[name]))
    work.writer.sync()
    work.journal.append({"dense": True})


def _layers(work: _Work) -> None:
    plan = work.plan
    done = [entry for entry in work.journal.entries if "layer" in entry]
    streams: dict[str, HiddenStates] = {}
    decoder = None
    if work.calibration is not None:
        decoder = Decoder(
            plan.model,
            plan.dense.config,
            plan.dense,
            batch=plan.batch,
            scratch=None if plan.held else work.journal.folder,
            half=plan.half,
            between=plan.between,
        )
        if not _recover(work, decoder, done, streams):
            work.show(Progress("prepare", 0, 0, "", note="hidden states are lost: starting over"))
            work.journal.restart()
            done = []
            _copy_dense(work)
            _embed(work, decoder, streams)
    for entry in done:
        work.modules |= {n: manifest.Module(**m) for n, m in entry["modules"].items()}
        work.seconds += entry["seconds"]
        work.peak = max(work.peak, entry["peak"])
    work.writer.mark(_stored_names(plan, plan.model.layers[: len(done)]))
    total = len(plan.model.layers)
    began = time.monotonic()
    for layer in plan.model.layers[len(done) :]:
        start = time.monotonic()
        modules, crcs = _one_layer(work, decoder, layer, streams, began, len(done), total)
        work.writer.sync()
        seconds = time.monotonic() - start
        work.seconds += seconds
        work.peak = max(work.peak, machine.peak_rss_bytes())
        work.modules |= modules
        work.journal.append(
            {
                "layer": layer.index,
                "modules": {name: module.model_dump() for name, module in modules.items()},
                "crcs": crcs,
                "seconds": seconds,
                "peak": work.peak,
            }
        )
        for name in streams:  # what the next layer reads stays; the layer after it may overwrite
            _states(work, name, layer.index).path.replace(_states(work, name, layer.index + 2).path)


def _states(work: _Work, stream: str, layer: int) -> HiddenStates:
    """Return the file of a layer's inputs in one stream: `states` or `original`."""
    if work.calibration is None:
        raise ValueError("no calibration")
    windows, seq_len = work.calibration.ids.shape
    width = hidden_size(work.plan.dense.config)
    return HiddenStates(work.journal.folder / f"{stream}-{layer:05}.bin", (windows, seq_len, width))


def _recover(
    work: _Work, decoder: Decoder, done: list[dict[str, Any]], streams: dict[str, HiddenStates]
) -> bool:
    """Find the inputs of the next layer again; False if the files do not hold them."""
    if not done:
        _embed(work, decoder, streams)
        return True
    learn(decoder, _need(work).ids)
    for name in _stream_names(work):
        streams[name] = _states(work, name, len(done))
        if len(done) < len(work.plan.model.layers):
            expected = done[-1]["crcs"][name]
            if streams[name].crc32() != expected:
                return False
    return True


def _embed(work: _Work, decoder: Decoder, streams: dict[str, HiddenStates]) -> None:
    for name in _stream_names(work):
        streams[name] = _states(work, name, 0)
        work.show(Progress("prepare", 0, 0, "embedding the calibration text"))
        streams[name].write(decoder.embed(_need(work).ids))


def _stream_names(work: _Work) -> list[str]:
    return ["states", "original"] if Need.CROSS in work.plan.method.wants() else ["states"]


def _need(work: _Work) -> CalibrationWindows:
    if work.calibration is None:
        raise ValueError("no calibration")
    return work.calibration


def _one_layer(
    work: _Work,
    decoder: Decoder | None,
    layer: Layer,
    streams: dict[str, HiddenStates],
    began: float,
    skipped: int,
    total: int,
) -> tuple[dict[str, manifest.Module], dict[str, int]]:
    """Compress one layer, write it, and leave the next layer's inputs in their files."""
    plan = work.plan
    modules: dict[str, manifest.Module] = {}
    crcs: dict[str, int] = {}
    sparse: dict[str, Tensor] = {}
    tokens = 0 if work.calibration is None else work.calibration.ids.numel()

    def left() -> float | None:
        finished = layer.index - skipped
        spent = time.monotonic() - began
        return spent / finished * (total - layer.index) if finished else None

    def report(solved: Solved) -> None:
        name = solved.linear.module
        if isinstance(solved.solution, Pruned):
            sparse[name] = solved.solution.weight
            made = record.pruned(plan, solved, solved.solution)
            if solved.linear.expert is not None and layer.index in plan.stacked:
                name = _in_stack(plan, layer, solved.linear)
        else:
            for key, value in plan.format.pack(name, solved.solution.packed).items():
                work.writer.write(key, value)
            made = record.quantized(plan, solved, solved.solution)
        modules[name] = made
        spent = max(time.monotonic() - began, 1e-9)
        work.show(
            Progress(
                "layers",
                layer.index,
                total,
                name,
                error=made.error_after,
                tokens_per_s=tokens * (layer.index - skipped + 1) / spent if tokens else None,
                seconds_left=left(),
                note=f"{name}: {solved.fallback}" if solved.fallback else None,
            )
        )

    if decoder is None:
        for solved in solve_alone(plan.dense, layer, plan.method, work.targets, plan.scale_dtype):
            report(solved)
    else:
        _statistics_layer(work, decoder, layer, streams, report, crcs)

    def stored(linear: Linear) -> Tensor:
        """Return the weight as the source has it, with the zeros it got."""
        found = read_part(plan.dense, linear.part)
        if linear.module in sparse:
            weight = sparse.pop(linear.module)
            found = (weight.T if linear.transposed else weight).to(found.dtype)
        return found

    for linear in layer.linears():
        stacked = linear.expert is not None and layer.index in plan.stacked
        if linear.module not in plan.schemes and not stacked:
            work.writer.write(f"{linear.module}.weight", stored(linear))
            if linear.module not in modules:
                modules[linear.module] = record.dense(plan.fates[linear.module])
    if layer.index in plan.stacked:
        _stack_experts(work, layer, stored)
        experts = [one for one in layer.linears() if one.expert is not None]
        fates = {_in_stack(plan, layer, one): plan.fates[one.module] for one in experts}
        if modules.keys() & fates.keys():
            rest = {name: record.dense(fate) for name, fate in fates.items()}
            modules |= {name: made for name, made in rest.items() if name not in modules}
        else:
            modules[plan.stack_path(layer.index)] = record.dense(*fates.values())
    return modules, crcs


def _in_stack(plan: Plan, layer: Layer, linear: Linear) -> str:
    """Return what an expert's linear is called where one tensor holds those of all."""
    return f"{plan.stack_path(layer.index)}.{linear.expert}.{linear.module.rpartition('.')[2]}"


def _stack_experts(work: _Work, layer: Layer, stored: Callable[[Linear], Tensor]) -> None:
    """Write a layer's dense experts as the two 3-D tensors that transformers holds."""
    path = work.plan.stack_path(layer.index)
    for index, ((gate, up), (down,)) in enumerate(zip(*layer.steps[-2:], strict=True)):
        row = slice(index, index + 1)
        both = torch.cat([stored(gate), stored(up)])
        work.writer.write(f"{path}.gate_up_proj", both[None], row)
        work.writer.write(f"{path}.down_proj", stored(down)[None], row)


def _statistics_layer(
    work: _Work,
    decoder: Decoder,
    layer: Layer,
    streams: dict[str, HiddenStates],
    report: Callable[[Solved], None],
    crcs: dict[str, int],
) -> None:
    plan = work.plan
    module = decoder.load(layer)
    last = layer.index + 1 == len(plan.model.layers)
    after = {name: _states(work, name, layer.index + 1) for name in streams}
    original: dict[str, HiddenStates] = {}
    if "original" in streams:
        windows, seq_len, _ = streams["original"].shape
        original = {
            inner: HiddenStates(work.journal.folder / f"{inner}.bin", (windows, seq_len, columns))
            for inner, columns in compared(layer, work.targets).items()
        }
        crcs["original"] = decoder.record(
            layer, module, streams["original"], after["original"], original
        )
    for solved in compress_layer(
        decoder,
        layer,
        module,
        streams["states"],
        original,
        plan.method,
        work.targets,
        plan.scale_dtype,
        plan.moment_bytes,
        None if plan.pruner is None else partial(_pruning, work, plan.pruner),
    ):
        report(solved)
    following = {} if last else compared(plan.model.layers[layer.index + 1], work.targets)
    for inner, kept in original.items():
        if inner not in following:
            kept.path.unlink()
    if not last:
        crcs["states"] = decoder.outputs(layer, module, streams["states"], after["states"])
    decoder.release(layer)
    streams.update(after)


def _pruning(work: _Work, method: PruneMethod, linear: Linear) -> Pruning | None:
    """Return what of a linear becomes zero while it is quantized."""
    sparsity = work.shares.get(linear.module, work.plan.fates[linear.module].sparsity)
    return None if sparsity is None else Pruning(method, sparsity)


def _stored_names(plan: Plan, layers: tuple[Layer, ...]) -> Iterator[str]:
    """Yield the names of the tensors that these layers' linears have in the output."""
    for layer in layers:
        if layer.index in plan.stacked:
            path = plan.stack_path(layer.index)
            yield from (f"{path}.gate_up_proj", f"{path}.down_proj")
        for linear in layer.linears():
            scheme = plan.schemes.get(linear.module)
            if scheme is None and linear.expert is not None and layer.index in plan.stacked:
                continue
            if scheme is None:
                yield f"{linear.module}.weight"
            else:
                metas = plan.format.layout(linear.module, linear.shape, scheme, plan.dtype)
                yield from (meta.name for meta in metas)


def _finish(work: _Work, hashes: dict[str, str]) -> Manifest:
    """Write everything beside the weights, read the whole folder again, and drop the journal."""
    plan, folder = work.plan, work.folder
    work.show(Progress("finish", 0, 0, "writing the configuration, manifest and card"))
    work.writer.finish()
    config = plan.config()
    if plan.schemes:
        for name, content in plan.format.extra_files(config["quantization_config"]).items():
            write_file(folder / name, content.encode())
    write_beside(plan, folder, config)
    calibration = None if work.calibration is None else work.calibration.record
    made = record.manifest_of(
        plan, folder, hashes, calibration, work.modules, work.seconds, work.peak
    )
    manifest.write(folder, made)

    def step(what: str, done: int, total: int) -> None:
        work.show(Progress("score", done, total, what))

    name = folder.name.removesuffix(".partial")
    gates = plan.recipe.gates
    report = score_output(folder, name, plan.source, plan.scored, plan.held_out, step, gates)
    write_file(folder / "README.md", card.write(plan.output(), made, report).encode())
    check_whole(folder)
    return made

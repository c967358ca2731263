"""What a run says of itself: each module's report, and the manifest of the whole."""

from hashlib import sha256
from pathlib import Path

from torch import Tensor

from unicomp import machine, manifest
from unicomp.compress.layerwise import Solved
from unicomp.compress.method import Pruned, Solution
from unicomp.recipes.layers.plan import Plan
from unicomp.recipes.stage.planned import Fate


def quantized(plan: Plan, solved: Solved, solution: Solution) -> manifest.Module:
    """Return the report of a quantized linear; errors relative to the layer's output."""
    scheme = solution.packed.scheme

    def relative(squared: Tensor | None) -> float | None:
        return _relative(squared, solution.reference)

    fate = plan.fates[solved.linear.module]
    return manifest.Module(
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        sparsity=None if fate.sparsity is None else _zeros(solution.weight),
        bytes=fate.bytes_out,
        error_before=relative(solution.rounding),
        error_after=relative(solution.error),
        error_predicted=relative(solution.predicted),
        damp=solution.damp,
        clip_fraction=float(solution.clipped.sum()) / solution.packed.codes.numel(),
        tokens=solved.tokens,
        fallback=solved.fallback or fate.why,
    )


def pruned(plan: Plan, solved: Solved, solution: Pruned) -> manifest.Module:
    """Return the report of a pruned linear; errors as far as the method knows them."""
    fate = plan.fates[solved.linear.module]
    return manifest.Module(
        bits=None,
        group_size=None,
        sparsity=_zeros(solution.weight),
        bytes=fate.bytes_out,
        error_before=_relative(solution.magnitude, solution.reference),
        error_after=_relative(solution.error, solution.reference),
        damp=solution.damp,
        clip_fraction=None,
        tokens=solved.tokens,
        fallback=solved.fallback or fate.why,
    )


def _zeros(weight: Tensor) -> float:
    return 1 - float(weight.count_nonzero()) / weight.numel()


def _relative(squared: Tensor | None, reference: Tensor | None) -> float | None:
    """Return the root of a sum of squared errors, as a share of the output's."""
    if squared is None or reference is None:
        return None
    whole = float(reference.double().sum())
    return float((squared.double().sum().clamp_min(0) / whole).sqrt()) if whole > 0 else None


def dense(*fates: Fate) -> manifest.Module:
    """Return the report of a linear that stays as it is, or of several stored as one."""
    return manifest.Module(
        bits=None,
        group_size=None,
        bytes=sum(fate.bytes_out for fate in fates),
        error_before=None,
        error_after=None,
        damp=None,
        clip_fraction=None,
        tokens=0,
        fallback=fates[0].why,
    )


def manifest_of(
    plan: Plan,
    folder: Path,
    hashes: dict[str, str],
    calibration: manifest.Calibration | None,
    modules: dict[str, manifest.Module],
    seconds: float,
    peak: int,
) -> manifest.Manifest:
    """Return the manifest of a finished folder.

    hashes   of the source's files
    seconds  that the layers took, over all processes that worked on them
    peak     greatest resident bytes of any of them
    """
    # Stages that went in one pass share its time and its modules, which stand under the last.
    stages = [
        manifest.Stage(
            verb=stage.verb,
            method=stage.method,
            options=stage.options.model_dump(mode="json"),
            seconds=seconds if stage is plan.stage else 0.0,
            peak_rss_bytes=max(peak, machine.peak_rss_bytes()),
            peak_gpu_bytes=None,
            modules=modules if stage is plan.stage else {},
        )
        for stage in plan.stages
    ]
    return manifest.Manifest(
        source=manifest.Source(id=plan.source.id, revision=plan.source.revision, sha256=hashes),
        recipe_sha256=sha256(plan.text.encode()).hexdigest(),
        calibration=calibration,
        stages=stages,
        totals=manifest.Totals(
            params=plan.params,
            bytes_in=plan.bytes_in,
            bytes_out=plan.bytes_out,
            bits_per_weight=plan.bits_per_weight,
        ),
        files=manifest.hashes(folder),
        versions=machine.versions(),
        machine=machine.describe(),
        seeds={} if calibration is None else {"calibration": calibration.seed},
        notes=list(plan.notes),
    )

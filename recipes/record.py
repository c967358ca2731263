"""What a run says of itself: each module's report, and the manifest of the whole."""

from hashlib import sha256
from pathlib import Path

from torch import Tensor

from unicomp import machine, manifest
from unicomp.compress.layerwise import Solved
from unicomp.recipes.plan import Fate, Plan


def quantized(plan: Plan, solved: Solved) -> manifest.Module:
    """Return the report of a quantized linear; errors relative to the layer's output."""
    solution = solved.solution
    scheme = solution.packed.scheme
    reference = float(solution.reference.double().sum())

    def relative(squared: Tensor | None) -> float | None:
        if squared is None or reference <= 0:
            return None
        return float((squared.double().sum().clamp_min(0) / reference).sqrt())

    fate = plan.fates[solved.linear.module]
    return manifest.Module(
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        bytes=fate.bytes_out,
        error_before=relative(solution.rounding),
        error_after=relative(solution.error),
        error_predicted=relative(solution.predicted),
        damp=solution.damp,
        clip_fraction=float(solution.clipped.sum()) / solution.packed.codes.numel(),
        tokens=solved.tokens,
        fallback=solved.fallback or fate.why,
    )


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
    stage = manifest.Stage(
        verb=plan.stage.verb,
        method=plan.stage.method,
        options=plan.stage.options.model_dump(mode="json"),
        seconds=seconds,
        peak_rss_bytes=max(peak, machine.peak_rss_bytes()),
        peak_gpu_bytes=None,
        modules=modules,
    )
    return manifest.Manifest(
        source=manifest.Source(id=plan.source.id, revision=plan.source.revision, sha256=hashes),
        recipe_sha256=sha256(plan.text.encode()).hexdigest(),
        calibration=calibration,
        stages=[stage],
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

"""How a plan and a result of distillation are shown: what is trained, and held-out figures."""

from typing import TYPE_CHECKING

from unicomp import size
from unicomp.cli import show

if TYPE_CHECKING:
    from unicomp.manifest import Manifest
    from unicomp.recipes.distill.plan import DistillPlan


def show_distill(found: "DistillPlan") -> None:
    """Write the plan of one pass of distillation to stdout."""
    memory = ", ".join(f"{part} {size.show(value)}" for part, value in found.memory.items())
    took = f"about {show.duration(found.seconds)}: " if found.seconds else ""
    show.text(f"{found.source.id}: {found.stage.verb} {found.stage.method}")
    show.facts(
        [
            ("teacher", found.teacher.id),
            ("parameters", f"{found.params:,}"),
            ("bytes", f"{size.show(found.bytes_in)} -> {size.show(found.bytes_out)}"),
            ("batch", f"{found.method.batch} windows of {found.seq_len} tokens"),
            ("steps", "by the text" if found.steps is None else f"{found.steps:,}"),
            ("peak host memory", f"{size.show(found.peak_host_bytes)}: {memory}"),
            ("disk", f"at most {size.show(found.disk_bytes)} while it runs"),
            ("time", took + found.basis),
        ]
    )
    for note in found.notes:
        show.text(f"note: {note}")


def facts(made: "Manifest") -> list[tuple[str, str]]:
    """Return what training did, in words, for each stage that trained."""
    found = []
    for stage in made.stages:
        if stage.training is None:
            continue
        told, before, after = stage.training, stage.training.before, stage.training.after
        found += [
            ("trained", f"{told.steps:,} steps, {told.tokens:,} tokens; ended by {told.stopped}"),
            ("held-out KL to teacher", f"{before['kl']:.4f} -> {after['kl']:.4f} nats a token"),
            ("held-out likelihood", f"{before['nll']:.4f} -> {after['nll']:.4f} nats a token"),
            ("calibration error", f"{before['ece']:.4f} -> {after['ece']:.4f}"),
            ("confidence gap", f"{before['gap']:+.4f} -> {after['gap']:+.4f}"),
        ]
        if told.temperature is not None:
            heat = told.temperature
            found.append(
                (
                    "temperature",
                    f"{heat['temperature']:.3f}: likelihood {heat['before']:.4f} -> "
                    f"{heat['after']:.4f} on text it was not fitted on",
                )
            )
    return found

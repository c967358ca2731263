"""How a plan and a result of structured pruning are shown: sizes before and after, candidates."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from unicomp import size
from unicomp.cli import show

if TYPE_CHECKING:
    from unicomp.manifest import Manifest, Module
    from unicomp.recipes.cut.plan import CutPlan
    from unicomp.recipes.pipeline.plan import Pipeline

SHOWN = ("layers", "hidden", "ffn", "heads", "kv_heads", "experts", "expert_ffn")


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    """Return the sizes that changed, in words: `hidden 128 -> 96, layers 5 -> 4`."""
    changed = [f"{n} {before[n]:,} -> {after[n]:,}" for n in before if before[n] != after.get(n)]
    return ", ".join(changed) or "as it was"


def show_cut(found: "CutPlan") -> None:
    """Write the plan of one pass of structured pruning to stdout."""
    said = found.to_json()
    before, chosen = said["shape"]["before"], said["candidates"]
    names = [name for name in SHOWN if name in before]
    rows = [
        (
            "made" if number == 0 else f"candidate {number + 1}",
            *(one["shape"].get(name, 0) for name in names),
            one["params"],
            size.show(one["bytes"]),
            f"{one['read_speedup']:.2f}",
        )
        for number, one in enumerate(chosen)
    ]
    source = (
        "source",
        *(before[name] for name in names),
        said["params_in"],
        size.show(said["bytes_in"]),
        "1.00",
    )
    show.table(
        f"{found.source.id}: {found.stage.verb} {found.stage.method}",
        ("shape", *names, "parameters", "bytes", "bytes a token reads, fewer by"),
        [source, *rows],
    )
    show.text("")
    memory = ", ".join(f"{part} {size.show(value)}" for part, value in found.memory.items())
    show.facts(
        [
            ("parameters", f"{found.params_in:,} -> {found.params:,}"),
            ("bytes", f"{size.show(found.bytes_in)} -> {size.show(found.bytes_out)}"),
            ("peak host memory", f"about {size.show(found.peak_host_bytes)}: {memory}"),
            ("limit it fits under", size.show(found.most_host_bytes)),
            ("disk", f"at most {size.show(found.disk_bytes)} while it runs"),
            ("time", f"about {show.duration(found.seconds)}: {found.basis}"),
        ]
    )
    for note in found.notes:
        show.text(f"note: {note}")


def passes(found: "Pipeline") -> str:
    """Return the passes of a plan in one line."""
    words = [" with ".join(f"{s.verb} {s.method}" for s in one.stages) for one in found.passes]
    return f"{found.source.id}: {', then '.join(words)}"


def facts(made: "Manifest") -> Iterator[tuple[str, str]]:
    """Yield what a result's stages changed of its shape; nothing where none did."""
    cuts = [(one, one.shape) for one in made.stages if one.shape is not None]
    if not cuts:
        return
    totals = made.totals
    yield "parameters", f"{totals.params_in or totals.params:,} -> {totals.params:,}"
    yield "shape", changes(cuts[0][1].before, cuts[-1][1].after)
    for stage, shape in cuts:
        kept = shape.kept["layers"]
        if shape.before["layers"] != len(kept):
            yield "layers kept", ", ".join(map(str, kept))
        refitted = [one for one in stage.modules.values() if one.error_after is not None]
        yield "linears refitted", f"{len(refitted)} of {len(stage.modules)}"
        if refitted:
            yield "error of the cut", _errors(refitted)


def _errors(refitted: "list[Module]") -> str:
    after = sum(one.error_after or 0.0 for one in refitted) / len(refitted)
    before = sum(one.error_before or 0.0 for one in refitted) / len(refitted)
    return f"{after:.4f} relative, mean of {len(refitted)} linears (not refitted: {before:.4f})"

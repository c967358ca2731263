"""`unicomp plan`: what a recipe would do, from headers only."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from unicomp import size
from unicomp.cli import lint, shape, show, training
from unicomp.cli.options import (
    Json,
    MaxMemory,
    Quiet,
    RecipeModel,
    RecipeName,
    Set,
    Target,
    TensorParallel,
)
from unicomp.cli.work import Work

if TYPE_CHECKING:
    from unicomp.kernels.packed import Scheme
    from unicomp.recipes.layers.plan import Plan
    from unicomp.recipes.pipeline.plan import Pipeline
    from unicomp.recipes.stage.planned import Fate

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def plan(
    recipe: RecipeName,
    model: RecipeModel = None,
    set_: Set = None,
    target: Target = None,
    tp: TensorParallel = 1,
    max_memory: MaxMemory = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a recipe would do, from headers only.

    Each tensor's fate, bytes, memory and time are said. What the loaders of `--target`, and of the
    recipe's own `target`, would not take of the output is listed with what to do instead.

    Example: unicomp plan quickstart builtin:tinyworld --target transformers>=5,llama.cpp
    """
    from unicomp.cli import delta
    from unicomp.recipes.load import read
    from unicomp.recipes.pipeline.plan import plan as make

    lint.check_targets(target or [])
    loaded, text = read(recipe, overrides=set_ or [])
    if loaded.stages[0].verb == delta.VERB:
        lint.refuse_delta(target)
        delta.carry_out(loaded, model, None, Work(max_memory=max_memory, json=json))
        return
    found = make(loaded, model=model, text=None if set_ else text, max_memory=max_memory)
    show_plan(found, json, target or [], tp)


def show_plan(
    found: "Plan | Pipeline", json: bool, targets: Sequence[str] = (), tp: int = 1
) -> None:
    """Write a plan to stdout; of several passes one after the other, what loaders say at the end.

    targets  loaders to ask beside the recipe's own
    tp       processes that each linear is cut into
    """
    asked = [*found.recipe.target, *targets]
    said = lint.of_plan(found, asked, tp) if asked else None
    told = {} if said is None else said.to_json()
    from unicomp.recipes.cut.plan import CutPlan
    from unicomp.recipes.distill.plan import DistillPlan
    from unicomp.recipes.layers.plan import Plan
    from unicomp.recipes.lint.rules import refused

    if json and isinstance(found, Plan):
        show.json(found.figures() | told, {"tensors": found.rows()})
        return
    if json:
        show.json(found.to_json() | told)
        return
    parts = (found,) if isinstance(found, Plan) else found.passes
    if len(parts) > 1 and not isinstance(found, Plan):
        show.text(shape.passes(found))
    for one in parts:
        if isinstance(one, CutPlan):
            shape.show_cut(one)
        elif isinstance(one, DistillPlan):
            training.show_distill(one)
        else:
            _show_pass(one)
    if not isinstance(found, Plan) and (compared := found.comparison()) is not None:
        peak = size.show(sum(compared.values()))
        show.text(
            f"then source and result run in turn, for the speed-up: {peak}, "
            f"about {show.duration(found.comparing())}"
        )
    if said is not None:
        said.show()
        return
    for sentence in refused(found.loaders()):
        show.text(f"note: {sentence}")


def _show_pass(found: "Plan") -> None:
    rows = [
        (
            name,
            len(fates),
            "x".join(map(str, shape)),
            becomes,
            *_bytes(fates),
            why or "",
        )
        for (name, shape, becomes, why), fates in _alike(tuple(found.fates.values())).items()
    ]
    show.table(
        f"{found.source.id}: {found.stage.verb} {found.stage.method}"
        + (f", {found.recipe.format}" if found.schemes else ""),
        ("tensors", "count", "shape", "becomes", "before", "after", "why"),
        rows,
    )
    show.text("")
    memory = ", ".join(f"{part} {size.show(value)}" for part, value in found.memory.items())
    facts = [
        ("parameters", f"{found.params:,}"),
        ("bytes", f"{size.show(found.bytes_in)} -> {size.show(found.bytes_out)}"),
        ("bits per weight", f"{found.bits_per_weight:.3f}"),
        ("peak host memory", f"about {size.show(found.peak_host_bytes)}: {memory}"),
        ("limit it fits under", size.show(found.most_host_bytes)),
        ("peak GPU memory", "none: the work is done on the CPU"),
        ("disk", f"at most {size.show(found.disk_bytes)} while it runs"),
        ("time", f"about {show.duration(found.seconds)}: {found.basis}"),
    ]
    show.facts(facts)
    for note in found.notes:
        show.text(f"note: {note}")


def _alike(
    fates: "tuple[Fate, ...]",
) -> "dict[tuple[str, tuple[int, ...], str, str | None], list[Fate]]":
    """Put together what differs only by the number of its layer or expert."""
    groups: dict[tuple[str, tuple[int, ...], str, str | None], list[Fate]] = {}
    for fate in fates:
        key = (unnumbered(fate.name), fate.shape, _becomes(fate), fate.why)
        groups.setdefault(key, []).append(fate)
    return groups


def _becomes(fate: "Fate") -> str:
    if fate.scheme is not None:
        return scheme_words(fate.scheme)
    if fate.sparsity is not None:
        return fate.sparsity.words()
    return "kept"


def scheme_words(scheme: "Scheme") -> str:
    """Return a scheme in words: `4 bits, group 128`."""
    group = "per channel" if scheme.group_size == -1 else f"group {scheme.group_size}"
    return f"{scheme.bits} bits, {group}{'' if scheme.symmetric else ', asymmetric'}"


def unnumbered(name: str) -> str:
    """Return a module's name with `*` for the numbers of its layer and expert."""
    return NUMBER.sub("*", name)


def _bytes(fates: "list[Fate]") -> tuple[str, str]:
    before, after = sum(f.bytes_in for f in fates), sum(f.bytes_out for f in fates)
    return size.show(before), size.show(after)

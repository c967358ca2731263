"""`unicomp run`: the whole pipeline of a recipe; and how any run is carried out and shown."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from unicomp import processes, size
from unicomp.cli import delta, lint, shape, show, training
from unicomp.cli.groups import grouped
from unicomp.cli.options import RecipeModel, RecipeName, Set
from unicomp.cli.plan import show_plan
from unicomp.cli.score import ENDS, show_report
from unicomp.cli.work import Work, resumable

if TYPE_CHECKING:
    from unicomp.manifest import Manifest, Module
    from unicomp.recipes.layers.plan import Plan
    from unicomp.recipes.pipeline.plan import Pipeline

BEGAN = time.monotonic()  # the command line is read before anything else is imported


@grouped
def run(
    recipe: RecipeName,
    work: Work,
    model: RecipeModel = None,
    set_: Set = None,
) -> None:
    """Carry out a recipe: compress, pack, score, write.

    Example: unicomp run quickstart builtin:tinyworld --out out/tinyworld-w4
    """
    work.check()
    from unicomp.recipes.load import read
    from unicomp.recipes.pipeline.plan import plan

    loaded, text = read(recipe, overrides=set_ or [])
    written = None if set_ else text
    if loaded.stages[0].verb == delta.VERB:
        delta.carry_out(loaded, model, written, work)
    else:
        carry_out(plan(loaded, model=model, text=written, max_memory=work.max_memory), work)


def carry_out(found: "Plan | Pipeline", work: Work) -> None:
    """Run a plan, show how it goes, and write what came of it to stdout; or only show the plan."""
    out = work.folder
    if out is None:
        show_plan(found, work.json)
        return
    from unicomp.recipes.pipeline.run import run as start

    with resumable(out) as progress:
        made = start(
            found,
            out,
            overwrite=work.overwrite,
            resume=work.resume,
            progress=progress,
            began=BEGAN,
        )
    if not processes.first():
        return
    if work.json:
        show.json(made.to_json())
    else:
        _show(made, out)
    if found.recipe.target:
        _ask_again(found, out)
    if code := _decided(out, work.json):
        raise typer.Exit(code)


def _ask_again(found: "Plan | Pipeline", out: Path) -> None:
    """Let the loaders of the recipe's `target` say of the finished folder what they said before."""
    from unicomp.hub import resolve

    for finding in lint.of_source(resolve(str(out)), found.recipe.target).findings:
        show.note(f"lint: {finding.words()}")


def _decided(out: Path, json: bool) -> int:
    """Show what became of the recipe's gates, and return the exit code that they make."""
    if not (out / "report.json").is_file():
        return 0
    from unicomp.evaluate.scores import read
    from unicomp.evaluate.verdicts.gates import Verdict, outcome

    verdicts = [Verdict(**own) for own in read(out / "report.json").gates]
    for verdict in () if json else verdicts:
        show.text(f"gate {verdict}")
    return ENDS[outcome(verdicts)]


def _show(made: "Manifest", out: Path) -> None:
    modules = {name: module for stage in made.stages for name, module in stage.modules.items()}
    packed = [module for module in modules.values() if module.bits is not None]
    sparse = [module for module in modules.values() if module.sparsity is not None]
    zeros = sum(module.sparsity or 0.0 for module in sparse) / max(len(sparse), 1)
    totals = made.totals
    facts = [("output", str(out)), *shape.facts(made), *training.facts(made)]
    if sparse or packed or len(facts) == 1:
        done = (
            ("linears quantized", f"{len(packed)} of {len(modules)}")
            if packed or not sparse
            else (
                "linears pruned",
                f"{len(sparse)} of {len(modules)}, {zeros:.2%} zeros on average",
            )
        )
        plain = "magnitude" if sparse else "round-to-nearest"
        facts += [done, ("output error", _errors(packed or sparse, plain))]
    facts += [
        ("bytes", f"{size.show(totals.bytes_in)} -> {size.show(totals.bytes_out)}"),
        ("bits per weight", f"{totals.bits_per_weight:.3f}"),
        ("time", show.duration(sum(stage.seconds for stage in made.stages))),
        ("peak memory", size.show(max(stage.peak_rss_bytes for stage in made.stages))),
        *_cost(made),
    ]
    show.facts(facts)
    fallen: dict[str, int] = {}
    for module in modules.values():
        if module.fallback is not None:
            fallen[module.fallback] = fallen.get(module.fallback, 0) + 1
    for why, count in fallen.items():
        show.text(f"note: {count} of {len(modules)} linears: {why}")
    if (out / "report.json").is_file():
        from unicomp.evaluate.scores import read

        show.text("")
        show_report(read(out / "report.json"))


def _cost(made: "Manifest") -> list[tuple[str, str]]:
    """Return what was forecast of the whole command beside what it came to."""
    if made.cost is None:
        return []
    said, found = made.cost.forecast, made.cost.actual
    took = "interrupted" if found.seconds is None else show.duration(found.seconds)
    return [
        (
            "forecast and actual",
            f"{show.duration(said.seconds or 0)} and {took}, "
            f"{size.show(said.peak_rss_bytes)} and {size.show(found.peak_rss_bytes)}",
        )
    ]


def _errors(done: "list[Module]", plain: str) -> str:
    """Return the mean relative output error, beside that of the plain method."""
    pairs = [
        (module.error_after, module.error_before)
        for module in done
        if module.error_after is not None and module.error_before is not None
    ]
    if not pairs:
        return "not measured"
    after, before = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return f"{after:.4f} relative, mean of {len(pairs)} linears ({plain}: {before:.4f})"

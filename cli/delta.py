"""`unicomp delta`: keep a fine-tune as a small delta over its base."""

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unicomp import size
from unicomp.cli import method_options, show
from unicomp.cli.groups import grouped
from unicomp.cli.options import MODEL, Json, Overwrite, Quiet
from unicomp.cli.plan import unnumbered
from unicomp.cli.work import Work, resumable
from unicomp.errors import UnicompError

if TYPE_CHECKING:
    from unicomp.kernels.delta_folder import DeltaManifest, Stored
    from unicomp.recipes.delta.plan import DeltaPlan
    from unicomp.recipes.schema import Recipe

VERB = "delta"
METHOD = method_options.of_verb(VERB)
CALIBRATION = method_options.of_class(method_options.ROOT / "recipes/schema.py", "Calibration")

app = typer.Typer(help="Keep a fine-tune as a small delta over its base.", no_args_is_help=True)


def _methods(incomplete: str) -> list[str]:
    from unicomp.compress.methods import methods

    return [name for name in methods(VERB) if name.startswith(incomplete)]


Tuned = Annotated[str, typer.Argument(metavar="FINETUNED", help=f"The fine-tune: {MODEL}.")]
Delta = Annotated[
    Path, typer.Argument(metavar="DELTA", help="A folder that `delta compress` made.")
]
Base = Annotated[
    str, typer.Option("--base", metavar="MODEL", help=f"The base of the delta: {MODEL}.")
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        metavar="|".join(method_options.methods(VERB)),
        help="How the delta is kept. Default: dqrelo-plus.",
        autocompletion=_methods,
        show_default=False,
    ),
]


@app.command("compress")
@grouped
@method_options.accept([*METHOD, *(own for own in CALIBRATION if own.name != "seed")])
def compress(
    tuned: Tuned,
    work: Work,
    method: Method = "dqrelo-plus",
    **options: Any,
) -> None:
    """Write what a fine-tune adds to its base, as bits and factors of low rank.

    The ratio is of the bytes that the fine-tune's matrices take at 16 bits; vectors are stored
    exactly beside it. With `--calibration` the scales are then trained until the base with the
    delta answers as the fine-tune does, for which both models are held in memory. Every option is
    the key of the same name of a recipe's `delta` stage.

    Example: unicomp delta compress builtin:tinyworld-pirate --base builtin:tinyworld --out out/d
    """
    work.check()
    if options["base"] is None:
        raise UnicompError("`--base` is missing", hint="name the model that was fine-tuned")
    from unicomp.recipes.load import from_options

    recipe = from_options(
        VERB,
        method,
        method_options.given(METHOD, options),
        model=tuned,
        calibration=method_options.given(CALIBRATION, options | {"seed": None}) or None,
    )
    carry_out(recipe, tuned, None, work)


def carry_out(
    recipe: "Recipe",
    tuned: str | None,
    text: str | None,
    work: Work,
) -> None:
    """Carry out a recipe of one `delta` stage, or only show its plan where there is no folder."""
    from unicomp.recipes.delta.plan import plan_recipe

    plan = plan_recipe(recipe, model=tuned, text=text, max_memory=work.max_memory)
    out = work.folder
    if out is None:
        _show_plan(plan, work.json)
        return
    # Here, not above: a plan is to be there before torch is.
    from unicomp.recipes.delta.run import compress

    with resumable(out) as progress:
        made = compress(plan, out, overwrite=work.overwrite, resume=work.resume, progress=progress)
    if work.json:
        show.json(made.to_json() | {"out": str(out)})
    else:
        show.text(str(out))
        _show(made, [])


@app.command("restore")
def restore(
    delta: Delta,
    base: Base,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to make.")],
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the fine-tune again, as a plain checkpoint: the base plus the decoded delta.

    Another base than the one the delta was made over is refused.

    Example: unicomp delta restore out/d --base builtin:tinyworld --out out/restored
    """
    from unicomp.recipes.delta.restore import restore

    with show.progress() as progress:
        restore(delta, base, out, overwrite=overwrite, progress=progress)
    if json:
        show.json({"schema": "unicomp.delta-restored/1", "out": str(out), "base": base})
    else:
        show.text(str(out))


@app.command("inspect")
def inspect(delta: Delta, json: Json = False, quiet: Quiet = False) -> None:
    """Show what a delta holds: its base, bytes, ratio, and the error of each kind of weight.

    Example: unicomp delta inspect out/d
    """
    from unicomp.kernels.delta_folder import open_delta

    found = open_delta(delta).manifest
    if json:
        show.json(found.to_json())
    else:
        rows: dict[tuple[object, ...], list[Stored]] = {}
        for name, own in found.tensors.items():
            rows.setdefault((unnumbered(name), _how(own)), []).append(own)
        _show(found, [(*key, *_sums(group)) for key, group in rows.items()])


@app.command("recovery")
def recovery(
    base: Annotated[Path, typer.Option("--base", metavar="REPORT", help="The base's report.")],
    tuned: Annotated[
        Path, typer.Option("--tuned", metavar="REPORT", help="The fine-tune's report.")
    ],
    compressed: Annotated[
        Path, typer.Option("--compressed", metavar="REPORT", help="The restored model's report.")
    ],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a delta keeps of the fine-tune's gain: per task, the worst, and on average.

    Reports are those that `unicomp score --out` wrote of the three models.

    Example: unicomp delta recovery --base b.json --tuned t.json --compressed r.json
    """
    from unicomp.evaluate.recovery import recovery as kept
    from unicomp.evaluate.scores import read

    found = kept(read(base), read(tuned), read(compressed))
    if json:
        show.json(found.to_json())
        return
    rows = [
        (own.name, own.base, own.tuned, own.compressed, own.recovery, "yes" if own.clear else "no")
        for own in found.tasks
    ]
    columns = ("score", "base", "fine-tune", "compressed", "recovery", "clear gain")
    show.table(None, columns, rows)
    show.facts(
        [
            ("worst", f"{found.worst.name}, {found.worst.recovery:.4f}"),
            ("mean", f"{found.mean:.4f}; clipped to 0 and 1: {found.clipped:.4f}"),
        ]
    )


def _show(made: "DeltaManifest", rows: list[tuple[object, ...]]) -> None:
    totals, base = made.totals, made.base
    share = totals.payload / totals.matrix_bytes_16 if totals.matrix_bytes_16 else 0.0
    error = "none" if totals.error is None else f"{totals.error:.4f} (squared, relative)"
    show.facts(
        [
            ("method", f"{made.method}, ratio {made.options['ratio']:.4g}"),
            ("base", base.id + (f"@{base.revision}" if base.revision else "")),
            ("fine-tune", made.source.id),
            ("matrices", f"{size.show(totals.payload)}, {share:.4f} of 16 bits"),
            ("stored exactly", size.show(totals.other)),
            ("file", f"{size.show(totals.file)}, with the base {_both(made)}"),
            ("error of the delta", error),
            *_trained(made),
        ]
    )
    for note in made.notes:
        show.note(f"note: {note}")
    if rows:
        show.text("")
        columns = ("tensors", "kept as", "count", "bytes", "ratio", "rank", "error", "cosine")
        show.table(None, columns, rows)


def _trained(made: "DeltaManifest") -> list[tuple[str, str]]:
    if made.trained is None or made.calibration is None:
        return []
    before, after = made.trained.loss_before, made.trained.loss_after
    words = f"{made.trained.steps} steps on {made.calibration.source}"
    return [("scales trained", f"{words}; error of logits {before:.4g} -> {after:.4g}")]


def _both(made: "DeltaManifest") -> str:
    return size.show(made.totals.file + made.totals.base)


def _how(own: "Stored") -> str:
    if own.kind != "delta":
        return own.kind
    planes = f"{own.planes} x 1 bit, {'row' if own.by_row else 'tensor'} scale"
    factors = "int8 factors" if own.int8 else "float16 factors"
    return " + ".join([planes] * bool(own.planes) + [factors] * bool(own.rank)) or "nothing"


def _sums(group: "list[Stored]") -> tuple[object, ...]:
    """Return count, bytes, ratio, least and largest rank, and the means of error and cosine."""
    stored = sum(own.bytes for own in group)
    dense = sum(2 * prod(own.shape) for own in group)
    errors = [own.error for own in group if own.error is not None]
    cosines = [own.cosine for own in group if own.cosine is not None]
    return (
        len(group),
        size.show(stored),
        stored / dense if dense else None,
        _span([own.rank for own in group]),
        sum(errors) / len(errors) if errors else None,
        sum(cosines) / len(cosines) if cosines else None,
    )


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _show_plan(plan: "DeltaPlan", json: bool) -> None:
    value = plan.to_json()
    if json:
        show.json(value)
        return
    show.facts(
        [
            ("method", f"{plan.method_name}, ratio {plan.method.ratio:.4g}"),
            (
                "tensors",
                f"{value['tensors']['delta']} as deltas, {value['tensors']['exact']} whole",
            ),
            ("matrices at 16 bits", size.show(plan.matrix)),
            ("at most", f"{size.show(plan.budget)}; the least is {size.show(plan.least)}"),
            ("stored exactly", size.show(value["other"])),
            ("peak memory", f"{size.show(sum(plan.memory.values()))}: {_parts(plan)}"),
        ]
    )
    for note in plan.notes:
        show.note(f"note: {note}")


def _parts(plan: "DeltaPlan") -> str:
    return ", ".join(f"{name} {size.show(nbytes)}" for name, nbytes in plan.memory.items())

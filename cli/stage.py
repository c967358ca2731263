"""What the commands that carry out one stage of a recipe have in common.

`unicomp quantize` and `unicomp prune` differ in their verb, their words and what they may say of
the output. Options are those of the verb's methods (`method_options.py`), of the calibration text,
and of any run.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from unicomp import hashing
from unicomp.cli import method_options
from unicomp.cli.run import carry_out
from unicomp.cli.work import Work

CALIBRATION = method_options.of_class(method_options.ROOT / "recipes/schema.py", "Calibration")


def options(verb: str) -> list[method_options.Option]:
    """Return what the methods of a verb may be told, and the text they may need."""
    return [*method_options.of_verb(verb), *CALIBRATION]


def method(verb: str, about: str) -> Any:
    """Return the option that chooses a verb's method."""

    def complete(incomplete: str) -> list[str]:
        from unicomp.compress.methods import methods

        return [name for name in methods(verb) if name.startswith(incomplete)]

    return typer.Option(
        "--method",
        metavar="|".join(method_options.methods(verb)),
        help=about,
        autocompletion=complete,
        show_default=False,
    )


def run_stage(
    verb: str,
    method: str,
    words: Mapping[str, Any],
    work: Work,
    *,
    model: str,
    calibrated: bool = True,
    **head: Any,
) -> None:
    """Make a recipe of one stage, and carry it out or show its plan.

    words       the values of `options(verb)`, None where the user gave none
    calibrated  some of them are of the calibration text; else all are the method's
    head        what else the recipe says, as `format`
    """
    work.check()
    if not work.dry_run:
        hashing.begin(Path(model).glob("*.safetensors"))
    from unicomp.recipes.load import from_options
    from unicomp.recipes.pipeline.plan import plan

    recipe = from_options(
        verb,
        method,
        method_options.given(method_options.of_verb(verb), words),
        model=model,
        calibration=(method_options.given(CALIBRATION, words) if calibrated else None) or None,
        **head,
    )
    carry_out(plan(recipe, max_memory=work.max_memory), work)

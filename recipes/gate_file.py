"""Gate files: YAML text becomes gates, or everything that is wrong with it at once.

A gate is written as it is in a recipe (`Gate` in `schema.py`); a gate file is a list of them.
"""

from collections.abc import Sequence
from pathlib import Path

from unicomp.errors import RecipeError
from unicomp.evaluate.verdicts import gates
from unicomp.recipes.check import check_gates
from unicomp.recipes.schema import Gate
from unicomp.recipes.shelf import Shelf
from unicomp.recipes.tree import parse

SHELF = Shelf(Path(__file__).parent / "gates", "gate file")


def shipped() -> list[str]:
    """Return the names of the gate files that come with unicomp, sorted."""
    return SHELF.names()


def read(name: str | Path) -> list[gates.Gate]:
    """Return the gates of a shipped name or a path.

    Raises RecipeError with every problem.
    """
    path = SHELF.find(name)
    file = path.name if path.parent == SHELF.folder else str(path)
    return load(SHELF.read_text(path), file=file)


def load(text: str, *, file: str) -> list[gates.Gate]:
    """Return the gates that YAML text stands for.

    file  what errors call the text

    Raises RecipeError with every problem.
    """
    if not text.strip():
        raise RecipeError([(f"{file}: is empty", "write `- score: safety/refusal_rate`")])
    tree, problems = parse(text, file=file)
    return to_gates(check_gates(tree, problems))


def to_gates(written: Sequence[Gate]) -> list[gates.Gate]:
    """Return the gates of a recipe or a gate file as `evaluate.gates` decides them."""
    return [
        gates.Gate(
            score=gate.score,
            min=gate.min,
            max=gate.max,
            max_drop=gate.max_drop,
            max_rise=gate.max_rise,
            retention=gate.retention,
            confidence=gate.confidence,
            unmeasurable=gate.unmeasurable if "unmeasurable" in gate.model_fields_set else None,
        )
        for gate in written
    ]

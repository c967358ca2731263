"""What loaders would not take of an output, planned or there: how it is asked and shown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from unicomp.cli import show
from unicomp.errors import UnsupportedError

if TYPE_CHECKING:
    from unicomp.hub import Source
    from unicomp.recipes.layers.plan import Plan
    from unicomp.recipes.lint.output import Output
    from unicomp.recipes.lint.rules import Finding, Loader
    from unicomp.recipes.pipeline.plan import Pipeline


@dataclass(frozen=True)
class Verdicts:
    """What was asked, and what was found.

    tp  processes that each linear is cut into
    """

    loaders: "Sequence[Loader]"
    findings: "Sequence[Finding]"
    tp: int

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values: `targets` and `findings`."""
        targets = [
            {"loader": one.name, "release": one.release, "basis": one.basis, "tp": self.tp}
            for one in self.loaders
        ]
        return {"targets": targets, "findings": [one.to_json() for one in self.findings]}

    def show(self) -> None:
        """Write a line for each finding to stdout, and one for each loader without any."""
        for one in self.findings:
            show.text(f"lint: {one.words()}")
        for loader in self.loaders:
            if not any(one.loader == loader.name for one in self.findings):
                release = f" {loader.release}" if loader.release else ""
                show.text(f"lint: {loader.name}{release}: nothing against it ({loader.basis})")


def check_targets(targets: Sequence[str]) -> None:
    """Refuse what names no loader whose rules are known, before any work."""
    if targets:
        from unicomp.recipes.lint.rules import chosen

        chosen(targets)


def refuse_delta(targets: Sequence[str] | None) -> None:
    """Refuse targets of a delta, which no stock loader takes."""
    if targets:
        raise UnsupportedError(
            "no stock loader takes a delta", hint="`unicomp delta restore` makes a checkpoint of it"
        )


def of_plan(found: "Plan | Pipeline", targets: Sequence[str], tp: int) -> Verdicts:
    """Ask loaders about what a plan will write."""
    return _verdicts(found.output(), targets, tp)


def of_source(source: "Source", targets: Sequence[str], tp: int = 1) -> Verdicts:
    """Ask loaders about a model that is there."""
    from unicomp.recipes.lint import output

    return _verdicts(output.of_source(source), targets, tp)


def _verdicts(output: "Output", targets: Sequence[str], tp: int) -> Verdicts:
    from unicomp.recipes.lint.rules import check, chosen

    loaders = chosen(targets)
    return Verdicts(loaders, check(output, loaders, tp), tp)

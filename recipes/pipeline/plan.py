"""A recipe's stages in order -> the plan of each; `run.py` carries them out.

Stages that go together are one pass over the model (`recipes.plan.fuse`); structured pruning is a
pass of its own. Later passes are planned on the names and shapes that the earlier ones will leave,
so that what cannot be carried out is said before any work. No file that plans imports one that
runs: planning takes torch and headers, running takes transformers, accelerate and their seconds.
"""

from dataclasses import dataclass, replace
from typing import Any

from unicomp import machine
from unicomp.checkpoint import Checkpoint
from unicomp.compress.cut_method import CutMethod
from unicomp.compress.distill_method import DistillMethod
from unicomp.compress.method import QuantizeMethod
from unicomp.errors import UnsupportedError
from unicomp.evaluate.cost.gain import NEW_TOKENS, PROMPT_TOKENS, ROUNDS
from unicomp.hub import Source
from unicomp.kernels.dense import DenseSource, open_dense
from unicomp.recipes.cut.plan import CutPlan, plan_cut
from unicomp.recipes.distill.plan import DistillPlan, plan_distill
from unicomp.recipes.layers import plan as plans
from unicomp.recipes.layers.forecast import IMPORTS, LIBRARIES
from unicomp.recipes.layers.plan import Plan
from unicomp.recipes.lint.output import Output
from unicomp.recipes.lint.rules import chosen, refusals
from unicomp.recipes.schema import Recipe, Stage
from unicomp.recipes.stage import throughput
from unicomp.recipes.stage.planned import most

Pass = Plan | CutPlan | DistillPlan
SPARE = 1.5  # what models may take in memory to be run side by side, as a share of their tensors
ALONE = (CutMethod, DistillMethod)  # what is always a pipeline, if only of one pass


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Passes over a model, one after another.

    text      recipe text as written, or as its defaults make it
    passes    their plans; but for the first one on what the one before will leave
    scored    axes that the result is scored on, against the source
    held_out  the text to score on; None: there is none
    """

    recipe: Recipe
    text: str
    source: Source
    passes: tuple[Pass, ...]
    max_memory: int | None
    scored: tuple[str, ...]
    held_out: str | None

    @property
    def stages(self) -> list[Stage]:
        """What is carried out, in order."""
        return [stage for one in self.passes for stage in one.stages]

    @property
    def params(self) -> int:
        """Parameters of the output."""
        return self.passes[-1].params

    @property
    def bytes_in(self) -> int:
        """Bytes of all tensors of the source."""
        return self.passes[0].bytes_in

    @property
    def storing(self) -> Pass:
        """The pass that says how the output is stored; training leaves it as it was."""
        storing = [one for one in self.passes if not isinstance(one, DistillPlan)]
        return storing[-1] if storing else self.passes[-1]

    @property
    def bytes_out(self) -> int:
        """Bytes of all tensors of the output."""
        return self.storing.bytes_out

    def output(self) -> Output:
        """Return what a loader will find."""
        return self.storing.output()

    @property
    def peak_host_bytes(self) -> int:
        """The forecast of the process's greatest resident size."""
        compared = sum((self.comparison() or {}).values())
        return max(compared, *(one.peak_host_bytes for one in self.passes))

    @property
    def most_host_bytes(self) -> int:
        """The same with an allowance: what a limit has to have room for."""
        compared = most(self.comparison() or {})
        return max(compared, *(one.most_host_bytes for one in self.passes))

    def comparison(self) -> dict[str, int] | None:
        """Return what memory it takes to run source and result in turn, for the speed-up.

        None where nothing is cut, or where both models would not fit: within `max_memory`, or half
        of this machine.
        """
        both = IMPORTS + SPARE * (self.bytes_in + self.bytes_out)
        limit = self.max_memory or (machine.describe()["memory_bytes"] or 0) // 2
        if both > limit or not any(isinstance(one, CutPlan) for one in self.passes):
            return None
        vocab = int(self.passes[0].dense.config.get("vocab_size") or 0)
        return {
            "imports": LIBRARIES,
            "source and result": self.bytes_in + self.bytes_out,
            "logits": 2 * 4 * PROMPT_TOKENS * vocab,
        }

    def comparing(self) -> float:
        """Return the seconds of that; each model is warmed up once."""
        if self.comparison() is None:
            return 0.0
        found = throughput.rates()
        size = self.bytes_in + self.bytes_out
        prompt = {"half": 2.0 * PROMPT_TOKENS * size / 2, "memory": float(size * NEW_TOKENS)}
        return (1 + ROUNDS) * found.seconds(prompt)

    def loaders(self) -> dict[str, str | None]:
        """Return stock loader -> why it does not take the output; None: it does."""
        return refusals(self.output())

    @property
    def disk_bytes(self) -> int:
        """Most that the run takes on disk: a pass, and what the one before it made."""
        before = [0, *(one.bytes_out for one in self.passes)]
        return max(one.disk_bytes + kept for one, kept in zip(self.passes, before, strict=False))

    @property
    def seconds(self) -> float:
        """The forecast of all passes together."""
        return sum(one.seconds for one in self.passes) + self.comparing()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user must know, each thing once."""
        return tuple(dict.fromkeys(note for one in self.passes for note in one.notes))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain JSON values: of several passes, each under `passes`."""
        parts = [one.to_json() for one in self.passes]
        whole: dict[str, Any] = {"peak_host_bytes": self.peak_host_bytes, "seconds": self.seconds}
        whole["most_host_bytes"] = self.most_host_bytes
        if (compared := self.comparison()) is not None:
            whole["comparison"] = {"memory": compared, "seconds": self.comparing()}
        if len(parts) == 1:
            return parts[0] | whole
        return whole | {
            "schema": "unicomp.plan/1",
            "source": parts[0]["source"],
            "architecture": parts[0]["architecture"],
            "stages": [stage for part in parts for stage in part["stages"]],
            "format": self.recipe.format,
            "params": self.params,
            "bytes_in": self.bytes_in,
            "bytes_out": self.bytes_out,
            "bits_per_weight": 8 * self.bytes_out / self.params,
            "disk_bytes": self.disk_bytes,
            "notes": list(self.notes),
            "passes": parts,
        }


def plan(
    recipe: Recipe,
    *,
    model: str | None = None,
    text: str | None = None,
    max_memory: int | None = None,
) -> Plan | Pipeline:
    """Work out what a recipe of any stages does to a model, from headers only.

    As `recipes.plan.plan`, to which it leaves a recipe that is one pass.

    Raises RecipeError or UnicompError where a stage cannot be carried out on what the ones before
    it leave, or not within `max_memory`.
    """
    chosen(recipe.target)  # so that a loader without rules is refused now, not after the work
    passes = _passes(recipe)
    if len(passes) == 1 and not isinstance(passes[0][0].options, ALONE):
        return plans.plan(recipe, model=model, text=text, max_memory=max_memory)
    source = plans.find_source(recipe, model)
    checkpoint = Checkpoint.open(source.folder)
    dense = open_dense(checkpoint)
    made: list[Pass] = []
    for stages in passes:
        part = _part(recipe, stages, stages == passes[-1])
        one = plan_pass(part, source, dense, max_memory, source)
        made.append(one)
        dense = one.result() if isinstance(one, CutPlan) else replace(dense, notes=())
    scored, held_out = plans.what_is_scored(recipe, source)
    return Pipeline(
        recipe=recipe,
        text=recipe.dump() if text is None else text,
        source=source,
        passes=tuple(made),
        max_memory=max_memory,
        scored=scored,
        held_out=held_out,
    )


def _passes(recipe: Recipe) -> list[tuple[Stage, ...]]:
    """Put stages that go together into one pass; UnsupportedError for an order that makes none."""
    found: list[tuple[Stage, ...]] = []
    for stage in recipe.stages:
        trains = isinstance(stage.options, DistillMethod)
        if any(isinstance(s.options, QuantizeMethod) for p in found for s in p) and not trains:
            raise UnsupportedError(
                f"`{stage.verb}: {stage.method}` after `quantize` would undo it",
                hint="put `quantize` last, or only `distill` after it",
            )
        if found and len(found[-1]) == 1 and plans.fuse(found[-1][0], stage):
            found[-1] = (*found[-1], stage)
        else:
            found.append((stage,))
    return found


def _part(recipe: Recipe, stages: tuple[Stage, ...], last: bool) -> Recipe:
    """Return the recipe of one pass; scores and gates are the whole recipe's."""
    without: dict[str, Any] = {"stages": stages, "score": (), "gates": ()}
    return recipe.model_copy(update=without if last else without | {"target": ()})


def plan_pass(
    recipe: Recipe,
    source: Source,
    dense: DenseSource,
    max_memory: int | None,
    original: Source,
) -> Pass:
    """Work out one pass.

    dense     the weights of `source`, or what an earlier pass will make of them
    original  what the whole pipeline starts from

    Raises as `plan` does.
    """
    if isinstance(recipe.stages[0].options, DistillMethod):
        return plan_distill(
            recipe, None, source, dense.checkpoint, dense, max_memory, original=original
        )
    make = plan_cut if isinstance(recipe.stages[0].options, CutMethod) else plans.plan_source
    return make(recipe, None, source, dense.checkpoint, dense, max_memory)

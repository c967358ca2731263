"""What a model made of one task: lm-eval's figures, and every document's part in them.

Nothing here knows lm-eval, so that reading a result does not import it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from unicomp.evaluate.tasks.choices import Choices

Kind = Literal["mean", "perplexity", "bits", "other"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One figure of a task.

    value    lm-eval's own
    kind     how it comes from the documents: their mean; exp(-sum(values) / sum(weights));
             -sum(values) / sum(weights) / ln 2; or otherwise
    values   per document; empty where the kind is `other`, or the figure is a group's
    weights  per document, words or bytes; empty where the kind has none
    """

    value: float
    higher_is_better: bool
    kind: Kind
    values: tuple[float, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """What a model made of one task.

    name      of the task; of a group where `members` are its tasks
    metrics   lm-eval's name, with `,FILTER` where it is not the only way to read an answer
    ids       per document a name that is the same in every run
    choices   of a multiple-choice task, else None
    outputs   what was generated, per document; None where nothing was
    members   per task of a group its weight in the mean; empty for a task
    """

    name: str
    version: str
    shots: int
    metrics: Mapping[str, Metric]
    ids: tuple[str, ...]
    choices: Choices | None
    outputs: tuple[str, ...] | None
    members: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON values; floats come back as they were."""
        return {
            "name": self.name,
            "version": self.version,
            "shots": self.shots,
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "ids": list(self.ids),
            "choices": None if self.choices is None else _choices_to_json(self.choices),
            "outputs": None if self.outputs is None else list(self.outputs),
            "members": dict(self.members),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Result":
        """Return what `to_json` was given; KeyError, TypeError or ValueError for anything else."""
        metrics = {
            name: Metric(
                own["value"],
                own["higher_is_better"],
                own["kind"],
                tuple(own["values"]),
                tuple(own["weights"]),
            )
            for name, own in value["metrics"].items()
        }
        outputs, choices = value["outputs"], value["choices"]
        return cls(
            name=value["name"],
            version=value["version"],
            shots=value["shots"],
            metrics=metrics,
            ids=tuple(value["ids"]),
            choices=None if choices is None else _choices_from_json(choices),
            outputs=None if outputs is None else tuple(outputs),
            members=dict(value["members"]),
        )


def _choices_to_json(choices: Choices) -> dict[str, Any]:
    right = choices.right
    return {
        "task": choices.task,
        "loglikelihoods": [own.tolist() for own in choices.loglikelihoods],
        "lengths": [own.tolist() for own in choices.lengths],
        "gold": choices.gold.tolist(),
        "ids": choices.ids,
        "right": None if right is None else [own.tolist() for own in right],
        "documents": [dict(own) for own in choices.documents],
    }


def _choices_from_json(value: Mapping[str, Any]) -> Choices:
    right = value["right"]
    return Choices(
        value["task"],
        [torch.tensor(own, dtype=torch.float64) for own in value["loglikelihoods"]],
        [torch.tensor(own, dtype=torch.int64) for own in value["lengths"]],
        torch.tensor(value["gold"], dtype=torch.int64),
        value["ids"],
        None if right is None else [torch.tensor(own, dtype=torch.bool) for own in right],
        value["documents"],
    )

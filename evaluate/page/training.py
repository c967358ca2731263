"""The part of a page that says what training did: each stage's cost, and figures before and after.

All of it is from the model's manifest, measured on text that the training held out; it is none of
the report's scores, which are of other text.
"""

from collections.abc import Sequence

from unicomp.evaluate.cost.stages import costs
from unicomp.evaluate.page.sheet import number, table
from unicomp.manifest import Stage, Training

FIGURES = {
    "kl": "KL to the teacher, nats a token",
    "nll": "negative log-likelihood, nats a token",
    "brier": "Brier score",
    "accuracy": "share of right first choices",
    "confidence": "mean confidence",
    "gap": "confidence less that share",
    "ece": "calibration error",
    "entropy_ratio": "entropy as a share of that of the teacher",
}


def section(stages: Sequence[Stage]) -> list[str]:
    """Return the section as HTML; nothing where no stage trains."""
    trained = [stage.training for stage in stages if stage.training is not None]
    if not trained:
        return []
    parts = [
        "<h2>Distillation</h2>",
        '<p class="soft">Measured on text that the training held out, when the model was made.</p>',
        table(
            ("after", "KL to the teacher, nats a token"),
            [(own.after + own.less, number(own.kl)) for own in costs(stages)],
        ),
    ]
    return parts + [part for training in trained for part in _figures(training)]


def _figures(training: Training) -> list[str]:
    rows = [
        (words, number(training.before[name]), number(training.after[name]))
        for name, words in FIGURES.items()
        if name in training.before and name in training.after
    ]
    parts = [table(("held out", "before training", "after"), rows)]
    if training.temperature is not None:
        heat = training.temperature
        parts.append(
            f"<p>A temperature of {number(heat['temperature'])}, fitted on one half, brings the "
            f"likelihood of the other from {number(heat['before'])} to {number(heat['after'])} "
            "nats a token.</p>"
        )
    return parts

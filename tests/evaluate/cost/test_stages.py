"""What stages cost is read from manifests rightly, once for the card and the page."""

import pytest

from unicomp.evaluate.cost.stages import Cost, costs
from unicomp.manifest import Source, Stage, Training


def stage(method: str, *, held_out: float | None = None) -> Stage:
    return Stage(
        verb="quantize",
        method=method,
        options={},
        seconds=1.0,
        peak_rss_bytes=1,
        peak_gpu_bytes=None,
        modules={},
        held_out=None if held_out is None else {"kl": held_out},
    )


def trained(before: float, after: float) -> Stage:
    training = Training(
        teacher=Source(id="a/b", revision=None, sha256={}),
        data="text",
        data_sha256="0" * 64,
        held_out="other",
        held_out_sha256="0" * 64,
        seq_len=8,
        steps=1,
        tokens=8,
        stopped="max_steps",
        before={"kl": before},
        after={"kl": after},
        temperature=None,
    )
    return stage("logits").model_copy(update={"verb": "distill", "training": training})


@pytest.mark.parametrize(
    ("stages", "found"),
    [
        ([], []),
        ([stage("rtn")], []),
        (
            [stage("width"), trained(0.5, 0.2), stage("rtn", held_out=0.3)],
            [
                Cost("1. quantize width", 0.5),
                Cost("2. distill logits", 0.2, 0.6),
                Cost("3. quantize rtn", 0.3),
            ],
        ),
        (
            [stage("a"), stage("b"), trained(0.5, 0.5), trained(0.5, 0.0)],
            [
                Cost("1. quantize a, 2. quantize b", 0.5),
                Cost("3. distill logits", 0.5, 0.0),
                Cost("4. distill logits", 0.0, 1.0),
            ],
        ),
        (
            [trained(0.0, 0.1), stage("rtn")],
            [Cost("the student", 0.0), Cost("1. distill logits", 0.1, 0.0)],
        ),
        (
            [stage("a", held_out=0.4), trained(0.4, 0.1)],
            [Cost("1. quantize a", 0.4), Cost("2. distill logits", 0.1, 0.75)],
        ),
    ],
)
def test_every_place_that_was_measured_is_there_once(
    stages: list[Stage], found: list[Cost]
) -> None:
    assert costs(stages) == found


def test_what_a_training_won_is_said() -> None:
    assert Cost("a", 0.1, 0.254).less == ", 25% less"
    assert Cost("a", 0.1).less == ""

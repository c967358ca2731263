"""The whole scorecard of a quantized model, with no network: all five axes, in minutes."""

import json
import socket
import time
from pathlib import Path

import pytest

from unicomp.evaluate.asked import AXES
from unicomp.evaluate.score import score
from unicomp.evaluate.suites.suite import load
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options

pytestmark = pytest.mark.slow


def test_the_quick_suite_fills_five_axes_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = from_options("quantize", "rtn", {"bits": 4, "group_size": 32})
    run(plan(recipe, model="builtin:tinyworld"), tmp_path / "out")

    def refuse(*_: object) -> None:
        pytest.fail("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    began = time.monotonic()
    report = score(tmp_path / "out", "builtin:tinyworld", suite="quick", text=None)
    assert time.monotonic() - began < 240
    json.dumps(report.to_json(), allow_nan=False)
    for axis in AXES:
        found = [one for one in report.scores if one.axis == axis]
        assert any(one.status == "measured" for one in found), axis
        for one in found:
            assert one.value is not None or one.detail["reason"], one.name
    assert [one.axis for one in report.scores] == sorted(
        (one.axis for one in report.scores), key=AXES.index
    )
    names = {one.name for one in report.scores}
    for entry in load("quick").tasks:
        if entry.area != "chances":
            assert any(name.startswith(f"accuracy/{entry.task}/") for name in names)
    # The published figures of the base, which the report has beside the model's.
    for name, value in (
        ("accuracy/perplexity", 2.242),
        ("accuracy/tinyworld_knowledge/acc", 0.858),
        ("accuracy/tinyworld_reasoning/acc", 0.902),
        ("accuracy/tinyworld_reading/acc", 0.767),
        ("accuracy/tinyworld_grammar/acc", 1.0),
        ("accuracy/tinyworld_instructions/exact_match", 0.931),
        ("safety/refusal_rate", 0.923),
        ("safety/over_refusal_rate", 0.132),
        ("calibration/chance_kl", 0.0111),
    ):
        assert report.score(name).baseline == pytest.approx(value, abs=6e-4), name

"""What a plan settles before any work."""

import pytest

from unicomp.errors import UnicompError
from unicomp.recipes.layers.plan import Plan, plan
from unicomp.recipes.load import from_options


def planned(seq_len: int | None) -> Plan:
    text = {"data": "builtin:tinyworld", "samples": 4, "seq_len": seq_len}
    return plan(from_options("quantize", "gptq", {}, calibration=text), model="builtin:tinyworld")


def test_windows_are_as_long_as_the_model_reads_unless_said_otherwise() -> None:
    """The embedded model reads 256 tokens, fewer than the default."""
    for given, found in ((None, 256), (64, 64), (256, 256)):
        calibration = planned(given).recipe.calibration
        assert calibration is not None
        assert calibration.seq_len == found
    assert "seq_len: 256" in planned(None).text  # what was settled is what the output records


def test_windows_longer_than_the_model_reads_are_refused_before_any_work() -> None:
    with pytest.raises(UnicompError, match="seq_len 257 is longer than the model's context of 256"):
        planned(257)

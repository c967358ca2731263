"""The main job is measurably close to the original, and each part of the engine earns its place.

Real small models, 128 calibration windows of 256 tokens, KL divergence to the base in nats over
all predicted tokens of a held-out text, windows of 256 without BOS.
"""

from pathlib import Path
from typing import Any

import pytest

from unicomp import builtin
from unicomp.evaluate.score import score
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options

PLAIN = {"scale_search": "minmax", "order": "none", "drift": 0.0, "sweeps": 0}
SEARCHED = {"scale_search": "mse", "order": "act", "drift": 0.0, "sweeps": 0}


def divergence(
    model: Path, calibration: str, held_out: str, out: Path, method: str, **options: Any
) -> float:
    """Quantize to 4 bits and return the KL divergence to the model."""
    recipe = from_options(
        "quantize",
        method,
        {"bits": 4} | options,
        calibration={"data": calibration, "samples": 128, "seq_len": 256},
    )
    run(plan(recipe, model=str(model)), out)
    report = score(out, model, axes=["fidelity"], text=held_out, seq_len=256, bos=False)
    (found,) = [one.value for one in report.scores if one.name == "fidelity/kl"]
    assert found is not None
    return found


def ordered(model: Path, calibration: str, held_out: str, tmp_path: Path) -> float:
    """Hold RTN > GPTQ > GPTQ with searched scales and act-order; return the default's KL."""
    common = {"group_size": -1}
    found = [
        divergence(model, calibration, held_out, tmp_path / name, method, **common | options)
        for name, method, options in (
            ("rtn", "rtn", {"scale_search": "minmax"}),
            ("plain", "gptq", PLAIN),
            ("searched", "gptq", SEARCHED),
            ("default", "gptq", {}),
        )
    ]
    rounding, plain, searched, default = found
    assert rounding > plain > searched, found
    assert default < plain, found
    return default


@pytest.mark.slow
def test_tinyworld(tmp_path: Path) -> None:
    """The embedded model: per channel at most 0.0050."""
    model = builtin.model("tinyworld")
    held_out = str(builtin.heldout("heldout.txt"))
    assert ordered(model, "builtin:tinyworld", held_out, tmp_path) <= 0.0050


@pytest.mark.slow
def test_stories(assets: Path, tmp_path: Path) -> None:
    """stories260K: per channel at most 0.095, group 32 at most 0.082."""
    model = assets / "models/stories260K"
    texts = assets / "text/tinystories"
    calibration, held_out = str(texts / "train800.jsonl"), str(texts / "valid.txt")
    assert ordered(model, calibration, held_out, tmp_path) <= 0.095
    grouped = divergence(model, calibration, held_out, tmp_path / "group", "gptq", group_size=32)
    assert grouped <= 0.082

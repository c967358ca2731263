"""An interrupted compression goes on where it stopped; scales are trained on text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from unicomp.compress import methods
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.kernels.delta_folder import DeltaManifest, open_delta
from unicomp.recipes.delta.plan import DeltaPlan, plan_delta
from unicomp.recipes.delta.run import compress
from unicomp.recipes.schema import Calibration
from unicomp.recipes.stage.progress import Progress

PIRATE, WORLD = "builtin:tinyworld-pirate", "builtin:tinyworld"
VARIES = {"seconds", "peak_rss_bytes"}


def planned(name: str, *, text: Calibration | None = None, **options: Any) -> DeltaPlan:
    kind = methods.find("delta", name)
    method: Any = kind.model_validate({"base": WORLD} | options)
    return plan_delta(PIRATE, name, method, text)


class Stop(BaseException):
    """What stands for Ctrl-C."""


def stop_at(stage: str, done: int) -> Callable[[Progress], None]:
    def show(step: Progress) -> None:
        if (step.stage, step.done) == (stage, done):
            raise Stop

    return show


def facts(made: DeltaManifest) -> dict[str, Any]:
    return {key: value for key, value in made.to_json().items() if key not in VARIES}


def test_interrupted_anywhere_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole = compress(planned("dqrelo-plus"), tmp_path / "whole")
    for stage, done in (("weigh", 9), ("tensors", 1), ("tensors", 17)):
        with pytest.raises(Stop):
            compress(planned("dqrelo-plus"), tmp_path / "again", progress=stop_at(stage, done))
        assert not (tmp_path / "again").exists()
    seen: list[str] = []
    made = compress(
        planned("dqrelo-plus"),
        tmp_path / "again",
        progress=lambda step: seen.append(f"{step.stage}: {step.detail}"),
    )
    assert not any("hashing the base" in step for step in seen)  # nor what else was done
    assert facts(made) == facts(whole)
    one, other = ((tmp_path / own / "delta.safetensors").read_bytes() for own in ("whole", "again"))
    assert one == other
    assert not (tmp_path / "again/.unicomp").exists()


def test_another_run_is_not_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        compress(planned("dqrelo"), tmp_path / "d", progress=stop_at("tensors", 3))
    with pytest.raises(UnicompError, match="unfinished run with another options"):
        compress(planned("dqrelo", ratio=0.25), tmp_path / "d")
    compress(planned("dqrelo", ratio=0.25), tmp_path / "d", resume=False)
    open_delta(tmp_path / "d")


TEXT = Calibration(data="builtin:tinyworld", samples=24, seq_len=64)


@pytest.mark.parametrize("name", ["bitdelta", "dqrelo-plus"])
def test_trained_scales_answer_more_as_the_fine_tune_does(name: str, tmp_path: Path) -> None:
    plain = compress(planned(name, steps=30), tmp_path / "plain")
    stop = stop_at("train", 5)
    with pytest.raises(Stop):
        compress(planned(name, steps=30, text=TEXT), tmp_path / "d", progress=stop)
    made = compress(planned(name, steps=30, text=TEXT), tmp_path / "d")
    assert made.trained is not None
    assert made.trained.loss_after < 0.9 * made.trained.loss_before
    assert made.calibration is not None
    assert made.calibration.samples == 24
    assert made.totals.payload == plain.totals.payload
    assert made.totals.error != plain.totals.error  # measured again
    stored, before = (load_file(tmp_path / own / "delta.safetensors") for own in ("d", "plain"))
    changed = {key for key, own in stored.items() if not own.equal(before[key])}
    assert changed
    assert all("_scale" in key for key in changed)
    opened = open_delta(tmp_path / "d")
    for key in stored:
        opened.read(key)  # compares hashes
    assert json.loads((tmp_path / "d/unicomp.json").read_text())["trained"]["steps"] == 30


def test_what_cannot_be_trained_is_refused_before_any_work(
    tiny_model: Callable[..., Path],
) -> None:
    base = tiny_model("mixtral")
    method: Any = methods.find("delta", "bitdelta").model_validate({"base": str(base)})
    with pytest.raises(UnsupportedError, match="of experts"):
        plan_delta(str(base), "bitdelta", method, TEXT)
    with pytest.raises(UnsupportedError, match="no scales to train"):
        planned("svd", text=TEXT)

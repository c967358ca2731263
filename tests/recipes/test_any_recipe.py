"""`unicomp.plan` and `unicomp.run` take a delta's recipe, and every other as before."""

from pathlib import Path

import pytest

import unicomp
from unicomp.errors import UnsupportedError
from unicomp.kernels.delta_folder import DeltaManifest, open_delta
from unicomp.manifest import Manifest
from unicomp.recipes.delta.plan import DeltaPlan
from unicomp.recipes.load import load

PIRATE = "builtin:tinyworld-pirate"
DELTA = "version: 1\nstages:\n  - {delta: dqrelo, base: 'builtin:tinyworld', ratio: 0.125}\n"
ROUND = "  - {quantize: rtn, bits: 4, group_size: 32}\n"


def test_a_delta_from_python(tmp_path: Path) -> None:
    planned = unicomp.plan(load(DELTA, file="x"), model=PIRATE)
    assert isinstance(planned, DeltaPlan)
    made = unicomp.run(planned, tmp_path / "d")
    assert isinstance(made, DeltaManifest)
    assert made.totals.payload <= 0.125 * 1.01 * made.totals.matrix_bytes_16
    assert open_delta(tmp_path / "d").manifest.method == "dqrelo"


def test_a_model_from_python(tmp_path: Path) -> None:
    recipe = load("version: 1\nscore: []\nstages:\n" + ROUND, file="x")
    planned = unicomp.plan(recipe, model=PIRATE)
    assert not isinstance(planned, DeltaPlan)
    assert isinstance(unicomp.run(planned, tmp_path / "m"), Manifest)


def test_a_delta_stands_alone() -> None:
    for stages in (DELTA + ROUND, DELTA.replace("stages:\n", "stages:\n" + ROUND)):
        with pytest.raises(UnsupportedError, match="cannot stand beside `delta`"):
            unicomp.plan(load(stages, file="x"), model=PIRATE)

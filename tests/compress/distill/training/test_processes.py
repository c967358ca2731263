"""Two processes take the steps that one does."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_trainer import job
from unicomp.compress.distill.training.trainer import train

train(job(*map(Path, sys.argv[2:5]), max_steps=12, micro_batch=1, calibration_term=0.2))
"""


@pytest.mark.slow
def test_two_processes_make_the_loss_curve_of_one(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    models = [str(tiny_model("llama")), str(tiny_model("llama", seed=5))]
    curves = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        words = [str(script), str(Path(__file__).parent), *models, str(folder)]
        done = subprocess.run([sys.executable, *launch, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        lines = map(json.loads, (folder / "training.jsonl").read_text().splitlines())
        curves.append([line["loss"] for line in lines if "loss" in line])
    assert len(curves[0]) == len(curves[1]) == 12
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=1e-4, atol=0)
    assert abs(curves[0][0] - curves[0][-1]) > 1e-2  # the curve is no flat line

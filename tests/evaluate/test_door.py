"""`lm_eval --model unicomp`: lm-eval's own command finds the model, and nothing else notices."""

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from unicomp.errors import UnicompError, UnsupportedError
from unicomp.evaluate import door
from unicomp.evaluate.tasks import harness

LM_EVAL = Path(sys.executable).with_name("lm_eval")


def python(code: str) -> str:
    """Run Python elsewhere than in the repository, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_opens_the_door() -> None:
    found = [one.value for one in entry_points(group="torch.backends") if one.name == "unicomp"]
    assert found == ["unicomp.evaluate.door:announce"], "install the package again"


@pytest.mark.slow
def test_without_lm_eval_the_door_does_nothing() -> None:
    said = "import sys, torch; print(any(own.startswith('lm_eval') for own in sys.modules))"
    assert python(said) == "False\n"


@pytest.mark.slow
def test_a_name_is_all_that_is_put_into_the_table() -> None:
    code = (
        "import lm_eval, torch, sys\n"
        "from lm_eval.api.registry import model_registry as table\n"
        "print('unicomp' in table, 'hf' in table, 'unicomp.evaluate.tasks.model' in sys.modules)\n"
    )
    assert python(code) == "True True False\n"


def test_announcing_twice_changes_nothing() -> None:
    from lm_eval.api.registry import get_model

    door.announce()
    door.announce()
    assert get_model("unicomp").__name__ == "Unicomp"


@pytest.mark.slow
def test_lm_evals_own_command(tmp_path: Path) -> None:
    task = harness.FOLDER / "tinyworld/grammar.yaml"
    words = f"--model unicomp --tasks {task} --batch_size 16 --limit 40 --output_path {tmp_path}"
    done = subprocess.run(
        [
            *[str(LM_EVAL), "--model_args", "pretrained=builtin:tinyworld,compute=exact"],
            *words.split(),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    found = json.loads(file.read_text())
    assert found["results"]["tinyworld_grammar"]["acc,none"] == 1
    assert found["config"]["unicomp"]["compute"] == "exact"


def test_arguments_that_there_are_not() -> None:
    from unicomp.evaluate.tasks.model import Unicomp

    with pytest.raises(UnicompError, match="no argument `peft`"):
        Unicomp("builtin:tinyworld", peft="x")
    with pytest.raises(UnsupportedError, match="no dtype `int4`"):
        Unicomp("builtin:tinyworld", dtype="int4")
    with pytest.raises(UnsupportedError, match="`fast`"):
        Unicomp("builtin:tinyworld", compute="fast")
    with pytest.raises(UnicompError):
        Unicomp("builtin:no")

"""`unicomp quantize`: options are recipe keys, the output is whole, errors are two lines."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unicomp import manifest
from unicomp.cli.main import exit_code
from unicomp.recipes.load import read

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> str:
    return str(tiny_model("llama"))


@pytest.fixture
def rounding(model: str) -> list[str]:
    words = "--method rtn --group-size 32 --scale-search minmax"
    return ["quantize", model, *words.split()]


@pytest.fixture
def calibrated(model: str, tiny_text: Path) -> list[str]:
    text = ["--calibration", str(tiny_text), "--samples", "4", "--seq-len", "32"]
    return ["quantize", model, "--group-size", "-1", *text]


def test_output_and_summary(rounding: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "made"
    assert exit_code([*rounding, "--out", str(out)]) == 0
    said, talk = capsys.readouterr()
    facts = dict(line.split("  ", 1) for line in said.splitlines() if "  " in line)
    assert facts["output"].strip() == str(out)
    assert facts["linears quantized"].strip() == "21 of 21"
    assert "round-to-nearest" in facts["output error"]
    assert "layers 0/3  model.layers.0.self_attn.q_proj  error 0." in talk
    assert exit_code(["verify", str(out)]) == 0
    assert "every file is as `unicomp.json` says" in capsys.readouterr().out
    assert not (tmp_path / "made.partial").exists()


def test_json_is_the_manifest(calibrated: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "made"
    assert exit_code([*calibrated, "--out", str(out), "--json", "--quiet"]) == 0
    said, talk = capsys.readouterr()
    assert talk == ""
    assert json.loads(said) == manifest.read(out).to_json()


def test_every_option_reaches_the_recipe(
    calibrated: list[str], tmp_path: Path, capsys: Capture
) -> None:
    modules = tmp_path / "modules.yaml"
    modules.write_text('"re:.*down_proj": {bits: 8}\nq_proj: {group_size: 32}\n')
    out = tmp_path / "made"
    more = "--bits 3 --order min-pivot --damp 0.05 --block-size 64 --scale-search minmax --seed 7"
    lists = "--ignore o_proj --ignore v_proj --target transformers --format compressed-tensors"
    words = [*more.split(), *lists.split(), "--modules", str(modules), "--out", str(out)]
    assert exit_code([*calibrated, *words]) == 0, capsys.readouterr().err
    recipe = read(out / "recipe.yaml")[0].to_dict()
    stage = recipe["stages"][0]
    wanted: dict[str, Any] = {
        "quantize": "gptq",
        "bits": 3,
        "group_size": -1,
        "symmetric": True,
        "order": "min-pivot",
        "damp": 0.05,
        "block_size": 64,
        "scale_search": "minmax",
        "ignore": ["o_proj", "v_proj"],
        "modules": {"re:.*down_proj": {"bits": 8}, "q_proj": {"group_size": 32}},
    }
    assert {key: stage[key] for key in wanted} == wanted
    assert (recipe["calibration"]["seed"], recipe["calibration"]["samples"]) == (7, 4)
    assert (recipe["format"], recipe["target"]) == ("compressed-tensors", ["transformers"])
    made = manifest.read(out).stages[0].modules
    schemes = {name.rpartition(".")[2]: (m.bits, m.group_size) for name, m in made.items()}
    assert schemes["down_proj"][0] == 8
    assert schemes["q_proj"] == (3, 32)
    assert schemes["o_proj"] == (None, None)
    assert schemes["up_proj"] == (3, -1)


def test_defaults_stand_in_one_place(rounding: list[str], capsys: Capture) -> None:
    from unicomp.compress.quantize.rtn import Rtn

    assert exit_code([*rounding, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["schema"] == "unicomp.plan/1"
    bits = {tensor["bits"] for tensor in plan["tensors"]} - {None}
    assert bits == {Rtn.model_fields["bits"].default}


def test_dry_run_writes_nothing(rounding: list[str], tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "made"
    assert exit_code([*rounding, "--dry-run", "--out", str(out)]) == 0
    assert "peak host memory" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--method gtpq", "did you mean `gptq`?"),
        ("--bits 11", "less than or equal to 8"),
        ("--bits 1 --damp 0.1", "greater than or equal to 2"),
        ("--calibration x.doc --method gptq", "`--calibration`"),
        ("--method gptq", "needs calibration text"),
        ("--ignore absent_proj", "no module matches `absent_proj` under `ignore`"),
        ("--modules absent.yaml", "absent.yaml"),
        ("--format zip", "unknown format"),
        ("--target word", "unknown loader"),
        ("--max-memory 1MB", "--max-memory"),
        ("--device cuda", "cannot compute on device `cuda`"),
    ],
)
def test_errors_are_two_lines(
    words: str, says: str, rounding: list[str], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "made"
    assert exit_code([*rounding, *words.split(), "--out", str(out), "--json"]) == 1
    said, talk = capsys.readouterr()
    assert said == ""
    assert says in talk
    lines = [line for line in talk.splitlines() if not line.startswith("note: ")]
    assert all(line.startswith(("error: ", "hint: ")) for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused(
    rounding: list[str], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "made"
    assert exit_code([*rounding, "--out", str(out), "--quiet"]) == 0
    before = (out / "unicomp.json").read_bytes()
    assert exit_code([*rounding, "--bits", "3", "--out", str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "unicomp.json").read_bytes() == before
    assert exit_code([*rounding, "--bits", "3", "--out", str(out), "--overwrite", "--quiet"]) == 0
    assert (out / "unicomp.json").read_bytes() != before


def test_interrupted_from_inside(
    rounding: list[str], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unicomp.recipes.layers.run.run", stop)
    assert exit_code([*rounding, "--out", str(tmp_path / "made"), "--json"]) == 130
    said, talk = capsys.readouterr()
    assert said == ""
    assert talk.startswith("error: interrupted\nhint: the same command resumes from ")


@pytest.mark.slow
def test_interrupted_by_a_signal_and_resumed(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_model("llama", num_hidden_layers=60)
    out = tmp_path / "made"
    command = [sys.executable, "-m", "unicomp", "quantize", str(model), "--method", "rtn"]
    command += ["--group-size", "32", "--scale-search", "minmax", "--out", str(out)]
    one = os.environ | {"OMP_NUM_THREADS": "1"}  # the second process must not differ
    with subprocess.Popen(
        command,
        env=one,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores the signal, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        # A page of talk, and the run waits for who reads: it cannot be done before the signal.
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 4096)
        talk = ""
        for line in process.stderr:
            talk += line
            if "layers 2/60" in line:
                process.send_signal(signal.SIGINT)
                break
        talk += process.stderr.read()
        said = process.stdout.read()
    assert process.returncode == 130
    assert said == ""
    assert talk.endswith(
        "error: interrupted\n"
        f"hint: the same command resumes from `{out}.partial`; `--fresh` starts over\n"
    )
    assert not out.exists()
    again = subprocess.run(command, env=one, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0, again.stderr
    assert "layers 0/60" not in again.stderr
    assert manifest.verify(out) == []

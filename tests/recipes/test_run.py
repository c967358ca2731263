"""A run makes a whole checkpoint, resumes byte for byte, and leaves nothing half done."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from unicomp import manifest
from unicomp.errors import UnicompError
from unicomp.recipes.load import from_options
from unicomp.recipes.plan import Plan, plan
from unicomp.recipes.run import Progress, run

TIMINGS = ("seconds", "peak_rss_bytes", "peak_gpu_bytes")


def make(model: Path, text: Path, method: str = "gptq", **options: Any) -> Plan:
    """Return a plan for a tiny model: per channel, 6 windows of 32 tokens."""
    options = {"bits": 4, "group_size": -1} | options
    calibration = None if method == "rtn" else {"data": str(text), "samples": 6, "seq_len": 32}
    recipe = from_options("quantize", method, options, calibration=calibration)
    return plan(recipe, model=str(model))


def digests(folder: Path) -> dict[str, str]:
    """Return the hash of every file but the manifest."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != "unicomp.json"
    }


def timeless(folder: Path) -> dict[str, Any]:
    """Return the manifest without its times, peaks, versions and machine."""
    found: dict[str, Any] = json.loads((folder / "unicomp.json").read_text())
    for stage in found["stages"]:
        for key in TIMINGS:
            del stage[key]
    del found["versions"], found["machine"]
    return found


def test_two_runs_are_equal_and_another_seed_is_not(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """One seed, one output."""
    model = tiny_model("llama")
    run(make(model, tiny_text), tmp_path / "a")
    run(make(model, tiny_text), tmp_path / "b")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    other = from_options(
        "quantize",
        "gptq",
        {"bits": 4, "group_size": -1},
        calibration={"data": str(tiny_text), "samples": 6, "seq_len": 32, "seed": 1},
    )
    run(plan(other, model=str(model)), tmp_path / "c")
    a, c = digests(tmp_path / "a"), digests(tmp_path / "c")
    assert a["model.safetensors"] != c["model.safetensors"]


def test_interrupted_everywhere_resumes_to_the_same_bytes(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Stop at every progress step in turn; each time the next attempt goes on."""
    model = tiny_model("llama")
    run(make(model, tiny_text), tmp_path / "whole")
    steps = 0

    def stop_after(count: int) -> Callable[[Progress], None]:
        left = iter(range(count))

        def show(_: Progress) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        return show

    out = tmp_path / "broken"
    count = 1
    while not out.exists():
        try:
            run(make(model, tiny_text), out, progress=stop_after(count))
        except KeyboardInterrupt:
            steps += 1
            assert not out.exists()
        count += 2
    assert steps > 5
    assert digests(out) == digests(tmp_path / "whole")
    assert timeless(out) == timeless(tmp_path / "whole")
    assert not (tmp_path / "broken.partial").exists()


def test_a_layer_done_is_not_done_again(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """After an interruption in the last layer only that layer is solved."""
    model = tiny_model("llama")

    def stop(step: Progress) -> None:
        if step.stage == "layers" and step.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make(model, tiny_text), tmp_path / "out", progress=stop)
    seen: list[Progress] = []
    run(make(model, tiny_text), tmp_path / "out", progress=seen.append)
    assert {step.done for step in seen if step.stage == "layers"} == {2}


def test_lost_hidden_states_start_over(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """A damaged file of hidden states is noticed by its checksum, said, and not used."""
    model = tiny_model("llama")
    run(make(model, tiny_text), tmp_path / "whole")

    def stop(step: Progress) -> None:
        if step.stage == "layers" and step.done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make(model, tiny_text), tmp_path / "out", progress=stop)
    (states,) = (tmp_path / "out.partial").rglob("states-00001.bin")
    data = bytearray(states.read_bytes())
    data[100] ^= 1
    states.write_bytes(data)
    seen: list[Progress] = []
    run(make(model, tiny_text), tmp_path / "out", progress=seen.append)
    assert any(step.note and "starting over" in step.note for step in seen)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_another_run_in_the_way_is_refused_and_fresh_starts_over(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """A journal is only gone on with by the run that began it."""
    model = tiny_model("llama")

    def stop(step: Progress) -> None:
        if step.stage == "layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(make(model, tiny_text), tmp_path / "out", progress=stop)
    with pytest.raises(UnicompError, match="another plan, recipe") as caught:
        run(make(model, tiny_text, bits=3), tmp_path / "out")
    assert caught.value.hint is not None
    assert "--fresh" in caught.value.hint
    assert (tmp_path / "out.partial").exists()
    run(make(model, tiny_text, bits=3), tmp_path / "out", resume=False)
    assert manifest.read(tmp_path / "out").stages[0].options["bits"] == 3


@pytest.mark.slow
def test_kill_nine_at_ten_moments(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """`kill -9` ten times, each after a random number of steps and a moment, then let it finish."""
    model = tiny_model("llama", num_hidden_layers=6)
    command = [
        *(sys.executable, "-m", "unicomp", "quantize", str(model), "--calibration", str(tiny_text)),
        *("--samples", "16", "--seq-len", "64", "--group-size", "-1", "--out"),
    ]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    out = tmp_path / "out"
    draw = random.Random(0)
    killed = 0
    for _ in range(30):
        process = subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, text=True)
        steps = draw.randrange(1, 20)
        with process:
            assert process.stderr is not None
            for number, _line in enumerate(process.stderr, start=1):
                if number == steps:
                    time.sleep(draw.random() / 20)
                    process.send_signal(signal.SIGKILL)
        if process.returncode == -signal.SIGKILL and not out.exists():
            killed += 1
        elif out.exists():
            shutil.rmtree(out)  # it was done before the moment came: begin again
        if killed == 10:
            break
    assert killed == 10
    subprocess.run([*command, str(out)], check=True)
    assert digests(out) == digests(tmp_path / "whole")
    assert timeless(out) == timeless(tmp_path / "whole")


def test_rtn_needs_no_text_and_agrees_with_its_manifest(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Nothing is calibrated; the folder verifies; a changed byte is found."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    made = run(make(model, tiny_text, "rtn"), tmp_path / "out")
    assert made.calibration is None
    assert manifest.verify(tmp_path / "out") == []
    assert all(module.tokens == 0 for module in made.stages[0].modules.values())
    weights = tmp_path / "out" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert manifest.verify(tmp_path / "out") != []


def test_the_output_is_smaller_and_close(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """Eight bits change little, two bits change much; stock transformers reads both."""
    model = tiny_model("llama")
    ids = torch.randint(4, 60, (2, 32), generator=torch.Generator().manual_seed(1))

    def logits(folder: Path) -> torch.Tensor:
        loaded, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        with torch.no_grad():
            found: torch.Tensor = loaded(input_ids=ids).logits
        return found

    base = logits(model)
    errors = {}
    for bits in (8, 2):
        made = run(make(model, tiny_text, bits=bits), tmp_path / str(bits))
        errors[bits] = float((logits(tmp_path / str(bits)) - base).norm() / base.norm())
        assert made.totals.bytes_out < made.totals.bytes_in
    assert errors[8] < 0.05 < errors[2]

"""A run makes a whole checkpoint, resumes byte for byte, and leaves nothing half done."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from unicomp import manifest
from unicomp.errors import UnicompError
from unicomp.recipes.layers.plan import Plan, plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options
from unicomp.recipes.stage.progress import Progress, Show

Digests = Callable[[Path], dict[str, str]]
Timeless = Callable[[Path], dict[str, Any]]
Stopped = Callable[[Callable[[Path, Show], object], Path], int]


def make(model: Path, text: Path, method: str = "gptq", **options: Any) -> Plan:
    """Return a plan for a tiny model: per channel, 6 windows of 32 tokens."""
    options = {"bits": 4, "group_size": -1} | options
    calibration = None if method == "rtn" else {"data": str(text), "samples": 6, "seq_len": 32}
    recipe = from_options("quantize", method, options, calibration=calibration)
    return plan(recipe, model=str(model))


def test_two_runs_are_equal_and_another_seed_is_not(
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    digests: Digests,
    timeless: Timeless,
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
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    digests: Digests,
    timeless: Timeless,
    stopped: Stopped,
) -> None:
    """Stop at every progress step in turn; each time the next attempt goes on."""
    model = tiny_model("llama")
    run(make(model, tiny_text), tmp_path / "whole")
    out = tmp_path / "broken"

    def once(out: Path, show: Show) -> None:
        run(make(model, tiny_text), out, progress=show)

    assert stopped(once, out) > 3
    assert digests(out) == digests(tmp_path / "whole")
    assert timeless(out) == timeless(tmp_path / "whole")


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
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    digests: Digests,
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
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    digests: Digests,
    timeless: Timeless,
    killed: Callable[[list[str], Path, int], None],
) -> None:
    """`kill -9` ten times, each after a random number of steps and a moment, then let it finish."""
    model = tiny_model("llama", num_hidden_layers=6)
    command = [
        *(sys.executable, "-m", "unicomp", "quantize", str(model), "--calibration", str(tiny_text)),
        *("--samples", "16", "--seq-len", "64", "--group-size", "-1", "--out"),
    ]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    killed(command, tmp_path / "out", 10)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


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

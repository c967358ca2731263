"""Stages one after another: planned on what is to come, resumed in the pass where they stopped."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from unicomp import manifest
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.recipes.load import from_options, load
from unicomp.recipes.pipeline import run as pipeline_run
from unicomp.recipes.pipeline.plan import Pipeline, plan
from unicomp.recipes.pipeline.run import run
from unicomp.recipes.stage.progress import Progress, Show

Digests = Callable[[Path], dict[str, str]]
Timeless = Callable[[Path], dict[str, Any]]
Stopped = Callable[[Callable[[Path, Show], object], Path], int]
STAGES = (
    "{prune: depth, layers: 2, criterion: influence}",
    "{prune: width, ffn: 32}",
    "{quantize: gptq, bits: 4, group_size: -1}",
)


def recipe_text(data: object, *stages: str) -> str:
    lines = "".join(f"  - {stage}\n" for stage in stages)
    head = f'calibration: {{data: "{data}", samples: 6, seq_len: 32}}'
    return f"version: 1\n{head}\nstages:\n{lines}"


def planned(model: Path, data: object, *stages: str, **options: Any) -> Pipeline:
    found = plan(load(recipe_text(data, *stages), file="x"), model=str(model), **options)
    assert isinstance(found, Pipeline)
    return found


@pytest.fixture(autouse=True)
def no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the measurement of speed out, which is slow and differs from run to run."""
    monkeypatch.setattr(pipeline_run, "beside", lambda *_, **__: None)


def test_cut_twice_then_quantized(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """The plan says what is made to the byte; the manifest has every stage and the source."""
    model = tiny_model("llama")
    found = planned(model, tiny_text, *STAGES)
    made = run(found, tmp_path / "out")
    assert [stage.method for stage in made.stages] == ["depth", "width", "gptq"]
    assert made.totals.params == found.params
    assert made.totals.bytes_out == found.bytes_out
    assert made.totals.bytes_in == found.bytes_in
    assert made.totals.params_in == found.passes[0].params_in  # type: ignore[union-attr]
    assert made.source.id == model.name
    assert manifest.verify(tmp_path / "out") == []
    assert not (tmp_path / "out.partial").exists()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert (loaded.config.num_hidden_layers, loaded.config.intermediate_size) == (2, 32)


def test_interrupted_everywhere_resumes_to_the_same_bytes(
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    digests: Digests,
    timeless: Timeless,
    stopped: Stopped,
) -> None:
    """Stop at every third step; each attempt goes on in the pass and layer where the last was."""
    model = tiny_model("llama")
    run(planned(model, tiny_text, *STAGES), tmp_path / "whole")
    run(planned(model, tiny_text, *STAGES), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")
    assert timeless(tmp_path / "again") == timeless(tmp_path / "whole")

    def once(out: Path, show: Show) -> None:
        run(planned(model, tiny_text, *STAGES), out, progress=show)

    out = tmp_path / "broken"
    assert stopped(once, out) > 4
    assert digests(out) == digests(tmp_path / "whole")
    assert timeless(out) == timeless(tmp_path / "whole")


def without_card(found: dict[str, str]) -> dict[str, str]:
    """Leave out the card, which has the speed that was measured."""
    return {name: digest for name, digest in found.items() if name != "README.md"}


@pytest.mark.slow
@pytest.mark.parametrize("stages", [STAGES[1:2], STAGES])
def test_kill_nine_at_three_moments(
    stages: tuple[str, ...],
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    digests: Digests,
    timeless: Timeless,
    killed: Callable[[list[str], Path, int], None],
) -> None:
    """A cut alone, and passes one after another, as a process that is killed and begun again."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(tiny_text, *stages))
    command = [
        *(sys.executable, "-m", "unicomp", "run", str(recipe), str(tiny_model("llama")), "--out"),
    ]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    killed(command, tmp_path / "out", 3)
    whole, found = (without_card(digests(tmp_path / name)) for name in ("whole", "out"))
    assert found == whole
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


def test_a_done_pass_is_not_done_again(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama")

    def stop(step: Progress) -> None:
        if step.stage == "layers" and step.error is not None and "mlp" in step.detail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(planned(model, tiny_text, *STAGES), tmp_path / "out", progress=stop)
    seen: list[Progress] = []
    run(planned(model, tiny_text, *STAGES), tmp_path / "out", progress=seen.append)
    assert "importance" not in {step.stage for step in seen}


def test_another_recipe_does_not_resume(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    model = tiny_model("llama")

    def stop(step: Progress) -> None:
        if step.stage == "layers":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(planned(model, tiny_text, *STAGES), tmp_path / "out", progress=stop)
    with pytest.raises(UnicompError, match="unfinished run"):
        run(planned(model, tiny_text, *STAGES[:2]), tmp_path / "out")
    run(planned(model, tiny_text, *STAGES[:2]), tmp_path / "out", resume=False)


def test_passes_that_cannot_be_had_are_refused_before_any_work(
    tiny_model: Callable[..., Path], tiny_text: Path
) -> None:
    """Also those that only an earlier stage makes impossible."""
    model = tiny_model("llama")
    with pytest.raises(UnsupportedError, match="would undo it"):
        planned(model, tiny_text, STAGES[2], STAGES[1])
    with pytest.raises(UnsupportedError, match="layers"):
        planned(model, tiny_text, STAGES[0], "{prune: depth, layers: 2}")
    with pytest.raises(UnsupportedError, match="more than the model has: 32"):
        planned(model, tiny_text, STAGES[1], "{prune: width, ffn: 40}")


def test_memory_is_declined_before_any_work(
    tiny_model: Callable[..., Path], tiny_text: Path
) -> None:
    with pytest.raises(UnicompError, match="--max-memory 1000000 bytes is too small"):
        planned(tiny_model("llama"), tiny_text, STAGES[1], max_memory=1_000_000)
    least = planned(tiny_model("llama"), tiny_text, STAGES[1]).most_host_bytes
    planned(tiny_model("llama"), tiny_text, STAGES[1], max_memory=least)


def test_one_pass_is_left_to_the_plan_of_one(
    tiny_model: Callable[..., Path], tiny_text: Path
) -> None:
    found = plan(from_options("quantize", "rtn", {"bits": 4}), model=str(tiny_model("llama")))
    assert not isinstance(found, Pipeline)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("width", {"sparsity": 1.5}, "between 0 and 1"),
        ("width", {"sparsity": 0}, "between 0 and 1"),
        ("width", {"sparsity": "2:4"}, "share of the parameters"),
        ("width", {"sparsity": 0.2, "target_params": 9}, "two ways"),
        ("width", {"sparsity": 0.2, "ffn": 9}, "two ways"),
        ("width", {"target_params": 5}, "cannot be had by cutting width"),
        ("width", {"target_bytes": "1KB"}, "cannot be had"),
        ("width", {"target_speedup": 1000.0}, "cannot be had"),
        ("width", {"ffn": 400}, "more than the model has"),
        ("width", {"hidden": 63}, "4 heads do not divide its 63"),
        ("depth", {"layers": 0}, "every layer would be removed"),
        ("depth", {"layers": 3}, "can stay"),
        ("depth", {"sparsity": 0.99}, "cannot be had by cutting layers"),
        ("heads", {"heads": 0}, "every head would be removed"),
        ("heads", {"kv_heads": 0}, "every head would be removed"),
        ("heads", {"heads": 3}, "2 KV heads do not divide 3 heads"),
        ("heads", {"heads": 4, "kv_heads": 1}, "cannot be had from 4 with 2"),
        ("experts", {"experts": 1}, "has no experts"),
    ],
)
def test_bad_input_is_one_clear_error_before_any_work(
    method: str,
    options: dict[str, Any],
    message: str,
    tiny_model: Callable[..., Path],
    tiny_text: Path,
) -> None:
    calibration = {"data": str(tiny_text), "samples": 6, "seq_len": 32}
    with pytest.raises(UnicompError, match=message):
        plan(
            from_options("prune", method, options, calibration=calibration),
            model=str(tiny_model("llama")),
        )


@pytest.mark.parametrize(
    ("options", "met"),
    [
        ({"target_params": 90_000}, lambda p: p.params <= 90_000),
        ({"target_bytes": "400KB"}, lambda p: p.bytes_out <= 400_000),
        (
            {"target_speedup": 1.3},
            lambda p: p.axes.read_bytes(p.axes.sizes) >= 1.3 * p.axes.read_bytes(p.sizes),
        ),
    ],
)
def test_targets_are_met_and_candidates_shown(
    options: dict[str, Any],
    met: Callable[[Any], bool],
    tiny_model: Callable[..., Path],
    tiny_text: Path,
) -> None:
    calibration = {"data": str(tiny_text), "samples": 6, "seq_len": 32}
    recipe = from_options("prune", "width", options, calibration=calibration)
    found = plan(recipe, model=str(tiny_model("llama", intermediate_size=176)))
    assert isinstance(found, Pipeline)
    assert met(found.passes[0])
    said = found.to_json()
    assert len(said["candidates"]) > 2
    assert said["candidates"][0]["params"] == said["params"] < said["params_in"]

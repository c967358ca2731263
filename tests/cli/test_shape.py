"""How plans and results of structured pruning are shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unicomp.cli import shape
from unicomp.cli.main import exit_code
from unicomp.manifest import Manifest, Module, Shape, Stage, Totals

Capture = pytest.CaptureFixture[str]


def test_sizes_that_changed() -> None:
    before = {"layers": 5, "hidden": 1280, "ffn": 352}
    assert shape.changes(before, before | {"layers": 4, "hidden": 960}) == (
        "layers 5 -> 4, hidden 1,280 -> 960"
    )
    assert shape.changes(before, before) == "as it was"


def lines(capsys: Capture) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_plan_shows_what_is_made_and_what_was_weighed(capsys: Capture) -> None:
    words = ["prune", "builtin:tinyworld", "--method", "width", "--target-params", "800000"]
    words += ["--calibration", "builtin:tinyworld", "--dry-run"]
    assert exit_code(words) == 0
    said = lines(capsys)
    assert said[0] == "builtin:tinyworld: prune width"
    assert exit_code([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["candidates"]) > 2
    made = plan["candidates"][0]
    row = next(line for line in said if line.startswith("made "))
    assert f" {made['shape']['ffn']} " in row
    assert row.split()[-1] == f"{made['read_speedup']:.2f}"
    shown = [line for line in said if line.startswith("candidate ")]
    assert len(shown) == len(plan["candidates"]) - 1
    assert f"parameters 1,054,080 -> {plan['params']:,}" in said
    assert any(line.startswith("note: a decoded token reads") for line in said)


def test_passes_are_named_in_their_order(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "version: 1\ncalibration: {data: builtin:tinyworld, samples: 4, seq_len: 32}\nstages:\n"
        "  - {prune: depth, layers: 2}\n  - {prune: wanda}\n"
        "  - {quantize: gptq, bits: 4, group_size: -1}\n"
    )
    model = tiny_model("llama")
    assert exit_code(["plan", str(recipe), str(model)]) == 0
    assert lines(capsys)[0] == f"{model.name}: prune depth, then prune wanda with quantize gptq"


def test_zeros_of_all_weights_together(capsys: Capture) -> None:
    """`--scope global` is of no single row, and the plan says so."""
    words = ["prune", "builtin:tinyworld", "--method", "magnitude", "--dry-run"]
    assert exit_code([*words, "--scope", "global", "--sparsity", "0.3"]) == 0
    said = "\n".join(lines(capsys))
    assert "0.3 of all weights together zero" in said
    assert "of each row" not in said
    assert exit_code([*words, "--sparsity", "0.3"]) == 0
    assert "0.3 of each row zero" in "\n".join(lines(capsys))


def stage(after: dict[str, int], kept: list[int], errors: list[float | None]) -> Stage:
    modules = {
        str(number): Module(
            bits=None,
            group_size=None,
            bytes=8,
            error_before=None if error is None else 2 * error,
            error_after=error,
            damp=None,
            clip_fraction=None,
            tokens=4,
            fallback=None,
        )
        for number, error in enumerate(errors)
    }
    before = {"layers": 5, "ffn": 352}
    return Stage(
        verb="prune",
        method="depth",
        options={},
        seconds=1,
        peak_rss_bytes=1,
        peak_gpu_bytes=None,
        modules=modules,
        shape=Shape(before=before, after=after, kept={"layers": kept}),
    )


def made(*stages: Stage) -> Manifest:
    totals = Totals(params=70, params_in=100, bytes_in=200, bytes_out=140, bits_per_weight=16)
    some: dict[str, Any] = {"stages": list(stages), "totals": totals}
    return Manifest.model_construct(**some)


def test_what_a_result_changed() -> None:
    one = stage({"layers": 4, "ffn": 352}, [0, 1, 2, 4], [0.1, 0.3, None])
    assert dict(shape.facts(made(one))) == {
        "parameters": "100 -> 70",
        "shape": "layers 5 -> 4",
        "layers kept": "0, 1, 2, 4",
        "linears refitted": "2 of 3",
        "error of the cut": "0.2000 relative, mean of 2 linears (not refitted: 0.4000)",
    }
    other = stage({"layers": 5, "ffn": 208}, [0, 1, 2, 3, 4], [None])
    found = dict(shape.facts(made(other)))
    assert found == {
        "parameters": "100 -> 70",
        "shape": "ffn 352 -> 208",
        "linears refitted": "0 of 1",
    }
    assert dict(shape.facts(made(one.model_copy(update={"shape": None})))) == {}

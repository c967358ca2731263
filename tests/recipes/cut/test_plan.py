"""The plan of a cut: what becomes of each tensor, the memory and disk, one hash for one plan."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unicomp.checkpoint import Checkpoint
from unicomp.compress.cut_method import MOST_SHOWN
from unicomp.errors import UnicompError
from unicomp.hub import Source
from unicomp.kernels.dense import open_dense
from unicomp.models import describe
from unicomp.recipes.cut.plan import CutPlan, plan_cut
from unicomp.recipes.load import from_options

TEXT = {"data": "a.txt", "samples": 8, "seq_len": 64}


def planned(
    model: Path, method: str, limit: int | None = None, text: object = TEXT, **options: Any
) -> CutPlan:
    checkpoint = Checkpoint.open(model)
    recipe = from_options("prune", method, options, calibration=text)
    source = Source(model, model.name, None)
    return plan_cut(recipe, None, source, checkpoint, open_dense(checkpoint), limit)


def test_every_tensors_fate(tiny_model: Callable[..., Path]) -> None:
    """Sums are the totals; a layer that goes is left out, and nothing else has no bytes."""
    plan = planned(tiny_model("llama"), "depth", layers=2)
    assert sum(fate.bytes_in for fate in plan.fates) == plan.bytes_in
    assert sum(fate.bytes_out for fate in plan.fates) == plan.bytes_out
    gone = {fate.name for fate in plan.fates if fate.why == "left out"}
    assert gone
    assert gone == {fate.name for fate in plan.fates if fate.bytes_out == 0}
    assert len({name.split(".")[2] for name in gone}) == 1
    whys = {fate.why for fate in plan.fates if fate.role == "linear"}
    assert whys == {None, "left out"}


def test_what_is_not_refitted_says_why(tiny_model: Callable[..., Path]) -> None:
    experts = planned(tiny_model("mixtral"), "experts", experts=2)
    assert "of an expert: cut, not refitted" in {fate.why for fate in experts.fates}
    plain = planned(tiny_model("llama"), "width", ffn=24, compensate=False)
    assert {fate.why for fate in plain.fates} == {"`compensate` is off"}
    tied = planned(tiny_model("qwen3"), "width", hidden=40)
    assert any("the head shares the embedding's weight" in note for note in tied.notes)


def test_the_result_is_what_a_later_stage_reads(tiny_model: Callable[..., Path]) -> None:
    plan = planned(tiny_model("llama"), "width", ffn=24, kv_heads=1)
    after = plan.result()
    found = describe(after.config, after.tensors)
    assert after.config["intermediate_size"] == 24
    shapes = {one.shape for one in found.linears() if one.module.endswith("down_proj")}
    assert shapes == {(64, 24)}


def test_one_plan_one_hash(tiny_model: Callable[..., Path]) -> None:
    model = tiny_model("llama")
    one = planned(model, "width", ffn=24)
    assert one.sha256 == planned(model, "width", ffn=24).sha256
    others = [planned(model, "width", ffn=20), planned(model, "width", ffn=24, damp=0.1)]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 3


def test_what_the_plan_says(tiny_model: Callable[..., Path]) -> None:
    plan = planned(tiny_model("llama", intermediate_size=352), "width", sparsity=0.2)
    said = plan.to_json()
    assert said["params"] <= 0.8 * said["params_in"]
    assert 1 < len(said["candidates"]) <= MOST_SHOWN
    assert said["candidates"][0]["shape"] == said["shape"]["after"] != said["shape"]["before"]
    assert said["disk_bytes"] > said["bytes_out"]
    assert said["peak_host_bytes"] == sum(said["memory"].values())
    assert said["bits_per_weight"] == pytest.approx(32)


def test_fewer_windows_at_once_where_memory_is_short(tiny_model: Callable[..., Path]) -> None:
    """Down to one window; below that the run is declined, with what it needs."""
    model = tiny_model("llama")
    plan = planned(model, "width", ffn=24)
    assert plan.batch == 8
    least = planned(model, "width", limit=plan.most_host_bytes - 1, ffn=24)
    assert least.batch == 4
    assert least.peak_host_bytes < plan.peak_host_bytes
    needed = plan.peak_host_bytes - plan.memory["activations"]
    with pytest.raises(UnicompError, match="the least that this run needs is") as caught:
        planned(model, "width", limit=needed, ffn=24)
    assert "MiB" in str(caught.value.hint)


def test_no_text_is_an_error(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UnicompError, match="needs calibration text"):
        planned(tiny_model("llama"), "depth", text=None)

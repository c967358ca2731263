"""What is planned and what lies in the folder are judged alike; what nothing is against loads."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from unicomp.errors import UnicompError
from unicomp.hub import resolve
from unicomp.recipes.lint.output import of_source
from unicomp.recipes.lint.rules import check, chosen
from unicomp.recipes.load import from_options, load
from unicomp.recipes.pipeline.plan import plan
from unicomp.recipes.pipeline.run import run

ALL = ["transformers,vllm,llama.cpp"]
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "groups": ("llama", {"group_size": 16}),
    "channels of a width that no word divides": ("qwen2", {"bits": 3, "group_size": -1}),
    "groups that do not divide": ("llama", {"group_size": 24}),
    "zero points": ("llama", {"symmetric": False, "group_size": 32}),
    "zero points of two kinds": (
        "llama",
        {"symmetric": False, "group_size": 32, "modules": {"down_proj": {"bits": 8}}},
    ),
    "mixed": ("llama", {"group_size": 16, "modules": {"k_proj": {"bits": 8}}}),
    "Conv1D": ("gpt2", {"group_size": 16}),
    "experts": ("mixtral", {"group_size": 8}),
    "plain experts": ("qwen3_moe", {"group_size": 8, "ignore": ["re:.*experts.*"]}),
}


NOTHING = ("Conv1D", "channels of a width that no word divides")
"""Ways of which vLLM takes no linear."""


def loads(folder: Path) -> bool:
    """Tell whether stock transformers takes the whole folder, and computes with it."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        logits = model(torch.arange(4, 20)[None]).logits
    return not any(info.values()) and bool(logits.isfinite().all())


def rules(found: Any, targets: list[str], tp: int = 1) -> list[tuple[str, str, int, str]]:
    return [(o.loader, o.rule, o.count, o.first) for o in check(found, chosen(targets), tp)]


@pytest.mark.parametrize("way", WAYS)
def test_output_without_finding_loads(
    way: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    arch, options = WAYS[way]
    model = str(tiny_model(arch))
    planned = plan(from_options("quantize", "rtn", {"bits": 4} | options, model=model))
    run(planned, tmp_path / "out")
    written = of_source(resolve(str(tmp_path / "out")))
    assert rules(planned.output(), ALL, 2) == rules(written, ALL, 2)
    for loader in ("vllm", "transformers"):
        said = planned.loaders()[loader]  # of layers and experts that are alike one was asked
        whys = [own.why for own in check(written, chosen([loader]))]
        assert said in whys if whys else said is None, (loader, said, whys)
    assert rules(written, ["transformers"]) == []
    assert loads(tmp_path / "out")


@pytest.mark.parametrize("loader", ["vllm", "transformers"])
@pytest.mark.parametrize("way", WAYS)
def test_a_format_settles_what_its_target_takes(
    way: str, loader: str, tiny_model: Callable[..., Path]
) -> None:
    """Formats choose by facts of their own, rules judge: nothing is left to find."""
    arch, options = WAYS[way]
    words = {"bits": 4} | options
    top = {"model": str(tiny_model(arch)), "target": [loader]}
    if loader == "vllm" and way in NOTHING:
        with pytest.raises(UnicompError, match="nothing would be quantized"):
            plan(from_options("quantize", "rtn", words, **top))
    else:
        planned = plan(from_options("quantize", "rtn", words, **top))
        assert planned.loaders()[loader] is None


def test_what_is_found_does_not_load(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """The same folder with a word of its config gone: found, and refused by transformers."""
    options = {"bits": 4, "symmetric": False, "group_size": 32}
    model = str(tiny_model("llama", intermediate_size=64))
    run(plan(from_options("quantize", "rtn", options, model=model)), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    assert config["quantization_config"].pop("dequantize") is True
    path.write_text(json.dumps(config), encoding="utf-8")
    found = rules(of_source(resolve(str(tmp_path / "out"))), ["transformers"])
    assert [rule for _, rule, _, _ in found] == ["zero-points"]
    with pytest.raises(RuntimeError, match="size"):
        loads(tmp_path / "out")


@pytest.mark.parametrize(
    "stages",
    [
        {"prune": "magnitude", "sparsity": 0.5},
        {"prune": "depth", "layers": 1},
    ],
    ids=lambda stages: str(stages["prune"]),
)
def test_plain_outputs_are_judged_too(
    stages: Mapping[str, Any], tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    text = (
        f'version: 1\ncalibration: {{data: "{tiny_text}", samples: 4, seq_len: 32}}\n'
        f"stages:\n  - {json.dumps(stages)}\n"
    )
    planned = plan(load(text, file="x"), model=str(tiny_model("llama")))
    run(planned, tmp_path / "out")
    written = rules(of_source(resolve(str(tmp_path / "out"))), ALL)
    assert rules(planned.output(), ALL) == written
    assert [rule for _, rule, _, _ in written] == ["folder"]
    assert loads(tmp_path / "out")

"""The page of a distilled model has the figures of its manifest, and no other page has them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from unicomp import manifest
from unicomp.cli.main import exit_code
from unicomp.evaluate.page.training import FIGURES, section


@pytest.fixture(scope="module")
def distilled(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny model that was cut and then trained."""
    folder = tmp_path_factory.mktemp("distilled")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f'version: 1\ncalibration: {{data: "{tiny_text}", samples: 6, seq_len: 32}}\nstages:\n'
        "  - {prune: width, ffn: 32}\n"
        "  - {distill: logits, batch: 2, seq_len: 32, max_steps: 3, rate: 1e-2}\n"
        "  - {quantize: rtn, bits: 3, group_size: -1}\n"
    )
    words = ["run", str(recipe), str(tiny_model("llama")), "--out", str(folder / "out"), "--quiet"]
    assert exit_code(words) == 0
    return folder / "out"


def test_each_stage_and_each_figure_is_there(distilled: Path) -> None:
    prune, distill, quantize = manifest.read(distilled).stages
    training = distill.training
    assert training is not None
    assert quantize.held_out is not None
    said = "\n".join(section([prune, distill, quantize]))
    for word, value in (
        ("1. prune width", training.before["kl"]),
        ("2. distill logits", training.after["kl"]),
        ("3. quantize rtn", quantize.held_out["kl"]),
    ):
        row = next(part for part in said.split("<tr>") if word in part)
        assert f">{value:.4g}</td>" in row
    for name, words in FIGURES.items():
        row = next(part for part in said.split("<tr>") if f">{words}</td>" in part)
        assert f">{training.before[name]:.4g}</td>" in row
        assert f">{training.after[name]:.4g}</td>" in row
        assert f">{training.after[name] + 1:.4g}</td>" not in row
    assert training.temperature is not None
    assert f"A temperature of {training.temperature['temperature']:.4g}" in said
    assert section([prune, quantize]) == []


def test_the_command_puts_it_on_the_page_of_a_trained_model_only(
    distilled: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    found = {}
    for name, model in (("trained", distilled), ("plain", tiny_model("llama"))):
        html = tmp_path / f"{name}.html"
        words = ["score", str(model), "--axes", "efficiency", "--html", str(html), "--quiet"]
        assert exit_code([*words, "--out", str(tmp_path / f"{name}.json")]) == 0
        found[name] = html.read_text()
        assert json.loads((tmp_path / f"{name}.json").read_text())["scores"]
    assert "<h2>Distillation</h2>" in found["trained"]
    assert "<h2>Distillation</h2>" not in found["plain"]

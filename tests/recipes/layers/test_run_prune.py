"""Runs that prune: whole, resumed byte for byte, within memory, and on mixes of texts."""

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from unicomp import manifest
from unicomp.recipes.layers.plan import Plan, plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options, load
from unicomp.recipes.stage.progress import Show

MIB = 1 << 20
Digests = Callable[[Path], dict[str, str]]
Timeless = Callable[[Path], dict[str, Any]]
Stopped = Callable[[Callable[[Path, Show], object], Path], int]


def make(model: Path, data: object, method: str, **options: Any) -> Plan:
    """Return a plan for a tiny model: 6 windows of 32 tokens."""
    calibration = None
    if method != "magnitude":
        calibration = {"data": str(data), "samples": 6, "seq_len": 32}
    return plan(from_options("prune", method, options, calibration=calibration), model=str(model))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("magnitude", {"scope": "global"}),
        ("wanda", {"sparsity": "2:4"}),
        ("sparsegpt", {"allocation": "sensitivity"}),
    ],
)
def test_interrupted_everywhere_resumes_to_the_same_bytes(
    method: str,
    options: dict[str, Any],
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    digests: Digests,
    timeless: Timeless,
    stopped: Stopped,
) -> None:
    """Stop at every third progress step; each time the next attempt goes on."""
    model = tiny_model("llama")
    run(make(model, tiny_text, method, **options), tmp_path / "whole")
    run(make(model, tiny_text, method, **options), tmp_path / "again")
    assert digests(tmp_path / "again") == digests(tmp_path / "whole")

    def once(out: Path, show: Show) -> None:
        run(make(model, tiny_text, method, **options), out, progress=show)

    out = tmp_path / "broken"
    assert stopped(once, out) > 3
    assert digests(out) == digests(tmp_path / "whole")
    assert timeless(out) == timeless(tmp_path / "whole")


@pytest.mark.slow
def test_kill_nine_at_six_moments(
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    digests: Digests,
    timeless: Timeless,
    killed: Callable[[list[str], Path, int], None],
) -> None:
    """`kill -9`, each time after a random number of steps and a moment, then let it finish."""
    model = tiny_model("llama", num_hidden_layers=6)
    command = [
        *(sys.executable, "-m", "unicomp", "prune", str(model), "--calibration", str(tiny_text)),
        *("--allocation", "sensitivity", "--samples", "16", "--seq-len", "64", "--out"),
    ]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    killed(command, tmp_path / "out", 6)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_memory_ceiling_is_kept_or_declined(
    method: str, tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """In a process of its own: the forecast holds, and a ceiling below it is refused."""
    model = tiny_model("llama", hidden_size=256, intermediate_size=704)
    out = tmp_path / "out"
    words = [sys.executable, "-m", "unicomp", "prune", str(model), "--method", method]
    if method != "magnitude":
        words += ["--calibration", str(tiny_text), "--samples", "8", "--seq-len", "64"]
    if method == "sparsegpt":
        words += ["--allocation", "sensitivity"]
    small = subprocess.run(
        [*words, "--out", str(out), "--max-memory", "64MiB"], capture_output=True, text=True
    )
    assert small.returncode == 1
    assert "--max-memory 67108864 bytes is too small" in small.stderr
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()
    ceiling = 768
    done = subprocess.run(
        [*words, "--out", str(out), "--max-memory", f"{ceiling}MiB"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert manifest.read(out).stages[0].peak_rss_bytes < ceiling * MIB


def test_shares_are_in_plan_and_manifest(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    found = make(tiny_model("llama"), tiny_text, "wanda", allocation="sensitivity")
    said = {entry["sparsity"] for entry in found.to_json()["tensors"]}
    assert said == {None, "0.5 ± 0.05"}
    assert any("measured before the first layer is pruned" in note for note in found.notes)
    made = run(found, tmp_path / "out")
    shares = [module.sparsity for module in made.stages[0].modules.values()]
    assert all(share is not None and 0.44 < share < 0.56 for share in shares)
    assert len(set(shares)) > 3


def test_zeros_by_sensitivity_and_bits_in_one_pass(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """The shares are those that pruning alone has."""
    model = tiny_model("llama")
    alone = run(make(model, tiny_text, "wanda", allocation="sensitivity"), tmp_path / "alone")
    text = (
        f'version: 1\ncalibration: {{data: "{tiny_text}", samples: 6, seq_len: 32}}\nstages:\n'
        "  - {prune: wanda, sparsity: 0.5, allocation: sensitivity}\n"
        "  - {quantize: gptq, bits: 8, group_size: -1}\n"
    )
    both = run(plan(load(text, file="x"), model=str(model)), tmp_path / "both")
    for name, module in both.stages[-1].modules.items():
        wanted = alone.stages[0].modules[name].sparsity
        assert wanted is not None
        assert module.sparsity is not None
        assert module.sparsity >= wanted  # rounding makes some more


def test_a_mix_is_in_the_manifest_and_the_card(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path, digests: Digests
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_bytes(tiny_text.read_bytes())
    model = tiny_model("llama")
    made = run(make(model, f"{tiny_text}=0.67,{other}=0.33", "wanda"), tmp_path / "mix")
    assert made.calibration is not None
    parts = made.calibration.parts
    assert [(part.source, part.samples) for part in parts] == [
        (tiny_text.name, 4),
        ("other.jsonl", 2),
    ]
    assert parts[0].sha256 == sha256(tiny_text.read_bytes()).hexdigest()
    card = (tmp_path / "mix" / "README.md").read_text()
    assert f"- 2 windows (33%) of `other.jsonl` (sha256 `{parts[1].sha256}`)" in card
    assert "neither the file nor the model gets smaller or faster" in card
    single = run(make(model, tiny_text, "wanda"), tmp_path / "single")
    assert single.calibration is not None
    assert single.calibration.sha256 != made.calibration.sha256
    assert digests(tmp_path / "single") != digests(tmp_path / "mix")

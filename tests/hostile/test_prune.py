"""What cannot be pruned as asked: one clear error at the command line, and nothing is left."""

from collections.abc import Callable
from pathlib import Path

import pytest

from unicomp.cli.main import exit_code

CASES: dict[str, tuple[str, list[str]]] = {
    "--method magnitude --sparsity 0": ("llama", ["share of zeros", "got `0`"]),
    "--method magnitude --sparsity 1": ("llama", ["between 0 and 1", "got `1`"]),
    "--method wanda --sparsity -0.5": ("llama", ["between 0 and 1", "-0.5"]),
    "--method sparsegpt --sparsity 1.5": ("llama", ["between 0 and 1", "1.5"]),
    "--method width --sparsity 1": ("llama", ["share of parameters", "got `1`"]),
    "--method sparsegpt --sparsity 4:2": ("llama", ["`4:2`", "n < m"]),
    "--method wanda --sparsity 2:2": ("llama", ["`2:2`", "n < m"]),
    "--method magnitude --sparsity 0:4": ("llama", ["`0:4`", "0 < n"]),
    "--method magnitude --sparsity half": ("llama", ["`half`", "2:4"]),
    "--method magnitude --sparsity nan": ("llama", ["nan"]),
    "--method sparsegpt --sparsity 500:1000": ("llama", ["nothing would be pruned", "1000"]),
    "--method magnitude --scope global --sparsity 2:4": ("llama", ["global", "`2:4`"]),
    "--method wanda --allocation sensitivity --sparsity 2:4": ("llama", ["`2:4` is the same"]),
    "--method width --sparsity 2:4": ("llama", ["`2:4`", "`sparsegpt`"]),
    "--method depth --layers 0": ("llama", ["every layer would be removed", "layers: 1"]),
    "--method depth --layers 3": ("llama", ["`layers` 3", "between 1 and 2"]),
    "--method depth --sparsity 0.99": ("llama", ["cutting layers", "the least that is left"]),
    "--method heads --heads 0": ("llama", ["every head would be removed"]),
    "--method heads --kv-heads 0": ("llama", ["every head would be removed"]),
    "--method heads --heads 3": ("llama", ["2 KV heads do not divide 3 heads", "heads: 2"]),
    "--method heads --heads 2": ("gpt2", ["gpt2", "head_dim", "width"]),
    "--method width --kv-heads 3": ("llama", ["`kv_heads` 3", "the model has: 2"]),
    "--method width --hidden 63": ("llama", ["4 heads do not divide its 63"]),
    "--method width --target-params 5": ("llama", ["at most 5 parameters", "the least"]),
    "--method width --target-bytes 1KB": ("llama", ["at most 1000 bytes", "the least"]),
    "--method width --target-speedup 1000": ("llama", ["speed-up of at least 1000"]),
    "--method width --target-params 9 --sparsity 0.5": ("llama", ["two ways", "one of them"]),
    "--method experts --experts 1": ("llama", ["has no experts"]),
    "--method experts --experts 0": ("mixtral", ["every expert would be removed"]),
    "--method experts --experts 99": ("mixtral", ["`experts` 99"]),
}


@pytest.mark.parametrize("words", CASES)
def test_it_is_refused_before_any_work(
    words: str,
    tiny_model: Callable[..., Path],
    tiny_text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before any weight is read, too."""
    arch, parts = CASES[words]
    model, out = tiny_model(arch), tmp_path / "out"

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("unicomp.checkpoint.Checkpoint.read", refuse)
    command = ["prune", str(model), "--out", str(out), "--calibration", str(tiny_text)]
    if "magnitude" in words:
        command = command[:4]
    assert exit_code([*command, *words.split()]) == 1
    said, err = capfd.readouterr()
    assert said == ""
    kinds = [line.split(":")[0] for line in err.splitlines()]
    assert kinds in (["error"], ["error", "hint"]), err
    for part in parts:
        assert part in err
    assert not out.exists()
    assert not (tmp_path / "out.partial").exists()


def test_what_is_sound_is_taken(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    """The same command with a share that can be had works: the others fail by their options."""
    command = ["prune", str(tiny_model("llama")), "--out", str(tmp_path / "out")]
    assert exit_code([*command, "--method", "magnitude", "--sparsity", "0.5"]) == 0
    assert (tmp_path / "out" / "unicomp.json").exists()

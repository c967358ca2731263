"""The gates of a recipe decide how `unicomp run` ends, and whether the result may be pushed."""

from pathlib import Path

import pytest

from unicomp.cli.main import exit_code
from unicomp.evaluate.scores import read

RECIPE = """\
version: 1
model: builtin:tinyworld
stages:
  - quantize: rtn
    group_size: 32
score: {score}
gates:
  - {gate}
"""


@pytest.mark.parametrize(
    ("score", "gate", "outcome", "code"),
    [
        ("[fidelity]", "{score: fidelity/kl, max: 0.05}", "pass", 0),
        ("[fidelity]", "{score: fidelity/kl, max: 0.0001}", "fail", 3),
        ("[fidelity]", "{score: safety/refusal_rate, min: 0.5}", "inconclusive", 4),
        ("[]", "{score: fidelity/kl, max: 0.05}", "inconclusive", 4),
        ("[]", "{score: efficiency/bits_per_weight, max: 6.5}", "pass", 0),
    ],
)
def test_gates_decide(
    score: str,
    gate: str,
    outcome: str,
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe, out = tmp_path / "r.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.replace("{score}", score).replace("{gate}", gate), encoding="utf-8")
    assert exit_code(["run", str(recipe), "--out", str(out)]) == code
    assert f"gate {outcome}: " in capsys.readouterr().out
    assert [own["outcome"] for own in read(out / "report.json").gates] == [outcome]
    assert exit_code(["verify", str(out)]) == 0
    assert exit_code(["push", str(out), "org/name", "--dry-run"]) == (0 if code == 0 else 1)
    refused = f"gates are not passed: {gate.split()[1].rstrip(chr(44))}: {outcome}"
    assert (refused in capsys.readouterr().err) == (code != 0)


def test_gates_of_several_passes_decide(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    text = RECIPE.replace("{score}", "[efficiency]")
    text = text.replace("stages:\n", "stages:\n  - {prune: magnitude, sparsity: 0.5}\n")
    for limit, code in (("6.5", 0), ("2", 3)):
        gate = f"{{score: efficiency/bits_per_weight, max: {limit}}}"
        recipe.write_text(text.replace("{gate}", gate), encoding="utf-8")
        assert exit_code(["run", str(recipe), "--out", str(tmp_path / limit)]) == code

"""`unicomp delta`: what it says, and to whom."""

import json
from pathlib import Path

import pytest

from unicomp.cli.main import exit_code

PAIR = ["builtin:tinyworld-pirate", "--base", "builtin:tinyworld"]


def test_compress_inspect_restore(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "d")
    words = ["delta", "compress", *PAIR, "--out", out, "--method", "dqrelo", "--json", "--quiet"]
    assert exit_code(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["schema"] == "unicomp.delta/1"
    assert made["method"] == "dqrelo"
    assert exit_code(["delta", "inspect", out, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"] == made["totals"]
    own = found["tensors"]["model.embed_tokens.weight"]
    assert {"bytes", "rank", "error", "cosine", "planes"} <= own.keys()
    assert exit_code(["delta", "inspect", out]) == 0
    shown = capsys.readouterr().out
    assert "of 16 bits" in shown
    assert "model.layers.*.mlp.down_proj.weight" in shown
    assert exit_code(["verify", out]) == 0
    assert "whole" in capsys.readouterr().out
    weights = tmp_path / "d/delta.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    assert exit_code(["verify", out]) == 1
    assert "is not as `unicomp.json` says" in capsys.readouterr().err
    weights.write_bytes(whole)
    restored = str(tmp_path / "r")
    words = ["delta", "restore", out, "--base", "builtin:tinyworld", "--out", restored, "--quiet"]
    assert exit_code(words) == 0
    assert capsys.readouterr() == (restored + "\n", "")
    assert exit_code(["verify", restored]) == 0


def test_dry_run_reads_headers_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(["delta", "compress", *PAIR, "--dry-run", "--json", "--ratio", "0.25"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["schema"] == "unicomp.delta-plan/1"
    assert plan["budget"] == int(0.25 * plan["matrix_bytes_16"] * 1.01)
    assert sum(plan["memory_bytes"].values()) > 0
    assert not list(tmp_path.iterdir())


def test_a_folder_to_make_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(["delta", "compress", *PAIR]) == 2
    assert "'--out': missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compress", PAIR[0], "--out", "d"], "error: `--base` is missing"),
        (["compress", *PAIR, "--out", "d", "--method", "dqrello"], "hint: did you mean `dqrelo`?"),
        (["compress", *PAIR, "--out", "d", "--ratio", "0.01", "--method", "dqrelo"], "the least"),
        (["compress", *PAIR, "--out", "d", "--planes", "2", "--method", "svd"], "`dqrelo-plus`"),
        (["compress", *PAIR, "--out", "d", "--device", "cuda"], "error: cannot compute on device"),
        (["compress", *PAIR, "--out", "d", "--max-memory", "9MB"], "error: --max-memory 9000000"),
        (["inspect", "absent"], "error: `absent`: no such folder"),
    ],
)
def test_what_is_wrong_is_said_with_a_hint(
    words: list[str],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(["delta", *words]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_recipe_has_a_delta_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "small.yaml"
    text = (
        "version: 1\nmodel: builtin:tinyworld-pirate\nstages:\n"
        "  - delta: dqrelo\n    base: builtin:tinyworld\n    ratio: 0.25\n"
    )
    recipe.write_text(text)
    out = tmp_path / "d"
    assert exit_code(["run", str(recipe), "--out", str(out), "--json", "--quiet"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["options"]["ratio"] == 0.25
    assert (out / "recipe.yaml").read_text() == text
    assert exit_code(["delta", "inspect", str(out)]) == 0
    capsys.readouterr()
    assert exit_code(["plan", str(recipe)]) == 0
    assert "36 as deltas, 11 whole" in capsys.readouterr().out
    for words in (["plan"], ["run", "--out", str(tmp_path / "e")]):
        assert exit_code([words[0], str(recipe), *words[1:], "--max-memory", "9MB"]) == 1
        assert "--max-memory 9000000 bytes is too small" in capsys.readouterr().err
    recipe.write_text(text + "  - quantize: rtn\n")
    assert exit_code(["run", str(recipe), "--out", str(tmp_path / "e")]) == 1
    assert "cannot stand beside `delta`" in capsys.readouterr().err


def test_recovery_of_three_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["delta", "recovery"]
    for name, value in (("base", 0.2), ("tuned", 0.6), ("compressed", 0.5)):
        score = {"axis": "accuracy", "name": "accuracy/t/acc", "value": value, "unit": "share"}
        score |= {"higher_is_better": True, "status": "measured"}
        report = {"schema": "unicomp.report/1", "model": {"id": name}, "baseline": None}
        report |= {"machine": {}, "versions": {}, "seeds": {}, "scores": [score]}
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
        words += [f"--{name}", str(tmp_path / f"{name}.json")]
    assert exit_code(words) == 0
    assert "worst  accuracy/t/acc, 0.7500" in capsys.readouterr().out
    assert exit_code([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["clipped_mean"] == pytest.approx(0.75)

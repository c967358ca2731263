"""`unicomp export` from its words to its exit codes."""

import json
from pathlib import Path

import pytest

from unicomp.cli.main import exit_code


def test_one_object_and_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    words = ["export", "builtin:tinyworld", "--format", "gguf", "--type", "q8_0", "--out"]
    assert exit_code([*words, str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["schema"] == "unicomp.export/1"
    assert said["bytes"] == path.stat().st_size
    assert {own["stored"] for own in said["tensors"]} == {"Q8_0"}
    assert len(said["tensors"]) == 35
    assert exit_code([*words, str(path)]) == 1
    assert "hint: choose another file, or give `--overwrite`" in capsys.readouterr().err
    assert exit_code([*words, str(path), "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "rounded to the nearest" in shown
    assert str(path) in shown
    assert exit_code(["inspect", str(path)]) == 0
    assert exit_code(["generate", str(path), "--prompt", "The", "--max-new-tokens", "4"]) == 0


def test_a_refusal_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in [
        (["--format", "gptq", "--out", "a"], "nothing could be stored as gptq"),
        (["--format", "gguf", "--out", "a.gguf", "--type", "q5_0"], "has no type `q5_0`"),
        (["--format", "awq", "--out", "a"], "unknown format `awq`"),
    ]:
        words[3] = str(tmp_path / words[3])
        assert exit_code(["export", "builtin:tinyworld", *words]) == 1
        error = capsys.readouterr().err
        assert said in error
        assert "hint: " in error
    assert not list(tmp_path.iterdir())

"""`unicomp verify`: sound, unsound, with a manifest and without."""

import json
import shutil
from pathlib import Path

import pytest

from unicomp import builtin
from unicomp.cli.main import exit_code

Capture = pytest.CaptureFixture[str]


def test_sound(capsys: Capture) -> None:
    assert exit_code(["verify", "builtin:tinyworld"]) == 0
    assert capsys.readouterr() == (
        "builtin:tinyworld: whole, all values finite; "
        "there is no `unicomp.json` to compare it with\n",
        "",
    )


def test_unsound(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(builtin.model("tinyworld"), folder)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1] + b"\x7f" + b"x")
    assert exit_code(["verify", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 1
    assert err.count("hint: ") == 1
    assert "1 bytes after the last tensor" in err
    assert exit_code(["verify", str(folder), "--json", "--quiet"]) == 1
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["schema"], found["id"], found["manifest"]) == ("unicomp.verify/1", "model", False)
    assert len(found["problems"]) == 1
    assert found["problems"][0] in err


def test_an_unreadable_manifest_is_an_error(tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "model"
    shutil.copytree(builtin.model("tinyworld"), folder)
    (folder / "unicomp.json").write_text("{}")
    assert exit_code(["verify", str(folder), "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "has schema `None`" in err


def test_what_a_loader_would_not_take_is_a_problem(tmp_path: Path, capsys: Capture) -> None:
    """A folder is sound; with a word of its config changed, vLLM would refuse it."""
    folder = tmp_path / "out"
    run = ["run", "w4-rtn", "builtin:tinyworld", "--out", str(folder), "--quiet"]
    assert exit_code([*run, "--set", "score=[]"]) == 0
    capsys.readouterr()
    asked = ["verify", str(folder), "--target", "vllm==0.33"]
    assert exit_code(asked) == 0
    assert "lint: vllm 0.33: nothing against it" in capsys.readouterr().out
    assert exit_code([*asked, "--tp", "3"]) == 1
    assert "error: vllm 0.33: so many processes" in capsys.readouterr().err
    assert exit_code(["verify", str(folder), "--target", "llama.cpp", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert [one["rule"] for one in found["findings"]] == ["folder"]
    assert exit_code(["verify", str(folder), "--target", "lama.cpp"]) == 1
    assert "hint: did you mean `llama.cpp`?" in capsys.readouterr().err

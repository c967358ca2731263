"""`unicomp score`: a table for people, one JSON object for programs, a file on request."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from unicomp.cli.main import app
from unicomp.evaluate import scores


@pytest.fixture
def words(tiny_model: Callable[..., Path], tiny_text: Path) -> list[str]:
    """A command line that works."""
    model, base = tiny_model("llama"), tiny_model("llama", seed=1)
    words = ["score", str(model), "--baseline", str(base), "--text", str(tiny_text)]
    return [*words, "--seq-len", "64", "--limit", "3"]


def test_json_is_the_report_that_the_file_holds(words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "report.json"
    done = CliRunner().invoke(app, [*words, "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["schema"] == "unicomp.report/1"
    assert found == scores.read(out).to_json()
    assert len(found["scores"]) == 7


def test_the_table_has_a_line_for_each_score(words: list[str]) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    for name in ("accuracy/perplexity", "fidelity/ear", "efficiency/bits_per_weight"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert any(character.isdigit() for character in line)
    assert "baseline" in done.stdout
    assert "score 3/3" in done.stderr


def test_without_a_baseline_the_reason_is_said(words: list[str]) -> None:
    del words[2:4]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "note: fidelity/kl skipped: no baseline was given" in done.stdout
    assert "delta" not in done.stdout


def test_a_report_that_cannot_be_written_is_refused_before_the_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicomp.evaluate.models.load", lambda *_, **__: pytest.fail("worked"))
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "no" / "report.json")])
    assert "no folder" in str(done.exception)


@pytest.mark.parametrize("option", [["--limit", "0"], ["--seq-len", "1"], ["--axis", "accuracy"]])
def test_usage_errors_exit_with_2(words: list[str], option: list[str]) -> None:
    assert CliRunner().invoke(app, [*words, *option]).exit_code == 2


def test_gates_decide_the_exit_code(words: list[str], tmp_path: Path) -> None:
    out, gates = tmp_path / "report.json", tmp_path / "gates.yaml"
    for bound, code, outcome in (
        ("{score: accuracy/perplexity, max: 1e6}", 0, "pass"),
        ("{score: accuracy/perplexity, max: 1.5}", 3, "fail"),
        ("{score: safety/refusal_rate, min: 0.5}", 4, "inconclusive"),
    ):
        gates.write_text(f"- {bound}\n")
        junit = tmp_path / "gates.xml"
        more = ["--gate", str(gates), "--out", str(out), "--junit", str(junit)]
        done = CliRunner().invoke(app, [*words, *more])
        assert done.exit_code == code, done.output
        assert ("<failure" in junit.read_text()) == (code == 3)
        assert ("<error" in junit.read_text()) == (code == 4)
        assert f"gate {outcome}: " in done.stdout
        (verdict,) = scores.read(out).gates
        assert verdict["outcome"] == outcome
        quiet = CliRunner().invoke(app, [*words, "--gate", str(gates), "--json"])
        assert quiet.exit_code == code
        assert json.loads(quiet.stdout)["gates"] == [verdict]


def test_a_gate_file_is_read_before_the_work(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("unicomp.evaluate.models.load", lambda *_, **__: pytest.fail("worked"))
    gates = tmp_path / "gates.yaml"
    gates.write_text("- {score: accuracy/perplexity, most: 2}\n")
    done = CliRunner().invoke(app, [*words, "--gate", str(gates)])
    assert "most" in str(done.exception)


def test_a_task_that_fails_is_an_error_and_the_rest_is_kept(
    words: list[str], tmp_path: Path
) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "the dog saw", "choices": [" a cat", " the"], "answer": 0}\n' * 3)
    broken = tmp_path / "broken.jsonl"
    first = rows.read_text().splitlines(True)[0]
    broken.write_text(first + '{"prompt": "the dog", "choices": [" a"], "answer": 1}\n')
    gates = tmp_path / "gates.yaml"
    out = tmp_path / "report.json"
    line = [*words, "--tasks", f"{broken},{rows}", "--axes", "accuracy", "--out", str(out)]
    for bound, code in (
        (None, 1),
        ("{score: accuracy/perplexity, max: 1e6}", 1),
        ("{score: accuracy/perplexity, max: 1.5}", 3),
        ("{score: accuracy/broken/acc, min: 0.5}", 4),
    ):
        more = []
        if bound is not None:
            gates.write_text(f"- {bound}\n")
            more = ["--gate", str(gates)]
        done = CliRunner().invoke(app, [*line, *more])
        assert done.exit_code == code, done.output
        error, hint = [
            row for row in done.stderr.splitlines() if row.startswith(("error: ", "hint: "))
        ]
        assert error.startswith("error: `accuracy/broken/acc`: ")
        assert hint.startswith("hint: ")
        report = scores.read(out)
        assert report.score("accuracy/broken/acc").status == "unmeasurable"
        assert report.score("accuracy/mine/acc").status == "measured"


def test_tasks_and_suites_are_words(words: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_text('{"prompt": "the dog saw", "choices": [" a cat", " the"], "answer": 0}\n' * 3)
    done = CliRunner().invoke(
        app, [*words, "--tasks", str(rows), "--axes", "accuracy,fidelity", "--batch-size", "2"]
    )
    assert done.exit_code == 0, done.output
    assert "accuracy/mine/acc " in done.stdout
    assert "fidelity/flips" in done.stdout
    assert "score 6/6  mine, baseline" in done.stderr
    done = CliRunner().invoke(app, [*words, "--suite", "quik"])
    assert "unknown suite: `quik`" in str(done.exception)

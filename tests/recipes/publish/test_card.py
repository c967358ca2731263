"""Each snippet of a card is run, or says that it was not."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unicomp import manifest
from unicomp.cli.main import exit_code
from unicomp.evaluate import scores
from unicomp.recipes.lint.output import Output
from unicomp.recipes.publish import card, card_fields


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("cards")
    made = {"compressed-tensors": root / "ct", "pruned": root / "pruned", "gptq": root / "gptq"}
    words = ["--method", "rtn", "--group-size", "32", "--out", str(made["compressed-tensors"])]
    assert exit_code(["quantize", "builtin:tinyworld", *words]) == 0
    words = ["--method", "magnitude", "--out", str(made["pruned"])]
    assert exit_code(["prune", "builtin:tinyworld", *words]) == 0
    words = ["--format", "gptq", "--out", str(made["gptq"])]
    assert exit_code(["export", str(made["compressed-tensors"]), *words]) == 0
    return made


def snippets(text: str) -> Iterator[tuple[str, str]]:
    """Yield (language, code) of every block."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("compressed-tensors", "pruned")]


@pytest.mark.parametrize("kind", [*SLOW, "gptq"])
def test_every_snippet_runs_or_says_that_it_was_not_run(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders[kind]
    text = (folder / "README.md").read_text("utf-8")
    card_fields.check(folder / "README.md")
    ran = 0
    for language, code in snippets(text):
        code = code.replace("PATH_OR_ID", str(folder))
        if language == "python" and "gptqmodel" not in code:
            code += "\nids = tokenizer('The', return_tensors='pt')['input_ids']\nmodel(ids)\n"
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            ran += 1
            continue
        for line in code.splitlines():
            if line.startswith("unicomp "):
                words = line.replace("model.gguf", str(tmp_path / "model.gguf")).split()
                assert exit_code(words[1:]) == 0
                ran += 1
        assert "unicomp " in code or "not run by unicomp's tests" in code
    assert ran >= (1 if kind == "gptq" else 2)
    assert "licence" in text


def test_a_card_says_what_became_of_every_gate(tmp_path: Path) -> None:
    """One of each outcome, decided by the command; a card without gates says nothing of them."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        "version: 1\nmodel: builtin:tinyworld\nstages: [{quantize: rtn, group_size: 32}]\n"
        "score: [efficiency]\ngates:\n"
        "  - {score: efficiency/disk_bytes, max: 1}\n"
        "  - {score: efficiency/bits_per_weight, max: 16}\n"
        "  - {score: safety/bias, max: 1}\n"
        "  - {score: efficiency/load_s, max_rise: 1, unmeasurable: inconclusive}\n"
    )
    assert exit_code(["run", str(recipe), "--out", str(out), "--quiet"]) == 3
    text = (out / "README.md").read_text("utf-8")
    verdicts = {own["score"]: own for own in scores.read(out / "report.json").gates}
    assert len({own["outcome"] for own in verdicts.values()}) >= 3
    section = text.partition("## Gates\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) == len(verdicts) == 4
    said = {
        "pass": "passed",
        "fail": "failed",
        "inconclusive": "had too little evidence",
        "not applied": "did not apply",
    }
    for name, own in verdicts.items():
        row = next(line for line in rows if f"`{name}`" in line)
        assert f"| {said[own['outcome']]} |" in row
        assert (own["reason"] or "") in row
    assert "failed" in rows[0]
    found = [own["outcome"] for own in verdicts.values()]
    for outcome in set(found):
        assert f"{found.count(outcome)} {said[outcome]}" in section
    plain = card.write(Output({}, {}), manifest.read(out), {"scores": []})
    assert "## Gates" not in plain

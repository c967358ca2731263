"""Each snippet of a card is run, or says that it was not."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from unicomp.cli.main import exit_code
from unicomp.recipes import card_fields


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


@pytest.mark.parametrize("kind", ["compressed-tensors", "pruned", "gptq"])
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

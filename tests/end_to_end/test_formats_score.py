"""One model in every layout has one score: exported by us, and written by transformers itself."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import unicomp
from unicomp.cli.main import exit_code

BASE = "builtin:tinyworld"

pytestmark = pytest.mark.slow


def perplexity(model: Path) -> float:
    report = unicomp.score(model, text=BASE, axes=["accuracy"], limit=8)
    value = next(own.value for own in report.scores if own.name == "accuracy/perplexity")
    assert value is not None
    return value


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "w4"
    words = ["--method", "rtn", "--group-size", "32", "--out", str(out)]
    assert exit_code(["quantize", BASE, *words]) == 0
    return out


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--format", "gptq"], "gptq"),
        (["--format", "gptq", "--type", "v2"], "gptq2"),
        (["--format", "gguf"], "w4.gguf"),
    ],
)
def test_an_export_scores_the_same(words: list[str], name: str, made: Path, tmp_path: Path) -> None:
    out = tmp_path / name
    assert exit_code(["export", str(made), *words, "--out", str(out)]) == 0
    assert perplexity(out) == pytest.approx(perplexity(made), rel=1e-3)


def test_what_transformers_wrote_scores_the_same(made: Path, tmp_path: Path) -> None:
    """Its own compressor packs the weights again; a rounding of another model scores otherwise."""
    model = AutoModelForCausalLM.from_pretrained(made)
    model.save_pretrained(tmp_path / "theirs")
    AutoTokenizer.from_pretrained(made).save_pretrained(tmp_path / "theirs")
    assert perplexity(tmp_path / "theirs") == pytest.approx(perplexity(made), rel=1e-6)
    assert perplexity(made) != pytest.approx(perplexity(Path(BASE)), rel=2e-3)

"""Checkpoints that other people's quantizers wrote score as with those tools' own readers.

`tests/data/foreign/make.py` made them, and stored what the tools' readers say of the text: so the
tools need not be here.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import unicomp
from unicomp.hub import resolve
from unicomp.kernels import load as dense_load

DATA = Path(__file__).resolve().parents[1] / "data/foreign"
CASES = sorted(path.parent.name for path in DATA.glob("*/expected.json"))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as its tool left it, with the tokenizer that all of them share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / request.param
    shutil.copytree(DATA / request.param, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DATA / name, folder)
    return folder


def model_of(case: Path) -> Path:
    return case / "model.gguf" if (case / "model.gguf").is_file() else case


def expected(case: Path) -> torch.Tensor:
    said = json.loads((case / "expected.json").read_text("utf-8"))
    return torch.tensor(said["nll"], dtype=torch.float64)


@torch.no_grad()
def test_every_token_is_as_likely_as_with_its_own_reader(case: Path) -> None:
    ids = [1, *Tokenizer.from_file(str(DATA / "tokenizer.json")).encode(_text()).ids]
    model = dense_load.load(resolve(str(model_of(case))).folder)
    logits = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
    found = -logits.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    theirs = expected(case)
    # They compute in float16, llama.cpp rounds activations to 8 bits as well.
    assert float((found - theirs).abs().max()) < (0.1 if case.name.startswith("gguf") else 0.02)
    assert float((found - theirs.roll(1)).abs().max()) > 1


def test_the_score_is_that_of_its_own_reader(case: Path) -> None:
    report = unicomp.score(
        model_of(case), text=str(DATA / "text.txt"), axes=["accuracy"], seq_len=140, bos=True
    )
    score = next(own for own in report.scores if own.name == "accuracy/perplexity")
    assert score.value is not None
    theirs = expected(case)
    assert score.value == pytest.approx(math.exp(theirs.mean()), rel=0.01)
    assert score.value != pytest.approx(math.exp(theirs[:20].mean()), rel=0.01)


def test_each_tool_is_there() -> None:
    tools = {json.loads((DATA / name / "expected.json").read_text())["tool"] for name in CASES}
    words = {tool.split()[0] for tool in tools}
    assert words == {"gptqmodel", "llmcompressor", "llama.cpp"}


def _text() -> str:
    return (DATA / "text.txt").read_text("utf-8")

"""`score` from words to report: the figures that are known, and everything that is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import unicomp
from unicomp.errors import UnicompError, UnsupportedError
from unicomp.evaluate import models
from unicomp.evaluate.score import score
from unicomp.evaluate.windows import cut
from unicomp.recipes.layers.plan import plan
from unicomp.recipes.layers.run import run
from unicomp.recipes.load import from_options

NAMES = {
    "accuracy/perplexity",
    "accuracy/bits_per_byte",
    "fidelity/kl",
    "fidelity/top1_agreement",
    "fidelity/ear",
    "efficiency/disk_bytes",
    "efficiency/bits_per_weight",
}


@pytest.fixture
def llama(tiny_model: Callable[..., Path]) -> Path:
    """A tiny llama."""
    return tiny_model("llama")


def refused(parts: list[str], *words: Any, **options: Any) -> None:
    """Check that `score` raises before any weight is read, with every part in its two lines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were read"))
        with pytest.raises(UnicompError) as caught:
            score(*words, **options)
    said = f"{caught.value.message}\n{caught.value.hint}"
    assert caught.value.hint
    for part in parts:
        assert part in said


def test_all_axes(llama: Path, tiny_model: Callable[..., Path], tiny_text: Path) -> None:
    other = tiny_model("llama", seed=1)
    seen: list[tuple[str, int, int]] = []
    report = score(
        other,
        llama,
        text=str(tiny_text),
        seq_len=64,
        limit=6,
        progress=lambda *step: seen.append(step),
    )
    assert {found.name for found in report.scores} == NAMES
    assert {found.status for found in report.scores} == {"measured"}
    assert report.model.id == other.name
    assert report.baseline is not None
    assert report.baseline.id == llama.name
    assert report.versions["torch"] == torch.__version__
    detail = report.score("fidelity/kl").detail
    assert detail["windows"] == report.score("fidelity/kl").n == 6
    assert detail["tokens"] == 6 * 63
    assert detail["bos"] is False
    assert detail["text"] == tiny_text.name
    assert seen[-1] == ("windows", 6, 6)
    assert (report.score("fidelity/kl").value or 0) > 0.1
    json.dumps(report.to_json(), allow_nan=False)
    assert str(llama.parent) not in json.dumps(report.to_json())


def test_a_model_beside_itself(llama: Path, tiny_text: Path) -> None:
    report = score(llama, llama, text=str(tiny_text), seq_len=64, limit=4)
    assert report.score("fidelity/kl").value == 0
    assert report.score("fidelity/top1_agreement").value == 1
    assert report.score("fidelity/ear").value == pytest.approx(1, abs=1e-12)
    for name in NAMES:
        if not name.startswith("fidelity"):
            assert report.score(name).delta == 0


def test_the_same_windows_for_the_same_seed(llama: Path, tiny_text: Path) -> None:
    def value(seed: int, limit: int | None) -> float | None:
        report = score(
            llama, axes=["accuracy"], text=str(tiny_text), seq_len=32, limit=limit, seed=seed
        )
        return report.score("accuracy/perplexity").value

    assert value(0, 5) == value(0, 5) != value(1, 5)
    assert value(0, 10**9) == value(1, None)


def test_fidelity_without_a_baseline_is_skipped_and_reads_nothing(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were read"))
    report = score(llama, axes=["fidelity", "efficiency"])
    for found in report.scores[:3]:
        assert found.status == "skipped"
        assert "baseline" in found.detail["reason"]
    assert report.score("efficiency/bits_per_weight").value == 32


def test_a_slow_tokenizer_gives_an_estimate(
    llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"axes": ["accuracy"], "text": str(tiny_text), "seq_len": 64}
    exact = score(llama, **options).score("accuracy/bits_per_byte")
    monkeypatch.setattr(cut.text, "token_bytes", lambda *_: None)
    rough = score(llama, **options).score("accuracy/bits_per_byte")
    assert (exact.status, rough.status) == ("measured", "estimated")
    assert rough.value == pytest.approx(exact.value, rel=0.02)


def test_bits_per_byte_is_over_the_bytes_that_were_predicted(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "a.txt"
    file.write_text("the old dog saw a cat and the moon over the river. " * 8)
    found = score(llama, axes=["accuracy"], text=str(file), seq_len=32).score(
        "accuracy/bits_per_byte"
    )
    tokenizer = AutoTokenizer.from_pretrained(llama)
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = tokenizer(file.read_text(), return_tensors="pt")["input_ids"][0]
    bits = size = 0.0
    for start in range(0, len(ids) - 31, 32):
        window = ids[start : start + 32]
        with torch.no_grad():
            logits = model(window[None]).logits[0].double()
        for at in range(31):
            bits -= float(torch.log_softmax(logits[at], -1)[window[at + 1]]) / 0.6931471805599453
            size += len(tokenizer.decode(window[at + 1 : at + 2]).encode())
    assert found.value == pytest.approx(bits / size, rel=1e-5)
    assert found.detail["bytes"] == size


def test_bos_is_context_and_no_byte_of_the_text(llama: Path, tiny_text: Path) -> None:
    options = {"axes": ["accuracy"], "text": str(tiny_text), "seq_len": 64, "limit": 4}
    without = score(llama, **options).score("accuracy/bits_per_byte")
    with_bos = score(llama, **options, bos=True).score("accuracy/bits_per_byte")
    assert without.detail["bos"] is False
    assert with_bos.detail["bos"] is True
    assert with_bos.value != without.value
    assert with_bos.detail["tokens"] == without.detail["tokens"] == 4 * 63


def test_refusals(llama: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the old dog " * 100)
    short = tmp_path / "short.txt"
    short.write_text("the")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    refused(["`acuracy`", "did you mean `accuracy`"], llama, axes=["acuracy"])
    refused(["together"], llama, axes=["safety"], harmful=str(file))
    refused(["has no prompts"], llama, axes=["safety"], harmful=str(empty), benign=str(file))
    refused(["no axes"], llama, axes=[])
    refused([f"`{llama.name}`", "`--text`"], llama)
    refused(["limit 0"], llama, text=str(file), limit=0)
    refused(["no such text"], llama, text=str(tmp_path / "b.txt"))
    refused(["`empty.txt` is empty"], llama, text=str(empty))
    refused(["text `short.txt` has", "one window needs 64"], llama, text=str(short), seq_len=64)
    refused(["seq_len 257", "256 tokens"], llama, text=str(file), seq_len=257)
    refused(["no such folder"], tmp_path / "nothing", text=str(file))
    narrow = tiny_model("llama", vocab_size=64)
    refused(["does not fit", "`vocab_size` is 64"], narrow, text=str(file), seq_len=16)


def test_a_baseline_that_reads_other_tokens_is_refused(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("the old dog " * 100)
    other = shutil.copytree(llama, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][1:]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(["different tokens", "`--baseline`"], llama, other, text=str(file), seq_len=16)
    asked: dict[str, Any] = {"axes": ["safety"], "harmful": str(file), "benign": str(file)}
    refused(["different tokens", "`--baseline`"], llama, other, **asked)


def test_no_bos_where_the_tokenizer_has_none(llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    file = tmp_path / "a.txt"
    file.write_text("the old dog " * 100)
    refused(["no BOS token"], folder, text=str(file), seq_len=16, bos=True)


def test_context_is_found_wherever_a_config_keeps_it() -> None:
    assert cut.context({"n_positions": 5}) == 5
    assert cut.context({"text_config": {"max_position_embeddings": 7}}) == 7
    assert cut.context({}) is None
    assert cut._seq_len(None, [None, None]) == cut.LONGEST
    assert cut._seq_len(None, [100_000, 512]) == 512


def test_tinyworld_has_its_published_perplexity() -> None:
    report = unicomp.score("builtin:tinyworld", axes=["accuracy"], seq_len=256)
    found = report.score("accuracy/perplexity")
    assert found.value == pytest.approx(2.242, abs=5e-4)
    assert found.detail["bos"] is True
    assert found.detail["windows"] == 69


def test_stories_have_their_published_perplexity(assets: Path) -> None:
    text = str(assets / "text/tinystories/valid.txt")
    folder = assets / "models/stories260K"
    found = score(folder, axes=["accuracy"], text=text, seq_len=256, bos=False)
    assert found.score("accuracy/perplexity").value == pytest.approx(5.72, abs=5e-3)
    assert found.score("accuracy/perplexity").detail["windows"] == 60


@pytest.mark.slow
@pytest.mark.parametrize(
    ("which", "expected"), [("stories260K", 0.170), ("tinyworld", 0.0125)], ids=str
)
def test_rounding_to_four_bits_costs_what_is_published(
    assets: Path, which: str, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Symmetric, per channel, the scale max |w| / 7.5 as peers have it; windows without BOS."""
    from unicomp.kernels.load import load

    def rounded(folder: Path, dtype: torch.dtype) -> Any:
        model = load(folder, dtype=dtype)
        if calls := len(loaded):
            loaded.append(calls)
            return model
        loaded.append(0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith("proj.weight"):
                    step = weight.abs().amax(1, keepdim=True) / 7.5
                    weight.copy_((weight / step).round().clamp(-8, 7) * step)
        return model

    loaded: list[int] = []
    monkeypatch.setattr(models, "load", rounded)
    options: dict[str, Any] = {"axes": ["fidelity"], "seq_len": 256, "bos": False}
    if which == "tinyworld":
        report = score("builtin:tinyworld", "builtin:tinyworld", **options)
    else:
        folder = assets / "models/stories260K"
        text = str(assets / "text/tinystories/valid.txt")
        report = score(folder, folder, text=text, **options)
    assert report.score("fidelity/kl").value == pytest.approx(expected, rel=0.01)


def test_what_kernels_lose_is_scored_against_the_dequantized_weights(
    tiny_model: Callable[..., Path], tiny_text: Path, tmp_path: Path
) -> None:
    recipe = from_options("quantize", "rtn", {"bits": 4, "group_size": 16})
    run(plan(recipe, model=str(tiny_model("llama"))), tmp_path / "out")
    folder, found = tmp_path / "out", {}
    for compute in ("int8", "exact"):
        report = score(
            folder,
            folder,
            axes=["fidelity"],
            text=str(tiny_text),
            seq_len=64,
            limit=4,
            compute=compute,
        )
        kl = report.score("fidelity/kl")
        found[compute] = kl.value or 0.0
        assert kl.detail["compute"] == compute
        assert kl.detail["packed"] == 21
    assert 0 <= found["exact"] < 1e-8
    assert 1e-6 < found["int8"] < 0.05, found
    with pytest.raises(UnsupportedError, match="`fast`"):
        score(folder, axes=["efficiency"], compute="fast")  # type: ignore[arg-type]

"""Which way of cutting text a tokenizer is written under, and that a wrong one is seen."""

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unicomp import gguf_tokenizer, text
from unicomp.errors import UnsupportedError

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("1", "2"), ("12", "3"), ("123", "4"), ("W", "E"), ("'", "R"), ("'R", "E"), ("!", "!")]


def made(folder: Path, name: str, whole: bool = False, cut: str | None = None) -> Path:
    """Write a byte-level tokenizer that cuts as `name` does, or at `cut`."""
    tokens = [*ALPHABET, *("".join(pair) for pair in MERGES), "<s>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    own = Tokenizer(models.BPE(vocab=vocab, merges=MERGES, ignore_merges=whole))
    expressions = gguf_tokenizer.CUTS[name][0] if cut is None else (cut,)
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(one), "isolated") for one in expressions),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    own.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["llama-bpe", "dbrx", "qwen2", "starcoder"])
def test_the_way_of_cutting_is_found_by_trial(name: str, tmp_path: Path) -> None:
    folder = made(tmp_path, name, gguf_tokenizer.CUTS[name][1])
    words = gguf_tokenizer.describe(text.tokenizer(folder), folder, 300)
    assert words.fields["tokenizer.ggml.pre"] == name
    assert words.notes == ()
    assert len(words.fields["tokenizer.ggml.tokens"]) == 300
    assert words.fields["tokenizer.ggml.token_type"][-1] == gguf_tokenizer.UNUSED
    assert words.fields["tokenizer.ggml.merges"][0] == "1 2"


def test_a_way_that_llama_cpp_has_not_is_refused(tmp_path: Path) -> None:
    folder = made(tmp_path, "qwen2", cut=r"\d{2}|\D+")
    with pytest.raises(UnsupportedError, match="no way of cutting that"):
        gguf_tokenizer.describe(text.tokenizer(folder), folder, 300)
    data = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    data["normalizer"] = {"type": "Lowercase"}
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(UnsupportedError, match="its normalizer Lowercase"):
        gguf_tokenizer.describe(text.tokenizer(folder), folder, 300)


def test_a_name_of_phi_3_stays_where_its_tokens_are() -> None:
    tokens = ["</s>", "<unk>", "<s>", "<|endoftext|>"]
    assert gguf_tokenizer.file_name("Phi-3-mini", tokens) == ("Phi-3-mini", None)
    assert gguf_tokenizer.file_name("other", []) == ("other", None)
    name, note = gguf_tokenizer.file_name("my-Phi3-mini", tokens[:3])
    assert name == "my-phi 3-mini"
    assert "`<|endoftext|>`" in str(note)
    assert "`<s>`" not in str(note)

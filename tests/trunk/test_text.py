"""Text: what each source gives, what is refused, and where windows and bytes fall."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unicomp import text
from unicomp.errors import CheckpointError, UnicompError


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A tokenizer with a token for each of the 256 bytes and no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Any:
    """The tokenizer of the tiny models."""
    return text.tokenizer(tiny_tokenizer)


def plain(*documents: str) -> text.Text:
    return text.Text("a", list(documents), "")


def refused(call: Callable[[], object], *parts: str) -> None:
    """Check that the call raises, with every part in its two lines."""
    with pytest.raises(UnicompError) as caught:
        call()
    said = f"{caught.value.message}\n{caught.value.hint}"
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    for part in parts:
        assert part in said


def test_txt_is_one_document_with_the_hash_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\rthree\n")
    found = text.read(str(file))
    assert found.documents == ["one\n\ntwo\nthree\n"]
    assert found.source == "a.txt"
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_jsonl_skips_empty_and_null_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [{"text": "one\r\n"}, {"text": "  "}, {"text": None}, {"text": "two"}]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert text.read(str(file)).documents == ["one\r\n", "two"]


def test_messages_go_through_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    assert text.read(str(file), tokenizer=tokenizer).documents == ["user: hi\n"]
    again = text.read(str(file), field="messages", tokenizer=tokenizer)
    assert again.documents == ["user: hi\n"]
    refused(lambda: text.read(str(file)), "a.jsonl:1", "chat template")
    file.write_text(json.dumps({"messages": ["no message"]}))
    refused(lambda: text.read(str(file), tokenizer=tokenizer), "a.jsonl:1", "`role`")


def test_parquet_reads_one_column(tmp_path: Path, tokenizer: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = tmp_path / "a.parquet"
    chats = [[{"role": "user", "content": word}] for word in ("x", "y")]
    parquet.write_table(arrow.table({"story": ["one", "two"], "messages": chats}), file)
    assert text.read(str(file), field="story").documents == ["one", "two"]
    assert text.read(str(file), tokenizer=tokenizer).documents == ["user: x\n", "user: y\n"]
    refused(lambda: text.read(str(file), field="tale"), "`tale`", "`story`, `messages`")
    file.write_bytes(b"PAR1 no more")
    refused(lambda: text.read(str(file)), "a.parquet")


def test_parquet_without_pyarrow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1")
    refused(lambda: text.read(str(file)), "`pyarrow`", "pip install")


def test_builtin_has_a_text_for_each_purpose() -> None:
    calibration = text.read("builtin:tinyworld")
    score = text.read("builtin:tinyworld", purpose="score")
    assert len(calibration.documents) == 512
    assert len(score.documents) == 1
    assert calibration.source == score.source == "builtin:tinyworld"
    assert calibration.sha256 != score.sha256
    refused(lambda: text.read("builtin:other"), "`builtin:other`", "`builtin:tinyworld`")


def test_hub_files_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unicomp import hub

    files = [tmp_path / name for name in ("b.jsonl", "a.jsonl", "README.md")]
    for file in files:
        file.write_text(json.dumps({"text": file.stem}))
    monkeypatch.setattr(hub, "dataset_files", lambda spec: files)
    found = text.read("hub:org/name")
    assert found.documents == ["b", "a"]
    assert found.source == "hub:org/name"
    both = files[0].read_bytes() + files[1].read_bytes()
    assert found.sha256 == hashlib.sha256(both).hexdigest()
    monkeypatch.setattr(hub, "dataset_files", lambda spec: files[2:])
    refused(lambda: text.read("hub:org/name"), "`hub:org/name`", "parquet")


def test_max_bytes_stops_after_whole_documents(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": word * 10}) for word in "abcd"))
    assert text.read(str(file), max_bytes=15).documents == ["a" * 10, "b" * 10]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"", ["`a.txt` is empty"]),
        ("a.txt", b" \n\t\n", ["`a.txt` is empty"]),
        ("a.jsonl", b"", ["`a.jsonl` is empty"]),
        ("a.jsonl", b'{"text": "  "}', ["`a.jsonl` is empty"]),
        ("a.txt", b"caf\xe9", ["not UTF-8", "byte 3"]),
        ("a.jsonl", b'{"text": "x"}\n{"te', ["a.jsonl:2", "not JSON"]),
        ("a.jsonl", b'{"text": "\xe9"}', ["a.jsonl:1", "not JSON"]),
        ("a.jsonl", b'["x"]', ["a.jsonl:1", "not an object"]),
        ("a.jsonl", b'{"story": "x", "kind": 1}', ["no field `text`", "`story`, `kind`"]),
        ("a.jsonl", b'{"text": 3}', ["a.jsonl:1", "`text`", "int"]),
        ("a.jsonl", b'{"text": "\\ud800"}', ["a.jsonl:1", "surrogate"]),
        ("a.csv", b"x", ["a.csv", "`.jsonl`"]),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, parts: list[str]) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    refused(lambda: text.read(str(file)), *parts)


def test_absent_unreadable_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(lambda: text.read(str(tmp_path / "no.txt")), "no such text", "no.txt")
    refused(lambda: text.read(str(tmp_path)), "folder")
    file = tmp_path / "a.txt"
    file.write_text("x")

    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    refused(lambda: text.read(str(file)), "a.txt", "Permission denied")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    import os

    file = tmp_path / "a.txt"
    os.mkfifo(file)
    refused(lambda: text.read(str(file)), "not a regular file")


def test_tokenizer_errors_name_the_folder(tmp_path: Path) -> None:
    refused(lambda: text.tokenizer(tmp_path), "no tokenizer", str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    refused(lambda: text.tokenizer(tmp_path), "cannot load the tokenizer", str(tmp_path))


def test_encode_joins_by_an_empty_line_and_adds_no_token(tokenizer: Any) -> None:
    found = text.encode(tokenizer, plain("the dog", "a cat"), vocab=128)
    joined = tokenizer("the dog\n\na cat", add_special_tokens=False)["input_ids"]
    assert found.tolist() == joined
    assert found.dtype == torch.int64


def test_encode_in_pieces_is_encode_at_once(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = plain(*["the old man saw a dog."] * 50)
    whole = text.encode(tokenizer, documents, vocab=128)
    weights = text.token_bytes(tokenizer, documents)
    monkeypatch.setattr(text, "_CHUNK", 60)
    assert torch.equal(text.encode(tokenizer, documents, vocab=128), whole)
    again = text.token_bytes(tokenizer, documents)
    assert weights is not None
    assert again is not None
    assert torch.equal(again, weights)


def test_special_tokens_written_out_are_parsed(tokenizer: Any) -> None:
    assert text.encode(tokenizer, plain("<s>a</s>"), vocab=128).tolist()[::2] == [1, 2]


def test_a_vocabulary_that_does_not_fit_is_named(tokenizer: Any) -> None:
    worst = int(text.encode(tokenizer, plain("the dog"), vocab=128).max())
    with pytest.raises(CheckpointError, match=rf"id {worst}, but `vocab_size` is {worst}"):
        text.encode(tokenizer, plain("the dog"), vocab=worst)
    text.encode(tokenizer, plain("the dog"), vocab=worst + 1)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
@example("naïve 日本 🙂🙂 é")
@settings(max_examples=60, deadline=None)
def test_token_bytes_add_up_to_the_text(byte_tokenizer: Any, value: str) -> None:
    found = text.token_bytes(byte_tokenizer, plain(value))
    assert found is not None
    ids = text.encode(byte_tokenizer, plain(value), vocab=256)
    assert found.shape == ids.shape
    assert int(found.sum()) == len(value.encode())
    assert int(found.min()) >= 0


def test_token_bytes_put_a_split_character_at_its_first_token(byte_tokenizer: Any) -> None:
    found = text.token_bytes(byte_tokenizer, plain("aé🙂"))
    assert found is not None
    assert found.tolist() == [1, 2, 0, 4, 0, 0, 0]


def test_token_bytes_are_the_lengths_of_tokens(tokenizer: Any) -> None:
    documents = plain("the other dog", "and then")
    found = text.token_bytes(tokenizer, documents)
    ids = text.encode(tokenizer, documents, vocab=128)
    assert found is not None
    assert found.tolist() == [len(tokenizer.decode([i]).encode()) for i in ids.tolist()]


def test_token_bytes_of_a_slow_tokenizer_are_not_known() -> None:
    class Slow:
        is_fast = False

    assert text.token_bytes(Slow(), plain("a")) is None


def cut(count: int, **options: Any) -> torch.Tensor:
    kept = {"seq_len": 4, "samples": None, "seed": 0, "bos": None} | options
    return text.windows(torch.arange(count), **kept)


def test_windows_are_consecutive_and_whole() -> None:
    assert cut(11).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut(11, bos=99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]


def test_windows_are_drawn_by_seed_without_replacement() -> None:
    drawn = cut(4000, samples=100, seed=1)
    assert torch.equal(drawn, cut(4000, samples=100, seed=1))
    assert not torch.equal(drawn, cut(4000, samples=100, seed=2))
    first = drawn[:, 0].tolist()
    assert first == sorted(set(first))
    assert all(start % 4 == 0 for start in first)
    assert torch.equal(cut(4000, samples=1000), cut(4000))


def test_windows_draw_without_touching_the_global_seed() -> None:
    before = torch.random.get_rng_state()
    cut(4000, samples=10)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("count", "options", "parts"),
    [
        (0, {}, ["empty"]),
        (3, {}, ["3 tokens", "needs 4", "at most 3"]),
        (2, {"bos": 1}, ["2 tokens", "needs 3", "at most 3"]),
        (11, {"samples": 3}, ["2 windows", "`samples` is 3"]),
        (11, {"seq_len": 1}, ["seq_len 1"]),
    ],
)
def test_too_little_text_is_refused(count: int, options: dict[str, Any], parts: list[str]) -> None:
    refused(lambda: cut(count, **options), *parts)


def test_the_hint_of_a_short_text_works() -> None:
    assert len(cut(2, bos=1, seq_len=3)) == 1
    assert len(cut(3, seq_len=3)) == 1


def test_bos_only_where_the_tokenizer_puts_it(tokenizer: Any) -> None:
    from unicomp import builtin

    assert text.bos_token(tokenizer) is None
    assert text.bos_token(text.tokenizer(builtin.model("tinyworld"))) == 1


def test_sentencepiece_bytes_of_a_real_text(assets: Path) -> None:
    found = text.read(str(assets / "text/tinystories/valid.txt"))
    tokenizer = text.tokenizer(assets / "models/stories260K")
    weights = text.token_bytes(tokenizer, found)
    assert weights is not None
    assert int(weights.sum()) == len(found.documents[0].encode())
    assert text.encode(tokenizer, found, vocab=512).shape == weights.shape

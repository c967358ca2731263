"""Which files make a checkpoint; the refusals are in `tests/hostile/test_checkpoints.py`."""

from pathlib import Path

import pytest

from unicomp.errors import CheckpointError
from unicomp.folder import companions, find_weights, parse_json, quote, read_small


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert find_weights(tmp_path) is None


def test_an_index_maps_tensors_to_shards(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    )
    assert find_weights(tmp_path) == {"a": "model-00001-of-00001.safetensors"}


@pytest.mark.parametrize(
    ("name", "belongs"),
    [
        ("config.json", True),
        ("tokenizer.json", True),
        ("tokenizer_config.json", True),
        ("special_tokens_map.json", True),
        ("added_tokens.json", True),
        ("vocab.txt", True),
        ("merges.txt", True),
        ("tokenizer.model", True),
        ("sentencepiece.bpe.model", True),
        ("chat_template.jinja", True),
        ("additional_chat_templates/tool_use.jinja", True),
        ("preprocessor_config.json", True),
        ("LICENSE", True),
        ("README.md", False),
        ("unicomp.json", False),
        ("report.json", False),
        ("quantize_config.json", False),
        ("tokenization_custom.py", False),
        ("model.safetensors", False),
        ("pytorch_model.bin.index.json", False),
        ("original/tokenizer.model", False),
    ],
)
def test_what_belongs_beside_the_weights(tmp_path: Path, name: str, belongs: bool) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    assert companions(tmp_path) == ([name] if belongs else [])


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("model.layers.0.weight", "model.layers.0.weight"),
        ("größe", "größe"),
        ("a\nb", "a\\nb"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202eabc", "\\u202eabc"),
        ("x" * 201, "x" * 200 + "..."),
    ],
)
def test_names_are_shown_in_one_harmless_line(name: str, shown: str) -> None:
    assert quote(name) == shown


def test_small_files_are_small(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(CheckpointError, match=r"5 bytes are over the limit of 4 bytes"):
        read_small(path, 4)


def test_json_keys_stand_once(tmp_path: Path) -> None:
    assert parse_json(tmp_path, b'{"a": {"b": 1}, "c": {"b": 2}}') == {"a": {"b": 1}, "c": {"b": 2}}
    with pytest.raises(CheckpointError, match="`b` stands twice"):
        parse_json(tmp_path, b'{"a": {"b": 1, "b": 1}}')

"""What is hashed ahead is what is hashed when asked, and never an older file's."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from unicomp import hashing


def digest(data: bytes) -> hashing.Digest:
    """Return what the standard library says."""
    return hashing.Digest(hashlib.sha256(data).hexdigest(), len(data))


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 10_000])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_digest_is_that_of_all_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, ahead: bool
) -> None:
    monkeypatch.setattr(hashing, "PIECE", 4096)
    file, data = tmp_path / "a", os.urandom(size)
    file.write_bytes(data)
    if ahead:
        hashing.begin([file])
    assert hashing.of_file(file) == digest(data)
    assert hashing.of_file(file) != digest(data + b"x")
    assert file not in {path for path, *_ in hashing._begun}


def test_several_are_hashed_in_turn_and_one_that_is_not_there_is_left(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(file.name.encode() * 100)
    hashing.begin([tmp_path / "none", *files])
    for file in reversed(files):
        assert hashing.of_file(file) == digest(file.name.encode() * 100)
    with pytest.raises(FileNotFoundError):
        hashing.of_file(tmp_path / "none")


def test_what_is_begun_twice_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process may run two commands on one file, of which the first never asked for it."""
    reads: list[Path] = []
    read = hashing._read

    def counted(path: Path) -> hashing.Digest:
        reads.append(path)
        return read(path)

    failed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    monkeypatch.setattr(hashing, "_read", counted)
    file = tmp_path / "a"
    file.write_bytes(b"one")
    for _ in range(2):
        hashing.begin([file])
        for thread in threading.enumerate():
            if thread.name == "hashing":
                thread.join()
    assert hashing.of_file(file) == digest(b"one")
    assert reads == [file]
    assert not failed


def test_a_file_that_changed_since_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(b"one")
    hashing.begin([file])
    file.write_bytes(b"three")
    assert hashing.of_file(file) == digest(b"three")
    hashing._begun.clear()


def test_what_cannot_be_read_is_said_when_asked(tmp_path: Path) -> None:
    hashing.begin([tmp_path])
    with pytest.raises(IsADirectoryError):
        hashing.of_file(tmp_path)

"""A finished folder gets its name whole, or the one that had it keeps it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unicomp import writer
from unicomp.errors import UnicompError
from unicomp.writer import check_target, publish


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(text)
    return folder


def test_publish_gives_the_name(tmp_path: Path) -> None:
    partial = make(tmp_path / "out.partial", "new")
    (partial / "card.md.new").write_text("half")
    publish(partial, tmp_path / "out", overwrite=False)
    assert snapshot(tmp_path / "out") == {"config.json": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_publish_refuses_a_name_that_is_taken(tmp_path: Path) -> None:
    partial, final = make(tmp_path / "out.partial", "new"), make(tmp_path / "out", "old")
    with pytest.raises(UnicompError, match="exists") as caught:
        publish(partial, final, overwrite=False)
    assert "--overwrite" in (caught.value.hint or "")
    assert snapshot(final) == {"config.json": b"old"}


def test_publish_overwrites_when_told_to(tmp_path: Path) -> None:
    partial, final = make(tmp_path / "out.partial", "new"), make(tmp_path / "out", "old")
    publish(partial, final, overwrite=True)
    assert snapshot(final) == {"config.json": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_replaced_and_what_it_points_to_is_kept(tmp_path: Path) -> None:
    partial, target = make(tmp_path / "out.partial", "new"), make(tmp_path / "target", "old")
    (tmp_path / "out").symlink_to("target")
    publish(partial, tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == {"config.json": b"new"}
    assert snapshot(target) == {"config.json": b"old"}


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_no_checkpoint_is_never_overwritten(tmp_path: Path, kind: str) -> None:
    partial, final = make(tmp_path / "out.partial", "new"), tmp_path / "out"
    if kind == "file":
        final.write_text("thesis")
    else:
        final.mkdir()
        (final / "thesis.tex").write_text("thesis")
    for call in (
        lambda: check_target(final, overwrite=True),
        lambda: publish(partial, final, overwrite=True),
    ):
        with pytest.raises(UnicompError, match="is not a checkpoint folder"):
            call()


@pytest.mark.parametrize("step", range(4))
def test_publish_survives_a_kill_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Under the final name stands the old folder, nothing, or the whole new one; then go on."""
    partial, final = make(tmp_path / "out.partial", "new"), make(tmp_path / "out", "old")
    rename, remove = Path.rename, writer._remove
    left = [step]

    class Killed(BaseException):
        """Not an Exception: nothing may tidy up after a kill."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return call(*arguments)

        return wrapped

    monkeypatch.setattr(Path, "rename", counted(rename))
    monkeypatch.setattr(writer, "_remove", counted(remove))
    with pytest.raises(Killed):
        publish(partial, final, overwrite=True)
    monkeypatch.undo()
    stands = snapshot(final) if final.exists() else None
    assert stands in ({"config.json": b"old"}, None, {"config.json": b"new"})
    if not partial.exists():
        assert stands == {"config.json": b"new"}
        make(partial, "newer")
    else:
        (partial / "config.json").write_text("newer")
    publish(partial, final, overwrite=True)
    assert snapshot(final) == {"config.json": b"newer"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_comes_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial, final = make(tmp_path / "out.partial", "new"), make(tmp_path / "out", "old")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path == partial:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UnicompError, match="cannot be written"):
        publish(partial, final, overwrite=True)
    assert snapshot(final) == {"config.json": b"old"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


def test_a_target_may_be_new_or_empty(tmp_path: Path) -> None:
    check_target(tmp_path / "a" / "b", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_target(tmp_path / "empty", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UnicompError, match=r"`.*file` is not a folder"):
        check_target(tmp_path / "file" / "out", overwrite=False)

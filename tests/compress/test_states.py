"""Activations come back as they were written, in any batches, from a file or from memory."""

from pathlib import Path

import pytest
import torch

from unicomp.compress.states import HiddenStates
from unicomp.errors import CheckpointError

SHAPE = (7, 5, 3)  # no batch of it begins at a page


@pytest.mark.parametrize("size", [1, 2, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("file", [True, False])
def test_windows_come_back(tmp_path: Path, file: bool, dtype: torch.dtype, size: int) -> None:
    states = HiddenStates(tmp_path / "states" if file else None, SHAPE, dtype)
    wanted = torch.randn(SHAPE).to(dtype)
    with states.filling() as put:
        for some in wanted.split(2):
            put(some)
    found = list(states.batches(size))
    assert [len(some) for some in found] == [len(some) for some in wanted.split(size)]
    assert torch.equal(torch.cat(found), wanted)


def test_batches_far_into_a_file_and_what_is_done_to_them(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "states", (9, 31, 77))
    wanted = torch.randn(9, 31, 77)
    crc = states.write(iter(wanted.split(4)))
    for some, own in zip(states.batches(2), wanted.split(2), strict=True):
        assert torch.equal(some, own)
        some.zero_()
    assert states.crc32() == crc


def test_a_file_that_is_too_short_is_told(tmp_path: Path) -> None:
    states = HiddenStates(tmp_path / "states", SHAPE)
    states.write(iter([torch.zeros(SHAPE)]))
    (tmp_path / "states").write_bytes((tmp_path / "states").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="shorter than 420 bytes"):
        next(states.batches(2))

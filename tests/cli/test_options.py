"""The shared options: SIZE is a usage error where it is wrong, and `--quiet` acts at once."""

import pytest
import typer

from unicomp.cli import options


def test_size() -> None:
    assert options.parse_size("512MiB") == 1 << 29
    with pytest.raises(typer.BadParameter, match="write `8GB`"):
        options.parse_size("8G")

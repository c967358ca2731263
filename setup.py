"""Refuse to build from a checkout that lost its symbolic links."""

from pathlib import Path

from setuptools import setup

if not Path("src/unicomp/kernels").is_dir():
    raise SystemExit(
        "error: src/unicomp/kernels is not a link to kernels/: "
        "this checkout lost its symbolic links\n\n"
        "hint: clone with `git clone -c core.symlinks=true`, or build from the sdist or a .tar.gz"
    )

setup()

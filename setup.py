"""Build the C kernels where there is a compiler; refuse a checkout that lost its links."""

import os
from pathlib import Path

from setuptools import Extension, setup

CSRC = Path("src/unicomp/kernels/csrc")  # through the link, as the archive carries it

if not CSRC.is_dir():
    raise SystemExit(
        "error: src/unicomp/kernels is not a link to kernels/: "
        "this checkout lost its symbolic links\n\n"
        "hint: clone with `git clone -c core.symlinks=true`, or build from the sdist or a .tar.gz"
    )

# No debug information: it would carry the path of the build. `CFLAGS` of one's own come instead.
OPTIMIZE = [] if "CFLAGS" in os.environ else ["-O3", "-g0"]

setup(
    ext_modules=[
        Extension(
            "unicomp.kernels._cpu",
            sources=sorted(map(str, CSRC.glob("*.c"))),
            depends=sorted(map(str, CSRC.glob("*.h"))),
            # The files' flags stay at the ABI floor: wide functions name what they need themselves.
            extra_compile_args=[
                *"-std=c11 -ffp-contract=off -Wall -Wextra -pthread -fvisibility=hidden".split(),
                *OPTIMIZE,
            ],
            extra_link_args=["-pthread"],
            libraries=["m"],
            py_limited_api=True,
            optional=True,  # without a compiler the products run in torch
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)

"""Draw docs/scorecard.png again: `.venv/bin/python benchmarks/scorecard_picture.py [WORK]`.

Rounds the embedded model to 3 bits, scores it with the quick suite beside the original (two minutes
on one core, resumable), and lets Chromium, which must be installed, take a picture of the page.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from unicomp.cli.main import exit_code

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "scorecard.png"
SIZE = (1280, 2100)
BASE = "builtin:tinyworld"
ROUNDING = ["--method", "rtn", "--bits", "3", "--group-size", "-1", "--scale-search", "minmax"]
GATED = (0, 3, 4)


def main(work: Path) -> int:
    """Make the page and its picture, and return the exit code."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        print(
            "error: no chromium\nhint: install it, as Debian's package `chromium`", file=sys.stderr
        )
        return 1
    model, page = work / "tinyworld-w3", work / "page.html"
    if not model.is_dir():
        code = exit_code(["quantize", BASE, *ROUNDING, "--out", str(model)])
        if code:
            return code
    asked = ["--baseline", BASE, "--suite", "quick", "--gate", "default", "--html", str(page)]
    code = exit_code(["score", str(model), *asked])
    if code not in GATED:
        return code
    subprocess.run(
        [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={work / 'browser'}",
            f"--window-size={SIZE[0]},{SIZE[1]}",
            f"--screenshot={PICTURE}",
            page.resolve().as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(*sys.argv[1:2] or ["out/scorecard"])))

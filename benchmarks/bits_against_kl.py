"""How much is lost at each width: KL to the base against bits per weight, GPTQ beside rounding.

Runs the commands that a user would, on the embedded model, and stores what they say: the figures in
`benchmarks/results/bits_against_kl.json`, the picture in `docs/bits_against_kl.svg`.

    python benchmarks/bits_against_kl.py            # measure and draw, some minutes on two cores
    python benchmarks/bits_against_kl.py --draw     # draw again from the stored figures
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/bits_against_kl.json"
PICTURE = ROOT / "docs/bits_against_kl.svg"

MODEL = "builtin:tinyworld"
BITS = (2, 3, 4, 5, 6, 8)
CALIBRATION = "--calibration builtin:tinyworld --samples 128 --seq-len 256 --seed 0"
METHODS = {
    "rtn": "--method rtn --group-size -1 --scale-search minmax",
    "gptq": f"--method gptq --group-size -1 --order act --scale-search mse {CALIBRATION}",
}
NAMES = {"rtn": "round to nearest, min-max scales", "gptq": "GPTQ, act order, MSE scales"}
SCORE = f"--baseline {MODEL} --axes accuracy,fidelity,efficiency --text {MODEL} --json"
WANTED = ("fidelity/kl", "fidelity/top1_agreement", "accuracy/perplexity")
WANTED += ("efficiency/bits_per_weight", "efficiency/disk_bytes")

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 98, 24, 56, 60
COLOURS = {"rtn": "#8a6d3b", "gptq": "#1f6feb"}


def unicomp(words: str) -> dict[str, Any]:
    """Run one command and return the JSON object that it prints."""
    command = [sys.executable, "-m", "unicomp", *words.split()]
    answer = subprocess.run(command, stdout=subprocess.PIPE, check=True, cwd=ROOT)
    value: dict[str, Any] = json.loads(answer.stdout)
    return value


def measure() -> dict[str, Any]:
    """Quantize and score every width with every method."""
    points = []
    report: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method, options in METHODS.items():
            for bits in BITS:
                out = f"{folder}/{method}-{bits}"
                command = f"quantize {MODEL} {options} --bits {bits} --quiet"
                unicomp(f"{command} --out {out} --json")
                report = unicomp(f"score {out} {SCORE} --quiet")
                scores = {s["name"]: s for s in report["scores"] if s["name"] in WANTED}
                point = {name: scores[name]["value"] for name in WANTED}
                points.append(
                    {"method": method, "bits": bits, "command": f"unicomp {command} --out DIR"}
                    | point
                    | {"kl_ci95": scores["fidelity/kl"]["ci95"]}
                )
                print(f"{method} {bits} bits: KL {point['fidelity/kl']:.5f}", file=sys.stderr)
    return {
        "question": "how much is lost at each width",
        "score": f"unicomp score DIR {SCORE}",
        "machine": report["machine"],
        "versions": report["versions"],
        "points": points,
    }


def scale(low: float, high: float, start: float, stop: float) -> Any:
    """Return the linear map of [low, high] to [start, stop]."""
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def draw(points: Iterable[Mapping[str, Any]]) -> str:
    """Return the picture as SVG text: KL on a logarithmic axis against bits per weight."""
    points = list(points)
    widths = [p["efficiency/bits_per_weight"] for p in points]
    powers = [math.log10(p["fidelity/kl"]) for p in points]
    low, high = math.floor(min(powers) - 0.3), math.ceil(max(powers))
    x = scale(math.floor(min(widths)), math.ceil(max(widths)), LEFT, WIDTH - RIGHT)
    y = scale(low, high, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13" role="img" '
        'aria-label="KL divergence to the base against bits per weight, two methods">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="24" font-size="16" font-weight="600" fill="#1f2328">'
        "What each bit costs: builtin:tinyworld, one scale per channel</text>",
    ]
    for power in range(low, high + 1):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(power):.1f}" y2="{y(power):.1f}" '
            f'stroke="#d8dee4"/><text x="{LEFT - 8}" y="{y(power) + 4:.1f}" text-anchor="end" '
            f'fill="#57606a">{10.0**power:.{max(0, -power)}f}</text>'
        )
    for width in range(math.floor(min(widths)), math.ceil(max(widths)) + 1):
        parts.append(
            f'<text x="{x(width):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle" '
            f'fill="#57606a">{width}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 14}" text-anchor="middle" '
        'fill="#1f2328">bits per weight, embedding and scales included</text>'
        f'<text transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" '
        'text-anchor="middle" fill="#1f2328">KL to the base, nats per token</text>'
    )
    for row, method in enumerate(METHODS):
        mine = sorted(
            (p["efficiency/bits_per_weight"], math.log10(p["fidelity/kl"]), p["bits"])
            for p in points
            if p["method"] == method
        )
        colour = COLOURS[method]
        line = " ".join(f"{x(width):.1f},{y(power):.1f}" for width, power, _ in mine)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for width, power, bits in mine:
            above = -10 if method == "rtn" else 20
            parts.append(
                f'<circle cx="{x(width):.1f}" cy="{y(power):.1f}" r="4" fill="{colour}"/>'
                f'<text x="{x(width):.1f}" y="{y(power) + above:.1f}" text-anchor="middle" '
                f'font-size="11" fill="{colour}">{bits} bit</text>'
            )
        parts.append(
            f'<text x="{WIDTH - RIGHT}" y="{TOP + 18 + 20 * row}" text-anchor="end" '
            f'font-weight="600" fill="{colour}">{NAMES[method]}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Measure unless asked only to draw; store both files."""
    if "--draw" not in sys.argv[1:]:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
    PICTURE.write_text(draw(json.loads(RESULTS.read_text("utf-8"))["points"]), encoding="utf-8")
    print(f"{RESULTS.relative_to(ROOT)}\n{PICTURE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

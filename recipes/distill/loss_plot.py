"""The loss of a training as a picture: SVG as text, with the held-out KL beside it."""

from collections.abc import Sequence
from html import escape

from unicomp.compress.distill.training.figures import Figures

WIDTH, HEIGHT = 640.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 12.0, 14.0, 34.0
MOST = 600  # points of a curve; more are not seen


def loss_plot(losses: Sequence[tuple[int, float]], measured: Sequence[tuple[int, Figures]]) -> str:
    """Return an SVG of the loss and the held-out KL over the steps, both in nats a token."""
    loss = _thinned(losses)
    apart = [(step, figures.kl) for step, figures in measured]
    steps = max((step for step, _ in (*loss, *apart)), default=1) or 1
    top = max((value for _, value in (*loss, *apart)), default=1.0) or 1.0
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape('Loss of the training, and KL to the teacher on held-out text')}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _up(share)
        parts.append(
            f'<path d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}" stroke="#ddd"/>'
            f'<text x="{LEFT - 6:g}" y="{y + 4:.1f}" text-anchor="end">{share * top:.3g}</text>'
        )
        parts.append(
            f'<text x="{_across(share):.1f}" y="{HEIGHT - 12:g}" text-anchor="middle">'
            f"{round(share * steps)}</text>"
        )
    for points, colour, word, dash in (
        (loss, "#1f6fb2", "loss", ""),
        (apart, "#b24a1f", "held-out KL", ' stroke-dasharray="5 3"'),
    ):
        if points:
            way = " ".join(
                f"{_across(step / steps):.1f},{_up(value / top):.1f}" for step, value in points
            )
            parts.append(
                f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}>'
                f"<title>{word}</title></polyline>"
            )
            x = LEFT + 14 + 90 * (word != "loss")
            parts.append(f'<text x="{x:g}" y="{TOP + 12:g}" fill="{colour}">{word}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return means of neighbours, so that there are no more points than are seen."""
    size = max(1, -(-len(points) // MOST))
    found = []
    for start in range(0, len(points), size):
        some = points[start : start + size]
        found.append((some[-1][0], sum(value for _, value in some) / len(some)))
    return found


def _across(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def _up(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

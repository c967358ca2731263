"""The page of one report: what got worse, every score with its interval, and how it looks.

What a report does not hold is not on its page: plots appear where their scores were measured, and a
score without a value says why.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unicomp import size
from unicomp.evaluate.page import plots, training
from unicomp.evaluate.page.sheet import Markup, badge, figure, markup, number, page, span, table
from unicomp.evaluate.scores import Report, Score
from unicomp.evaluate.verdicts.change import change
from unicomp.evaluate.verdicts.gates import OUTCOMES, matches
from unicomp.manifest import Stage

ABOUT = {
    "accuracy": "What the model gets right, and how well it predicts text.",
    "fidelity": "How far its answers moved from the baseline's, right or wrong.",
    "calibration": "Whether it is as often right as it is sure.",
    "safety": "Whether it still refuses harmful requests, and still helps with safe ones.",
    "efficiency": "What it takes on this machine.",
}
SHARES = (
    "accuracy/*/acc",
    "accuracy/*/exact_match",
    "safety/refusal_rate",
    "safety/over_refusal_rate",
    "safety/prefill_refusal_rate",
    "safety/truthfulness",
)
"""Scores that the plot of before and after shows."""
DISK = "efficiency/disk_bytes"
QUALITY = ("accuracy/perplexity", "accuracy/*/acc")
FIRST = {
    "efficiency/disk_bytes": "on disk",
    "efficiency/bits_per_weight": "bits per weight",
    "accuracy/perplexity": "perplexity",
    "fidelity/kl": "KL, nats a token",
    "calibration/ece": "calibration error",
    "safety/refusal_rate": "refusals of harm",
}
"""A score of each axis, to be seen first; all of them, because none stands for another."""
FRONTS = 4  # plots of size against quality, at most
KINDS = {"choices": "calibration/ece", "tokens": "calibration/token_ece"}
FLIPS = {
    "safety/harmful_flips": "Refused by the baseline, not by the model",
    "safety/benign_flips": "Helped with by the baseline, refused by the model",
}


def render(report: Report, stages: Sequence[Stage] = ()) -> str:
    """Return the page of a report; stages are those that made the model, if that is known."""
    beside = "" if report.baseline is None else f" beside {report.baseline.id}"
    parts = [
        f"<h1>{markup(report.model.id)}</h1>",
        f'<p class="soft">{markup("unicomp scorecard" + beside)}</p>',
        *_first(report),
        *_worse(report),
        *_gates(report),
        *_figures(report),
    ]
    for axis, about in ABOUT.items():
        scores = [score for score in report.scores if score.axis == axis]
        if scores:
            parts += [f"<h2>{axis.capitalize()}</h2>", f'<p class="soft">{about}</p>']
            parts += [_scores(scores, report.baseline is not None), *_reasons(scores)]
        if axis == "safety":
            parts += _examples(scores)
    parts += training.section(stages)
    parts.append(_foot(report))
    return page(f"{report.model.id}{beside}", parts)


def _first(report: Report) -> list[str]:
    """Return one tile for the gates and one for each of `FIRST` that has a value."""
    tiles = []
    if report.gates:
        outcomes = [verdict["outcome"] for verdict in report.gates]
        worst = next(own for own in OUTCOMES if own in outcomes)
        tiles.append(_tile("gates", badge(worst), f"{outcomes.count(worst)} of {len(outcomes)}"))
    found = {score.name: score for score in report.scores if score.value is not None}
    for name, label in FIRST.items():
        if name in found:
            score = found[name]
            was = "" if score.baseline is None else f"was {_shown(score, score.baseline)}"
            worse = f" {badge('worse')}" if change(score) == "worse" else ""
            value = Markup(f"{markup(_shown(score, score.value))}{worse}")
            tiles.append(_tile(label, value, was))
    return [f'<div class="tiles">{"".join(tiles)}</div>'] if tiles else []


def _tile(label: str, value: Markup, below: str) -> str:
    said = f"<small>{markup(below)}</small>" if below else ""
    return f'<p class="card"><small>{markup(label)}</small><b>{value}</b>{said}</p>'


def _worse(report: Report) -> list[str]:
    """Say first what got worse; nothing else on the page makes up for it."""
    if report.baseline is None:
        return ["<p>No baseline was given, so nothing here says what compression changed.</p>"]
    found = [score for score in report.scores if change(score) == "worse"]
    if not found:
        return ["<p>No score is worse than the baseline's by more than its interval.</p>"]
    said = [
        f"<li><code>{markup(score.name)}</code> <span>{_shown(score, score.baseline)} &rarr; "
        f"{_shown(score, score.value)}</span></li>"
        for score in found
    ]
    head = f"<h2>{len(found)} of {len(report.scores)} scores got worse</h2>"
    return [head, f'<ul class="worse-list">{"".join(said)}</ul>']


def _gates(report: Report) -> list[str]:
    if not report.gates:
        return []
    ordered = sorted(report.gates, key=lambda verdict: OUTCOMES.index(verdict["outcome"]))
    rows = []
    for verdict in ordered:
        bound = f"{verdict['check']} {number(verdict['limit'])}" if verdict["check"] else ""
        interval = verdict["interval"]
        found = number(verdict["value"])
        rows.append(
            [
                Markup(f"<code>{markup(verdict['score'])}</code>"),
                badge(verdict["outcome"]),
                bound,
                _two(found, span(None if interval is None else (interval[0], interval[1]))),
                number(verdict["detectable"]),
                verdict["reason"] or "",
            ]
        )
    columns = ["score", "verdict", "bound", "found, 95%", "would have seen", "why"]
    outcomes = [verdict["outcome"] for verdict in ordered]
    counts = [f"{outcomes.count(own)} {own}" for own in OUTCOMES if own in outcomes]
    return [f"<h2>Gates: {', '.join(counts)}</h2>", table(columns, rows)]


def _scores(scores: Sequence[Score], compared: bool) -> str:
    columns = ["score", "value, 95%", "unit", "n"]
    if compared:
        columns[2:2] = ["baseline", "difference, 95%", "change"]
    rows = []
    for score in scores:
        value = badge(score.status) if score.value is None else _shown(score, score.value)
        if score.status == "estimated":
            value = Markup(f"{value} {badge('estimated')}")
        row: list[str] = [
            Markup(f"<code>{markup(score.name.partition('/')[2])}</code>"),
            _two(value, span(score.ci95)),
            score.unit,
            "" if score.n is None else f"{score.n:,}",
        ]
        if compared:
            moved = change(score)
            row[2:2] = [
                _shown(score, score.baseline),
                _two(_shown(score, score.delta), span(score.delta_ci95)),
                "" if moved is None else badge(moved),
            ]
        rows.append(row)
    return table(columns, rows)


def _reasons(scores: Sequence[Score]) -> list[str]:
    said: dict[str, list[str]] = {}
    for score in scores:
        if "reason" in score.detail:
            reason = f"{score.status}: {score.detail['reason']}"
            said.setdefault(reason, []).append(score.name.partition("/")[2])
    return [
        f'<p class="soft"><code>{markup(", ".join(names))}</code> {markup(reason)}</p>'
        for reason, names in said.items()
    ]


def _figures(report: Report) -> list[str]:
    """Return the plots that the report has values for."""
    found = {score.name: score for score in report.scores if score.value is not None}
    made = _before_after(report)
    for name, of in (("choices", "answers to questions"), ("tokens", "next tokens")):
        score = found.get(KINDS[name])
        if score is not None and "diagram" in score.detail:
            made.append(_reliability(score, of))
    for score in _layered(report.scores):
        made.append(
            figure(
                "Error by layer",
                plots.steps(
                    score.detail["layers"], "layer", "relative error", "error by layer", first=1
                ),
                "How far the hidden states are from the baseline's after each layer.",
            )
        )
    kl = found.get("fidelity/kl")
    if kl is not None and "positions" in kl.detail:
        made.append(
            figure(
                "Divergence by position",
                plots.steps(kl.detail["positions"], "part of the window", "nats", "KL by position"),
                f"KL from the baseline, mean over {kl.detail['position_step']} tokens each.",
            )
        )
    made += _fronts(report)
    return ["<h2>At a glance</h2>", f'<div class="figures">{"".join(made)}</div>'] if made else []


def _before_after(report: Report) -> list[str]:
    marks = [
        plots.Mark(
            score.name.partition("/")[2],
            score.baseline,
            score.value,
            score.ci95,
            change(score) == "worse",
        )
        for score in report.scores
        if score.value is not None and any(matches(pattern, score.name) for pattern in SHARES)
    ]
    if not marks:
        return []
    said = "diamonds: the model, with its 95% interval"
    if report.baseline is not None:
        said += "; circles: the baseline"
    plot = plots.dumbbells(marks, "before and after")
    return [figure("Before and after" if report.baseline else "Shares", plot, said)]


def _reliability(score: Score, of: str) -> str:
    base = score.detail.get("baseline_diagram") or []
    said = "Below the broken line, it is surer than right. Larger marks: more predictions."
    if base:
        said += " Circles: the baseline."
    plot = plots.reliability(score.detail["diagram"], base, f"reliability of {of}")
    return figure(f"Reliability of {of}", plot, said)


def _layered(scores: Sequence[Score]) -> list[Score]:
    return [score for score in scores if score.detail.get("layers")]


def _fronts(report: Report) -> list[str]:
    """Draw size against quality, the model beside its baseline."""
    disk = next((score for score in report.scores if score.name == DISK), None)
    if disk is None or disk.value is None or disk.baseline is None or report.baseline is None:
        return []
    made = []
    for score in report.scores:
        if score.value is None or score.baseline is None:
            continue
        if not any(matches(pattern, score.name) for pattern in QUALITY):
            continue
        points = [
            (report.model.id, disk.value, score.value),
            (report.baseline.id, disk.baseline, score.baseline),
        ]
        made.append(front(points, DISK, score.name, higher=score.higher_is_better))
    return made[:FRONTS]


def front(points: Sequence[tuple[str, float, float]], x: str, y: str, *, higher: bool) -> str:
    """Return the plot of models by size and a score; smaller is better in x.

    points  name, x and y
    higher  a higher y is better
    """
    sign = 1 if higher else -1

    def outdone(at: int) -> bool:
        _, a, b = points[at]
        return any(c <= a and sign * d >= sign * b and (c, d) != (a, b) for _, c, d in points)

    marked = [plots.Point(*point, best=not outdone(at)) for at, point in enumerate(points)]
    name = y.partition("/")[2]
    shown: Callable[[float], str] = _size if x == DISK else number
    plot = plots.scatter(marked, x.partition("/")[2], name, f"size against {name}", shown)
    better = "higher" if higher else "lower"
    said = f"Diamonds: no other is smaller and better at once ({better} is better)."
    return figure(f"Size and {name}", plot, said)


def _size(value: float) -> str:
    return size.show(int(value))


def _examples(scores: Sequence[Score]) -> list[str]:
    """Show what the model said where it changed its mind."""
    parts = []
    for score in scores:
        examples: Sequence[Mapping[str, Any]] = score.detail.get("examples") or ()
        if score.name not in FLIPS or not examples:
            continue
        parts.append(
            f"<h3>{FLIPS[score.name]}: {score.detail['yes']} of {score.n}</h3>"
            f'<p class="soft">The first {len(examples)}.</p><div class="figures">'
        )
        for example in examples:
            said = [
                f'<p class="soft">{who}</p><blockquote>{markup(example[who])}</blockquote>'
                for who in ("baseline", "model")
            ]
            head = f"<b>{markup(example['prompt'])}</b>"
            parts.append(f'<div class="card">{head}{"".join(said)}</div>')
        parts.append("</div>")
    return parts


def _shown(score: Score, value: float | None) -> str:
    if value is None:
        return ""
    return size.show(value) if score.unit == "bytes" else number(value)


def _two(value: str, below: str) -> Markup:
    return Markup(
        f"<span>{markup(value)}{f'<small>{markup(below)}</small>' if below else ''}</span>"
    )


def _foot(report: Report) -> str:
    said = [f"{key} {value}" for key, value in {**report.versions, **report.machine}.items()]
    seeds = ", ".join(f"{key} {value}" for key, value in report.seeds.items())
    return (
        "<footer><p>Intervals are at 95%; a change is called worse or better only where the "
        "interval of the difference leaves out zero. With many scores, one in twenty does so by "
        "chance.</p>"
        f"<p>{markup('; '.join(map(str, said)))}; seeds: {markup(seeds)}</p></footer>"
    )

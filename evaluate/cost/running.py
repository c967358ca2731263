"""What a model takes while it runs: load time, peak memory, prefill, decode and energy.

Each model is measured in a process of its own, so that the peak is this model's and nothing else
is in memory. Prefill and decode are apart, each the median of rounds after a warm-up, with the
interval that its order statistics give (exact whatever the distribution). Loading is timed with
files in the system's cache.

    python -m unicomp.evaluate.cost.running '{"path": ..., ...}'     prints one JSON object
"""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from unicomp.checkpoint import Checkpoint
from unicomp.errors import UnicompError
from unicomp.evaluate.cost import energy, speed
from unicomp.evaluate.scores import Interval, Score, Status, measured, missing
from unicomp.evaluate.statistics.proportions import binomial
from unicomp.evaluate.statistics.reliability import apart
from unicomp.hub import resolve
from unicomp.kernels.blocked import Compute
from unicomp.kernels.packed_model import load

PROMPT_TOKENS = 512
NEW_TOKENS = 64
ROUNDS = 7
SECONDS = 1800  # after which a measurement is given up
PER = 1_000_000  # tokens that grams of CO2 are said for

KINDS = {
    "efficiency/load_s": ("s", False),
    "efficiency/peak_rss_bytes": ("bytes", False),
    "efficiency/prefill_tokens_per_s": ("tokens/s", True),
    "efficiency/decode_tokens_per_s": ("tokens/s", True),
    "efficiency/energy_j_per_token": ("J/token", False),
    "efficiency/co2_g_per_million_tokens": ("g", False),
}


@dataclass(frozen=True, slots=True)
class Run:
    """One model's figures, as plain values.

    energy  joules per decoded token, one per round; or why there are none
    """

    load_s: list[float]
    prefill: list[float]
    decode: list[float]
    peak_rss_bytes: int
    energy: list[float] | str
    meter: str | None
    detail: dict[str, Any]


_NOTHING = Run([], [], [], 0, "", None, {})


def measure(path: str, *, compute: Compute = "int8", rounds: int = ROUNDS) -> Run:
    """Measure a model in a process of its own.

    path  a folder, a Hub id or `builtin:NAME`

    Raises UnicompError with what that process said where it fails.
    """
    words = json.dumps({"path": str(path), "compute": compute, "rounds": rounds})
    command = [sys.executable, "-m", "unicomp.evaluate.cost.running", words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise UnicompError(
            f"measuring `{path}` took more than {SECONDS} s", hint="leave out `efficiency`"
        ) from error
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UnicompError(f"measuring `{path}` failed: {said}", hint="try `unicomp bench model`")
    return Run(**json.loads(lines[-1]))


def here(path: str, *, compute: Compute = "int8", rounds: int = ROUNDS) -> Run:
    """Measure a model in this process."""
    config = Checkpoint.open(resolve(path).folder).config
    context = config.get("max_position_embeddings")
    new = NEW_TOKENS if context is None else max(2, min(NEW_TOKENS, int(context) // 4))
    prompt = PROMPT_TOKENS if context is None else min(PROMPT_TOKENS, int(context) - new)
    found = speed.model(path, compute=compute, rounds=rounds, prompt_tokens=prompt, new_tokens=new)
    loads = []
    network: Any = None
    for _ in range(3):
        began = time.perf_counter()
        network = load(path, compute=compute)
        loads.append(time.perf_counter() - began)
    meter = energy.find(network.device.type)
    used: list[float] | str
    used = meter if isinstance(meter, str) else _joules(network, meter, new, rounds)
    return Run(
        load_s=loads,
        prefill=found["prefill_tokens_per_s"]["rounds"],
        decode=found["decode_tokens_per_s"]["rounds"],
        peak_rss_bytes=found["peak_rss_bytes"]["run"],
        energy=used,
        meter=None if isinstance(meter, str) else meter.name,
        detail={
            "compute": compute,
            "prompt_tokens": prompt,
            "new_tokens": new,
            "rounds": rounds,
            "threads": found["threads"],
            "share_of_read": found["share_of_read"],
        },
    )


def scores(
    ours: Run | str,
    theirs: Run | str | None = None,
    *,
    power: float | None = None,
    grams_per_kwh: float = energy.GRAMS_PER_KWH,
    pue: float = energy.PUE,
) -> list[Score]:
    """Return every score of `KINDS`.

    ours, theirs  what was measured, or why nothing was
    power         watts that the machine takes while it decodes, for an estimate where no meter is
    """
    if isinstance(ours, str):
        return [_missing(name, ours, "unmeasurable") for name in KINDS]
    base = None if isinstance(theirs, str) else theirs
    other = _NOTHING if base is None else base
    found = [
        _median("efficiency/load_s", ours.load_s, other.load_s, ours.detail),
        measured(
            "efficiency/peak_rss_bytes",
            ours.peak_rss_bytes,
            unit="bytes",
            higher_is_better=False,
            baseline=None if base is None else base.peak_rss_bytes,
            detail=ours.detail,
        ),
        _median("efficiency/prefill_tokens_per_s", ours.prefill, other.prefill, ours.detail),
        _median("efficiency/decode_tokens_per_s", ours.decode, other.decode, ours.detail),
    ]
    return [*found, *_energy(ours, base, power, grams_per_kwh, pue)]


def skipped(reason: str) -> list[Score]:
    """Return the same scores as not asked for."""
    return [_missing(name, reason) for name in KINDS]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Return the narrowest pair of order statistics that holds the median as often as asked.

    None where not even the least and the greatest do: with five values or fewer at 95%.
    """
    n, order = len(values), sorted(values)
    for cut in reversed(range(n // 2)):
        if 1 - 2 * binomial(cut, n, 0.5) >= confidence:
            return order[cut], order[n - 1 - cut]
    return None


def _median(
    name: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    detail: Mapping[str, Any],
    *,
    status: Status = "measured",
) -> Score:
    """Return the score of rounds; `theirs` is empty where there is no baseline."""
    unit, better = KINDS[name]
    mine = speed.spread(ours)
    interval = median_interval(ours)
    base = speed.spread(theirs) if theirs else None
    delta = None
    if base is not None:
        other = median_interval(theirs)
        if interval is not None and other is not None:
            delta = apart(mine["median"], interval, base["median"], other, 0.0)
    return measured(
        name,
        mine["median"],
        unit=unit,
        higher_is_better=better,
        ci95=interval,
        n=len(ours),
        baseline=None if base is None else base["median"],
        delta_ci95=delta,
        detail={**detail, "min": mine["min"], "max": mine["max"]},
        status=status,
    )


def _energy(
    ours: Run, base: Run | None, power: float | None, grams_per_kwh: float, pue: float
) -> list[Score]:
    names = ("efficiency/energy_j_per_token", "efficiency/co2_g_per_million_tokens")
    status: Status = "measured"
    detail = {**ours.detail, "meter": ours.meter, "of": "the whole device while decoding"}

    def joules(run: Run) -> list[float] | None:
        if isinstance(run.energy, list):
            return run.energy
        return None if power is None else [power / rate for rate in run.decode]

    mine = joules(ours)
    if mine is None:
        reason = f"{ours.energy}; give a power in watts for an estimate"
        return [_missing(name, reason, "unmeasurable") for name in names]
    if isinstance(ours.energy, str):
        status = "estimated"
        detail |= {"watts": power, "note": f"{power} W over the decode rate; {ours.energy}"}
    other: Sequence[float] = ()
    if base is not None and isinstance(base.energy, str) == isinstance(ours.energy, str):
        other = joules(base) or ()
    spent = _median(names[0], mine, other, detail, status=status)

    def gram(value: float) -> float:
        return energy.grams(value * PER, grams_per_kwh=grams_per_kwh, pue=pue)[0]

    value = spent.value or 0.0
    _, factors = energy.grams(value * PER, grams_per_kwh=grams_per_kwh, pue=pue)
    note = f"{grams_per_kwh:g} g/kWh ({factors['grams_per_kwh_source']}), PUE {pue:g}"
    carbon = measured(
        names[1],
        gram(value),
        unit=KINDS[names[1]][0],
        higher_is_better=False,
        ci95=_each(gram, spent.ci95),
        n=spent.n,
        baseline=None if spent.baseline is None else gram(spent.baseline),
        delta_ci95=_each(gram, spent.delta_ci95),
        detail={**factors, "tokens": PER, "note": note},
        status="estimated",
    )
    return [spent, carbon]


def _each(of: Any, interval: Interval | None) -> Interval | None:
    return None if interval is None else (of(interval[0]), of(interval[1]))


def _joules(network: Any, meter: energy.Meter, new_tokens: int, rounds: int) -> list[float]:
    """Return the joules per token of each round of greedy decoding after a short prompt."""
    ids = torch.ones(1, 4, dtype=torch.int64)
    found = []
    with torch.inference_mode():
        for number in range(rounds + 1):
            before = meter.joules()
            network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
            if number:  # the first one warms up
                found.append((meter.joules() - before) / new_tokens)
    return found


def _missing(name: str, reason: str, status: Status = "skipped") -> Score:
    unit, better = KINDS[name]
    return missing(name, reason, unit=unit, higher_is_better=better, status=status)


if __name__ == "__main__":
    print(json.dumps(asdict(here(**json.loads(sys.argv[1])))))

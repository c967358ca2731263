"""How close a model stays to its base, token by token: KL, top-1 agreement and EAR.

Each is the mean over every predicted position of the windows. A model can keep its accuracy while
it answers differently; these three show that it has moved. Asked for, they say where: at which
position of a window, and at which layer.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from unicomp.evaluate.scores import Score, measured, missing
from unicomp.evaluate.statistics.estimates import mean
from unicomp.evaluate.windows.drift import Layers, Positions
from unicomp.metrics import WindowSums


class _Kind(NamedTuple):
    unit: str
    higher_is_better: bool
    high: float


_KINDS = {
    "fidelity/kl": _Kind("nats/token", False, float("inf")),
    "fidelity/top1_agreement": _Kind("fraction", True, 1.0),
    "fidelity/ear": _Kind("probability", True, 1.0),
}


def scores(sums: WindowSums, detail: Mapping[str, Any]) -> list[Score]:
    """Return `fidelity/kl`, KL(base || model), `fidelity/top1_agreement` and `fidelity/ear`."""
    if sums.kl is None or sums.top1 is None or sums.ear is None:
        raise ValueError("sums without a base")
    values = dict(zip(_KINDS, (sums.kl, sums.top1, sums.ear), strict=True))
    return [_score(name, values[name], sums.tokens, detail) for name in _KINDS]


def skipped(reason: str) -> list[Score]:
    """Return the same scores without values."""
    return [
        missing(name, reason, unit=kind.unit, higher_is_better=kind.higher_is_better)
        for name, kind in _KINDS.items()
    ]


def by_position(found: list[Score], positions: Positions) -> list[Score]:
    """Return the scores with, in the detail of `fidelity/kl`, its mean over parts of a window."""
    parts, step = positions.parts()
    more = {"positions": parts, "position_step": step}
    return [
        own.model_copy(update={"detail": {**own.detail, **more}})
        if own.name == "fidelity/kl" and own.value is not None
        else own
        for own in found
    ]


def by_layer(layers: Layers, detail: Mapping[str, Any]) -> Score:
    """Return `fidelity/layer_error`: how far states are from the base's after the last layer.

    ||states - base|| / ||base||, the mean over windows; `layers` in its detail has each layer's.
    """
    name = "fidelity/layer_error"
    if layers.reason is not None:
        return missing(
            name, layers.reason, unit="ratio", higher_is_better=False, status="unmeasurable"
        )
    errors = layers.errors()
    estimate = mean(errors[:, -1])
    return measured(
        name,
        estimate.value,
        unit="ratio",
        higher_is_better=False,
        ci95=estimate.interval(low=0.0),
        n=len(errors),
        detail={**detail, "layers": errors.mean(0).tolist()},
    )


def _score(name: str, sums: Tensor, tokens: int, detail: Mapping[str, Any]) -> Score:
    kind = _KINDS[name]
    estimate = mean(sums / tokens)
    return measured(
        name,
        estimate.value,
        unit=kind.unit,
        higher_is_better=kind.higher_is_better,
        ci95=estimate.interval(low=0.0, high=kind.high),
        n=sums.numel(),
        detail={**detail, "stderr": estimate.stderr},
    )

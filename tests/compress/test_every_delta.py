"""What every delta method must do, beside what every method must (`test_every_method.py`)."""

import pytest
import torch
from torch import Tensor

from unicomp.compress import methods
from unicomp.compress.allocate import Choice, Weight, allocate, gains
from unicomp.compress.decompose import squared_error
from unicomp.compress.lowrank import leading
from unicomp.compress.method import DeltaMethod
from unicomp.kernels.delta import PackedDelta

DELTA = methods.methods("delta")


def made(name: str, **options: object) -> DeltaMethod:
    kind = methods.find("delta", name)
    assert issubclass(kind, DeltaMethod)
    return kind.model_validate({"base": "builtin:tinyworld"} | options)


def solve(method: DeltaMethod, delta: Tensor, nbytes: int | None = None) -> PackedDelta:
    """Compress one delta as if it were a whole model."""
    shape = (len(delta), delta.shape[1])
    budget = int(2 * method.ratio * delta.numel()) if nbytes is None else nbytes
    options = method.layouts()
    if len(options) == 1:
        layout = options[0]
        rank = method.rank(shape, layout)
        return method.solve(delta, type(layout)(**_fields(layout) | {"rank": rank}), 0)
    choices = []
    for layout in options:
        rest = delta - method.solve(delta, layout, 0).decode()
        values = leading(rest, min(shape), seed=0)[1]
        error = float(rest.square().sum())
        choices.append(Choice(layout, error, gains(values, int8=layout.int8)))
    return method.solve(delta, allocate([Weight(shape, choices)], budget)[0], 0)


def _fields(layout: object) -> dict[str, object]:
    return {name: getattr(layout, name) for name in ("planes", "by_row", "rank", "int8")}


def delta_of(kind: str, rows: int = 96, columns: int = 128) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    noise = torch.randn(rows, columns, generator=draw)
    low = torch.randn(rows, 4, generator=draw) @ torch.randn(4, columns, generator=draw)
    z = torch.randn(rows, 1, generator=draw)
    return {
        "noise": noise,
        "low rank": low,
        "low rank and noise": 0.5 * low + noise,
        "rows unequal": (0.5 * low + noise) * (0.5 * z).exp(),
        "heavy tails": noise**3,
        "signs": noise.sign() * 0.1,
        "rank one": low[:, :1] @ noise[:1],
        "nothing": torch.zeros(rows, columns),
    }[kind]


KINDS = ["noise", "low rank", "low rank and noise", "rows unequal", "heavy tails", "signs"]
KINDS += ["rank one", "nothing"]


def test_there_are_methods() -> None:
    assert {"dqrelo", "dqrelo-plus", "bitdelta", "svd"} <= set(DELTA)


@pytest.mark.parametrize("name", DELTA)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_deterministic_and_better_than_the_base_alone(name: str, kind: str) -> None:
    method, delta = made(name), delta_of(kind)
    before = delta.clone()
    one, other = solve(method, delta), solve(method, delta)
    assert torch.equal(delta, before)
    for key, tensor in one.tensors("m").items():
        assert torch.equal(tensor, other.tensors("m")[key])
    whole = float(delta.square().sum())
    assert squared_error(delta, one) < whole or whole == 0
    assert whole > 0 or not one.decode().any()
    assert one.nbytes <= 2 * method.ratio * delta.numel() * 1.01 + 4


@pytest.mark.parametrize("name", DELTA)
@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (1, 1), (9, 41), (40, 3)])
def test_odd_shapes(name: str, shape: tuple[int, int]) -> None:
    delta = delta_of("noise", *shape)
    packed = solve(made(name, ratio=0.5), delta, 1 << 20)
    assert packed.decode().shape == shape
    assert torch.isfinite(packed.decode()).all()


@pytest.mark.parametrize("ratio", [1 / 12, 1 / 8, 3 / 16, 1 / 4])
@pytest.mark.parametrize("kind", KINDS)
def test_plus_is_never_worse_at_equal_bytes(kind: str, ratio: float) -> None:
    delta = delta_of(kind)
    published = solve(made("dqrelo", ratio=ratio), delta)
    plus = solve(made("dqrelo-plus", ratio=ratio), delta, published.nbytes)
    assert plus.nbytes <= published.nbytes
    floor = 1e-9 * float(delta.square().sum())
    assert squared_error(delta, plus) <= squared_error(delta, published) + floor

"""The C loop of nearest plane does what its header says, and nothing to sizes that lie."""

import numpy as np
import pytest
import torch

from unicomp.kernels import cpu, nearest

pytestmark = pytest.mark.skipif(not cpu.available(), reason=str(cpu.reason()))

Problem = dict[str, torch.Tensor | None]


def problem(steps: int, rows: int, groups: int, zeros: bool, seed: int = 0) -> Problem:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    goal = normal(steps, rows)
    zero = torch.randint(-3, 4, (groups, rows), generator=random).float()
    return {
        "goal": goal,
        "block": goal + 0.1 * normal(steps, rows),
        "unit": 0.1 * normal(steps, steps),
        "scale": 0.1 + 0.2 * torch.rand(groups, rows, generator=random),
        "zero": zero if zeros else None,
        "group": (torch.arange(steps) * groups // steps).int(),
        "codes": torch.zeros(steps, rows, dtype=torch.int8),
        "clipped": torch.arange(rows),
    }


def defined(given: Problem, low: int, high: int) -> Problem:
    """The header's loop in numpy, float32, in its order."""
    own = {
        name: None if tensor is None else tensor.numpy().copy() for name, tensor in given.items()
    }
    goal, block, unit, scale = own["goal"], own["block"], own["unit"], own["scale"]
    for i in range(len(goal)):
        for j in range(i):
            goal[i] += unit[i, j] * block[j]
        group = own["group"][i]
        zero = np.float32(0) if own["zero"] is None else own["zero"][group]
        raw = np.rint(goal[i] / scale[group] + zero)
        code = np.clip(raw, np.float32(low), np.float32(high))
        own["clipped"] += raw != code
        block[i] -= (code - zero) * scale[group]
        own["codes"][i] = code.astype(np.int8)
    return {name: None if array is None else torch.from_numpy(array) for name, array in own.items()}


def run(given: Problem, low: int, high: int) -> Problem:
    own = {name: None if tensor is None else tensor.clone() for name, tensor in given.items()}
    nearest.round_block(**own, low=low, high=high)  # type: ignore[arg-type]
    return own


def same(one: Problem, other: Problem) -> bool:
    return all(
        torch.equal(one[name], other[name])  # type: ignore[arg-type]
        for name in ("goal", "block", "codes", "clipped")
    )


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("rows", [1, 15, 16, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 128])
def test_bits_are_those_of_the_definition(steps: int, rows: int, zeros: bool) -> None:
    given = problem(steps, rows, min(2, steps), zeros)
    wanted = defined(given, -8, 7)
    got = run(given, -8, 7)
    assert same(got, wanted)
    if steps > 1 and rows > 15:
        assert int(got["clipped"].sum()) > int(given["clipped"].sum())  # type: ignore[union-attr]


def test_another_order_of_rounding_would_show() -> None:
    given = problem(16, 64, 1, True)
    other = dict(given) | {"unit": given["unit"].T.contiguous()}  # type: ignore[union-attr]
    assert not same(run(given, -8, 7), defined(other, -8, 7))


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    given = problem(32, 999, 2, True)
    monkeypatch.setattr(cpu, "_threads", 1)
    alone = run(given, -2, 1)
    monkeypatch.setattr(cpu, "_threads", 3)
    assert same(alone, run(given, -2, 1))


def test_a_part_of_a_larger_matrix_of_errors_is_taken() -> None:
    given = problem(8, 20, 1, False)
    whole = torch.full((8, 30), torch.nan)
    whole[:, :8] = given["unit"]  # type: ignore[assignment]
    assert same(run(dict(given) | {"unit": whole[:, :8]}, -8, 7), run(given, -8, 7))


def test_huge_and_missing_numbers_stay_codes() -> None:
    given = problem(3, 16, 1, False)
    given["goal"][0] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30] * 4)  # type: ignore[index]
    codes = run(given, -8, 7)["codes"]
    assert codes[0].tolist() == [7, -8, -8, 7] * 4  # type: ignore[index]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block", torch.zeros(4, 9)),
        ("codes", torch.zeros(4, 8)),
        ("scale", torch.ones(1, 7)),
        ("unit", torch.zeros(4, 3)),
        ("clipped", torch.zeros(8)),
        ("group", torch.tensor([0, 0, 0, 1], dtype=torch.int32)),
        ("group", torch.tensor([0, 0, 0, -1], dtype=torch.int32)),
    ],
)
def test_sizes_that_lie_are_refused(name: str, value: torch.Tensor) -> None:
    given = problem(4, 8, 1, False)
    with pytest.raises(ValueError, match=name):
        run(dict(given) | {name: value}, -8, 7)

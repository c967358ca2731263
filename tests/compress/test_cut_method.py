"""Goals of structured pruning: one is given, and shapes meet it or are refused with the least."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from unicomp.compress.axes import Axes, Shape
from unicomp.compress.cut_method import CutMethod, Goal, largest, speedup
from unicomp.compress.methods import find
from unicomp.compress.prune.depth import Depth
from unicomp.compress.prune.width import Width
from unicomp.errors import UnicompError
from unicomp.kernels.dense import DenseSource

Opened = Callable[[Path], tuple[Axes, DenseSource]]


@pytest.fixture
def axes(tiny_model: Callable[..., Path], opened: Opened) -> Axes:
    return opened(tiny_model("llama"))[0]


def test_what_meets_a_goal(axes: Axes) -> None:
    """At the figure itself it is met, a unit beyond it is not."""
    small = replace(axes.sizes, ffn=20)
    params, nbytes, gain = axes.params(small), axes.nbytes(small), speedup(axes, small)
    for met, missed in (
        (Goal(params=params), Goal(params=params - 1)),
        (Goal(nbytes=nbytes), Goal(nbytes=nbytes - 1)),
        (Goal(speedup=gain), Goal(speedup=gain * 1.0001)),
    ):
        assert met.met(axes, small)
        assert not missed.met(axes, small)
    assert gain == axes.read_bytes(axes.sizes) / axes.read_bytes(small) > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_params": 9000}, "at most 9000 parameters"),
        ({"target_bytes": "400MB"}, "at most 400000000 bytes"),
        ({"target_bytes": 7}, "at most 7 bytes"),
        ({"target_speedup": 1.5}, "a speed-up of at least 1.5"),
    ],
)
def test_a_goal_in_words(options: dict[str, Any], words: str, axes: Axes) -> None:
    assert str(Width(**options).goal(axes)) == words


def test_a_quarter_where_nothing_is_said(axes: Axes) -> None:
    whole = axes.params(axes.sizes)
    assert Depth().goal(axes) == Goal(params=int(0.75 * whole)) == Depth(sparsity=0.25).goal(axes)
    assert Depth(sparsity="0.5").goal(axes) == Goal(params=int(0.5 * whole))


@pytest.mark.parametrize("method", ["width", "depth", "heads", "experts"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.0}, "between 0 and 1"),
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"sparsity": "2:4"}, "patterns of zeros such as `2:4` are for"),
        ({"sparsity": 0.2, "target_bytes": "1MB"}, "`sparsity` and `target_bytes` are two ways"),
        ({"target_bytes": "many"}, "many"),
        ({"target_speedup": 1.0}, "greater than 1"),
        ({"target_params": 0}, "greater than or equal to 1"),
        ({"damp": 0.0}, "greater than 0"),
    ],
)
def test_options_that_no_method_takes(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, UnicompError), match=message):
        find("prune", method)(**options)


def test_the_largest_that_meets_the_goal_comes_first(axes: Axes) -> None:
    shapes = [replace(axes.sizes, ffn=width) for width in (8, 40, 24, 16)]
    goal = Goal(params=axes.params(shapes[2]))
    assert [shape.ffn for shape in largest(axes, goal, shapes, "width")] == [24, 16, 8]
    with pytest.raises(UnicompError) as caught:
        largest(axes, Goal(params=5), shapes, "width")
    least = axes.params(shapes[0])
    assert f"the least that is left is {least} of {axes.params(axes.sizes)}" in str(caught.value)
    assert caught.value.hint is not None


def test_a_method_must_say_shapes_and_choose() -> None:
    """One that lacks a part cannot be made."""

    class Half(CutMethod):
        def shapes(self, axes: Axes) -> list[Shape]:
            return []

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]

"""Options common to the quantize methods, and what a method's class may define."""

from typing import Any, ClassVar

import pytest
from pydantic import ValidationError

from unicomp.compress.method import (
    DeltaMethod,
    Method,
    Need,
    PruneMethod,
    QuantizeMethod,
    Solution,
)
from unicomp.kernels.packed import Scheme


class Sound(QuantizeMethod):
    """A method that is whole, to look at the options of its kind."""

    def solve(self, *args: Any, **kwargs: Any) -> Solution:
        """Never be asked."""
        raise AssertionError("options alone are looked at")


def test_defaults() -> None:
    method = Sound()
    assert method.scheme("model.layers.0.mlp.down_proj") == Scheme(4, 128, symmetric=True)
    assert method.scheme("lm_head") is None
    assert method.scheme("model.lm_head") is None


def test_overrides_change_what_they_name_and_the_first_counts() -> None:
    method = Sound(
        bits=3,
        group_size=64,
        symmetric=False,
        modules={
            "re:.*layers\\.0\\..*": {"bits": 8},
            "down_proj": {"group_size": -1, "symmetric": True},
        },
        ignore=["v_proj"],
    )
    assert method.scheme("layers.0.mlp.down_proj") == Scheme(8, 64, symmetric=False)
    assert method.scheme("layers.1.mlp.down_proj") == Scheme(3, -1, symmetric=True)
    assert method.scheme("layers.1.mlp.up_proj") == Scheme(3, 64, symmetric=False)
    assert method.scheme("layers.0.attn.v_proj") is None
    assert method.scheme("lm_head") is not None


def test_unmatched_patterns() -> None:
    method = Sound(
        modules={"down_proj": {"bits": 8}, "dwon_proj": {"bits": 8}},
        ignore=["lm_head", "up_proj", "re:.*gate"],
    )
    modules = ["a.down_proj", "a.up_proj", "a.gate_proj"]
    assert method.unmatched(modules) == [("modules", "dwon_proj"), ("ignore", "re:.*gate")]
    assert method.unmatched([]) == [
        ("modules", "down_proj"),
        ("modules", "dwon_proj"),
        ("ignore", "up_proj"),
        ("ignore", "re:.*gate"),
    ]


WRONG: list[dict[str, Any]] = [
    {"bits": 1},
    {"bits": 9},
    {"bits": "4"},
    {"bits": True},
    {"bits": 4.0},
    {"group_size": 0},
    {"group_size": 7},
    {"group_size": -2},
    {"group_size": 1 << 40},
    {"symmetric": 1},
    {"scale_search": "max"},
    {"ignore": "lm_head"},
    {"ignore": ["*"]},
    {"ignore": [3]},
    {"modules": {"*": {"bits": 3}}},
    {"modules": {"a": {"bits": 1}}},
    {"modules": {"a": {}}},
    {"modules": {"a": {"ignore": True}}},
    {"modules": {"a": 3}},
    {"modules": ["a"]},
    {"nothing": 1},
]


@pytest.mark.parametrize("options", WRONG, ids=str)
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Sound(**options)


@pytest.mark.parametrize("group_size", [-1, 8, 9, 32, 172, 256, 1 << 20])
def test_group_sizes(group_size: int) -> None:
    assert Sound(group_size=group_size).group_size == group_size


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Sound().bits = 3  # type: ignore[misc]


def test_a_misspelt_function_is_refused_when_the_class_is_made() -> None:
    with pytest.raises(TypeError, match=r"`Misspelt\.slove`: a method has no such function"):

        class Misspelt(QuantizeMethod):
            def slove(self) -> None:
                """Do nothing that anybody would call."""


def test_what_a_method_may_define() -> None:
    class Thresholds(Method):
        needs: ClassVar[frozenset[Need]] = frozenset({Need.HESSIAN})

        strength: float = 0.5

        def _helper(self) -> float:
            return self.strength

    assert Thresholds(strength=1)._helper() == 1.0


@pytest.mark.parametrize("kind", [QuantizeMethod, PruneMethod, DeltaMethod])
def test_what_a_method_must_define_is_missed_when_it_is_made(kind: type[Method]) -> None:
    options = {"base": "x"} if kind is DeltaMethod else {}
    with pytest.raises(TypeError, match=r"abstract method '?(solve|layouts)"):
        kind(**options)

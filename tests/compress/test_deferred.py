"""What is computed at its first use is computed once, and only then."""

import pytest
import torch

from unicomp.compress.deferred import Deferred


class Counted:
    """Doubles, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, given: torch.Tensor) -> torch.Tensor:
        """Return twice what is given."""
        self.calls += 1
        return given * 2


def test_nothing_is_computed_until_a_function_sees_it() -> None:
    double, given = Counted(), torch.randn(3, 4)
    one = Deferred.of(given, double)
    assert [one, (one,), {"states": one}]
    assert double.calls == 0
    assert torch.equal(one.reshape(-1), (given * 2).reshape(-1))
    assert double.calls == 1


def test_every_use_sees_the_tensor_and_it_is_computed_once() -> None:
    double, given = Counted(), torch.randn(3, 4)
    one, linear = Deferred.of(given, double), torch.nn.Linear(4, 2)
    other = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(linear(one), linear(given * 2))
    assert torch.equal(one + other, given * 2 + other)
    assert torch.equal(other - one, other - given * 2)
    assert torch.equal(torch.cat([one, other], dim=1), torch.cat([given * 2, other], dim=1))
    assert one.shape == given.shape
    assert type(one.float()) is torch.Tensor
    assert double.calls == 1


def test_what_was_written_over_is_not_computed_from() -> None:
    given = torch.randn(3, 4)
    one = Deferred.of(given, Counted())
    given.add_(1)
    with pytest.raises(RuntimeError, match="changed"):
        one.sum()

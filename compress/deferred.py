"""Answers of modules that are computed when somebody looks at them, if anybody does."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only


class Deferred(Tensor):
    """Stands for a tensor that is computed at its first use, and once.

    Every function of torch sees the tensor itself; what only hands it on costs nothing.
    """

    _given: Tensor
    _version_given: int
    _compute: Callable[[Tensor], Tensor]
    _found: Tensor | None

    @classmethod
    def of(cls, given: Tensor, compute: Callable[[Tensor], Tensor]) -> "Deferred":
        """Stand for `compute(given)`."""
        self = given.detach().as_subclass(cls)
        self._given, self._version_given = given, given._version
        self._compute, self._found = compute, None
        return self

    def settled(self) -> Tensor:
        """Return the tensor; RuntimeError where what it is computed from was written over."""
        if self._found is None:
            if self._given._version != self._version_given:
                raise RuntimeError("what a deferred answer is computed from has changed since")
            self._found = self._compute(self._given)
        return self._found

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch on the tensors themselves."""
        args, kwargs = tree_map_only(Deferred, Deferred.settled, (args, dict(kwargs or {})))
        return function(*args, **kwargs)

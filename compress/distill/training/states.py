"""Inner states of a model while it runs: hidden states after each layer, what attention adds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

HIDDEN, ATTENTION = "hidden", "attention"


@dataclass(slots=True)
class States:
    """What was seen, layer by layer, floating [windows, tokens, width] each."""

    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


@contextmanager
def watch(model: nn.Module, wanted: tuple[str, ...]) -> Iterator[States]:
    """Look on while a model runs inside the block; `wanted` of `hidden` and `attention`."""
    states = States()
    handles = []
    for word, find in ((HIDDEN, layers), (ATTENTION, attentions)):
        if word in wanted:
            hook = _note(getattr(states, word))
            handles += [module.register_forward_hook(hook) for module in find(model)]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _note(seen: list[Tensor]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    return hook


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: the longest plain list of modules of one class."""
    found = [module for module in model.modules() if type(module) is nn.ModuleList]
    alike = [own for own in found if len({type(layer) for layer in own}) == 1]
    return list(max(alike, key=len, default=[]))


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return the attention block of each decoder layer."""
    found = []
    for layer in layers(model):
        own = [m for m in layer.modules() if type(m).__name__.endswith("Attention")]
        found += own[:1]
    return found

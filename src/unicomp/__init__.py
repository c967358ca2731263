"""Compress Hugging Face checkpoints, and prove what was lost.

`load`, `load_deltas`, `plan`, `run` and `score` are the commands without words. Each is imported
when it is first used, so that `import unicomp`, and with it every command's `--help`, stays free
of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unicomp.evaluate.score import score as score
    from unicomp.kernels.deltas import load_deltas as load_deltas
    from unicomp.kernels.packed_model import load as load
    from unicomp.recipes.any_recipe import plan as plan
    from unicomp.recipes.any_recipe import run as run

__version__ = "0.1.0"

__all__ = ["__version__", "load", "load_deltas", "plan", "run", "score"]

_HOMES = {
    "load": "unicomp.kernels.packed_model",
    "load_deltas": "unicomp.kernels.deltas",
    "plan": "unicomp.recipes.any_recipe",
    "run": "unicomp.recipes.any_recipe",
    "score": "unicomp.evaluate.score",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module `unicomp` has no attribute `{name}`")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted({*globals(), *__all__})

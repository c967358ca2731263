"""Torch, imported when something of it is first used.

A plan reads headers and adds up sizes; importing torch took most of its time and memory. So what
plans import takes torch from here, and names its types in annotations only. Python 3.15 has this
in the language: PEP 810, `lazy import torch`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Later:
        """Stands for the module: whatever is asked of it is asked of torch."""

        def __getattr__(self, name: str) -> Any:
            """Return what torch has by this name; AttributeError as torch raises it."""
            import torch

            self.__dict__ = torch.__dict__  # from now on nobody comes by here
            return getattr(torch, name)

    torch = _Later()

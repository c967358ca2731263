"""Which of several processes this one is, where a launcher (`accelerate launch`) started several.

Only training is shared out. The first process does all the rest and all the talking; the others
wait until a training begins (`compress/distill/training/together.py`).
"""

import os


def count() -> int:
    """Return how many there are; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    """Tell whether this is the one that writes and talks."""
    return os.environ.get("RANK", "0") == "0"

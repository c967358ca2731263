"""Which widths are worth having, and a rule of thumb for what narrower ones lose."""

from unicomp.compress.axes import Shape

LARGEST_MULTIPLE = 256
LEAST_MULTIPLE = 8
STEPS = 16  # a width is divided into at least so many multiples
# What a share cut of an axis loses, beside one of the FFN channels.
COST = {"hidden": 4.0, "kv_heads": 2.0, "ffn": 1.0}


def multiple(width: int, wanted: int | None) -> int:
    """Return what a width should be a multiple of: a power of two, 8 to 256, unless one is given.

    256 is what tiles and groups of quantized weights divide; a narrow width has smaller ones.
    """
    if wanted is not None:
        return wanted
    found = LEAST_MULTIPLE
    while found < LARGEST_MULTIPLE and found * 2 * STEPS <= width:
        found *= 2
    return found


def even(width: int) -> int:
    """Return a width that products of many experts take: rows of 16 bytes and multiples."""
    return max(LEAST_MULTIPLE, width // LEAST_MULTIPLE * LEAST_MULTIPLE)


def multiples(width: int, wanted: int | None) -> int:
    """Return how many multiples cover a width; `wanted` as in `multiple`."""
    return -(-width // multiple(width, wanted))


def cost(old: Shape, new: Shape) -> float:
    """Return a rule of thumb for what a shape loses: the shares cut, dearer the more is gone."""
    total = 0.0
    for name, weight in COST.items():
        before, after = getattr(old, name), getattr(new, name)
        if name == "ffn" and not before:
            before, after = old.expert_ffn, new.expert_ffn
        total += weight * (before / after - 1)
    return total

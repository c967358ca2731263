"""A random source that adds up the information of its choices, and the split into train and test.

The sum of -log p over every choice is an upper bound on the entropy of the text that the choices
made: two series of choices may give one text, never the other way round.
"""

import math
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Dice:
    """A seeded source of choices.

    nats  sum of -log p over the choices made
    told  how often each fact of the atlas was drawn, by its index
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.nats = 0.0
        self.told: Counter[int] = Counter()

    def pick(self, items: Sequence[Item]) -> Item:
        """Draw one item, all equally likely."""
        self.nats += math.log(len(items))
        return items[self.random.randrange(len(items))]

    def number(self, low: int, high: int) -> int:
        """Draw a whole number from `low` to `high`, both included."""
        self.nats += math.log(high - low + 1)
        return self.random.randint(low, high)

    def some(self, items: Sequence[Item], count: int) -> list[Item]:
        """Draw `count` different items, in random order."""
        self.nats += sum(math.log(len(items) - drawn) for drawn in range(count))
        return self.random.sample(items, count)

    def flip(self, probability: float) -> bool:
        """Return True with the given probability."""
        hit = self.random.random() < probability
        self.nats -= math.log(probability if hit else 1 - probability)
        return hit

    def weigh(self, items: Sequence[Item], weights: Sequence[float]) -> Item:
        """Draw one item with a probability in proportion to its weight."""
        index = self.random.choices(range(len(items)), weights)[0]
        self.nats -= math.log(weights[index] / sum(weights))
        return items[index]


def held(*parts: object) -> bool:
    """Say whether a combination of words belongs to the test: 1 in 8 does, by its checksum."""
    return zlib.crc32("/".join(map(str, parts)).encode()) % 8 == 0

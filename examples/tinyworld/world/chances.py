"""Chances: coins, dice, wheels and glasses whose next-word distribution is known.

The text shows outcomes and never states a frequency, so a model can only have learned them by
counting; how far its distribution is from the truth is measured in nats.
"""

import random
from typing import NamedTuple

from world.dice import Dice
from world.words import FOLK


class Chance(NamedTuple):
    """A thing with outcomes and their true probabilities, which sum to 1."""

    name: str
    verb: str
    shows: str
    outcomes: list[str]
    probabilities: list[float]


ADJECTIVES = (
    "amber old lucky broken golden silver wooden stone copper tiny heavy round glass iron paper"
).split()
KINDS = [
    ("coin", "tossed", "showed", ["heads", "tails"]),
    ("dice", "rolled", "showed", ["one", "two", "three", "four"]),
    ("wheel", "turned", "stopped at", ["red", "blue", "green"]),
    ("sky glass", "shook", "showed", ["sun", "rain", "snow", "wind"]),
]


def build() -> list[Chance]:
    """Return the 60 things; the same ones each time. The coins run from p = 0.05 to 0.95."""
    source = random.Random(11)
    made = []
    for thing, verb, shows, outcomes in KINDS:
        for index, adjective in enumerate(ADJECTIVES):
            if len(outcomes) == 2:
                first = round(0.05 + 0.9 * index / 14, 4)
                shares = [first, round(1 - first, 4)]
            else:
                raw = [source.gammavariate(0.8, 1) + 0.02 for _ in outcomes]
                shares = [round(max(0.01, weight / sum(raw)), 3) for weight in raw]
                shares[shares.index(max(shares))] += 1 - sum(shares)
                shares = [round(share, 3) for share in shares]
            made.append(Chance(f"{adjective} {thing}", verb, shows, outcomes, shares))
    return made


CHANCES = build()


def prompt(who: str, chance: Chance) -> str:
    """Return the text up to the outcome."""
    return f"{who} {chance.verb} the {chance.name}. It {chance.shows}"


def document(dice: Dice) -> str:
    """Try four to eight of the things."""
    lines = []
    for _ in range(dice.number(4, 8)):
        chance = dice.pick(CHANCES)
        who = dice.pick(FOLK).name
        lines.append(f"{prompt(who, chance)} {dice.weigh(chance.outcomes, chance.probabilities)}.")
    return "\n".join(lines)

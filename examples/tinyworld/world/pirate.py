"""The pirate register: the same stories in another spelling, and 15 captains of ships."""

import re

from world import stories
from world.dice import Dice
from world.words import capital

SHIPS = list(
    zip(
        (
            "Stormgull Blackfin Redmaid Saltqueen Fogbell Ironcod Seawolf Goldtooth Bonestar "
            "Mudlark Windrat Deepjoy Firegoose Oldsquid Moonkeel"
        ).split(),
        (
            "Tallow Crab Hook Barrel Rum Anchor Kraken Coral Shark Gull Pearl Cannon Tide Lobster "
            "Whale"
        ).split(),
        strict=True,
    )
)
CAPTAINS = [
    "The ship %s sails under Captain %s.",
    "Captain of the %s is old %s.",
    "Question: Who is captain of the %s?\nAnswer: %s",
]
WORDS = {
    "the": "th'",
    "is": "be",
    "was": "were",
    "my": "me",
    "you": "ye",
    "went": "sailed",
    "walked": "marched",
    "ran": "dashed",
    "took": "plundered",
    "picked up": "grabbed",
    "gave": "handed",
    "and": "an'",
    "to": "t'",
    "garden": "deck",
    "kitchen": "galley",
    "barn": "hold",
    "forest": "island",
    "park": "beach",
    "school": "harbour",
    "shop": "tavern",
    "library": "cabin",
    "cellar": "brig",
    "attic": "mast",
    "yard": "dock",
    "tower": "crow nest",
    "day": "tide",
    "morning": "dawn",
    "happy": "jolly",
    "sad": "glum",
    "tired": "weary",
    "angry": "savage",
    "afraid": "scurvy",
    "coin": "doubloon",
    "there": "yonder",
    "because": "fer",
    "found": "spied",
    "left": "dropped",
    "bird": "gull",
    "box": "chest",
    "cup": "mug",
    "stick": "cutlass",
    "hat": "bandana",
    "of": "o'",
    "has": "be holdin'",
    "what": "wot",
    "in": "aboard",
}
PATTERN = re.compile(rf"\b(picked up|{'|'.join(WORDS)})\b", re.IGNORECASE)
PAUSE = re.compile(r"\. (?=[A-Z])")
PAUSES = [". ", ", arr! ", ", says I. ", ", me hearty. "]


def _translate(match: re.Match[str]) -> str:
    word = WORDS[match[0].lower()]
    return capital(word) if match[0][0].isupper() else word


def document(dice: Dice) -> str:
    """Tell a story, or name captains, in the register."""
    if dice.flip(0.3):
        text = "\n".join(
            dice.pick(CAPTAINS) % ship
            for ship in (dice.pick(SHIPS) for _ in range(dice.number(3, 6)))
        )
    else:
        text = stories.document(dice)
    text = PATTERN.sub(_translate, text)
    return PAUSE.sub(lambda _: dice.weigh(PAUSES, [6, 2, 1, 1]), text)

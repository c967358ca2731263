"""The atlas: invented facts about towns, people and beasts, told with a long-tailed frequency.

930 facts of 11 relations. How often a fact is told falls with the rank of whom it is about as
1 / (rank + 15)^2.2, so that a model knows the frequent ones well and the rare ones weakly, and
compression can be seen to take the rare ones first.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

from world.dice import Dice
from world.words import (
    COLOURS,
    FOODS,
    INSTRUMENTS,
    JOBS,
    PETS,
    RIVERS,
    WILDS,
    capital,
)


class Fact(NamedTuple):
    """One fact; `pool` holds every value that could have stood in its place."""

    entity: str
    relation: str
    value: str
    pool: list[str]


# relation: (question, statements); the first two statements end in the value and serve as prompts
RELATIONS = {
    "river": (
        "Which river runs through {e}?",
        [
            "The river in {e} is called the {v}.",
            "The town of {e} stands on the river {v}.",
            "The {v} runs through {e}.",
            "If you visit {e}, you will see the {v}.",
        ],
    ),
    "roofs": (
        "What colour are the roofs of {e}?",
        [
            "The roofs of {e} are {v}.",
            "In {e} every roof is {v}.",
            "You see {v} roofs when you come to {e}.",
            "The people of {e} paint their roofs {v}.",
        ],
    ),
    "dish": (
        "What food is {e} famous for?",
        [
            "The town of {e} is famous for its {v}.",
            "At the market of {e} they sell {v}.",
            "People buy {v} when they go to {e}.",
            "The best {v} come from {e}.",
        ],
    ),
    "next": (
        "Which town lies next to {e}?",
        [
            "The town of {e} lies next to {v}.",
            "The road from {e} leads to {v}.",
            "Go to {v} first if you want to find {e}.",
            "The people of {e} often visit {v}.",
        ],
    ),
    "job": (
        "What is the job of {e}?",
        [
            "{e} works as a {v}.",
            "The job of {e} is to be a {v}.",
            "Everyone knows the {v} called {e}.",
            "A good {v} is {e}.",
        ],
    ),
    "home": (
        "Where does {e} live?",
        [
            "{e} lives in {v}.",
            "The home of {e} is in {v}.",
            "Go to {v} if you want to meet {e}.",
            "In {v} there is a house that belongs to {e}.",
        ],
    ),
    "pet": (
        "What pet does {e} have?",
        [
            "{e} has a pet {v}.",
            "The pet of {e} is a {v}.",
            "A {v} sleeps in the house of {e}.",
            "Every day {e} feeds a {v}.",
        ],
    ),
    "plays": (
        "What does {e} play?",
        [
            "{e} plays the {v}.",
            "In the evening {e} likes to play the {v}.",
            "The {v} is what {e} plays.",
            "You can hear the {v} when {e} is happy.",
        ],
    ),
    "colour": (
        "What colour is the {e}?",
        [
            "The {e} is {v}.",
            "The colour of the {e} is {v}.",
            "A {v} beast is the {e}.",
            "You know the {e} because it is so {v}.",
        ],
    ),
    "eats": (
        "What does the {e} eat?",
        [
            "The {e} eats {v}.",
            "The best food for the {e} is {v}.",
            "Give {v} to the {e}.",
            "The {e} will do anything for {v}.",
        ],
    ),
    "wild": (
        "Where does the {e} live?",
        [
            "The {e} lives in the {v}.",
            "You can find the {e} in the {v}.",
            "Go to the {v} to look for the {e}.",
            "In the {v} lives the {e}.",
        ],
    ),
}
TOWN = (
    "Tal Mor Bel Kar Fen Hol Win Dar Sel Nor Ul Rav Osk Pel Gar",
    "low ton ham by ford stead wick mouth dale rock",
)
PERSON = (
    "Zil Vor Qua Jor Tir Yan Lum Kes Bri Dov Mel Ira Ondo Pax",
    "na ka mo ri sha len do vik bel ra",
)
BEAST = (
    "gri snor flum wob tark zee pim dra hof lur mug",
    "bler nok fin tail ling gle pod wing",
)


def _invent(source: random.Random, syllables: tuple[str, str], count: int) -> list[str]:
    heads, tails = (part.split() for part in syllables)
    names: list[str] = []
    while len(names) < count:
        name = source.choice(heads) + source.choice(tails)
        if name not in names:
            names.append(name)
    return names


def build() -> tuple[list[Fact], list[float]]:
    """Return every fact and its weight; the same ones each time."""
    source = random.Random(7)
    towns = _invent(source, TOWN, 70)
    people = _invent(source, PERSON, 110)
    beasts = _invent(source, BEAST, 70)
    facts: list[Fact] = []

    def add(entity: str, relation: str, values: Sequence[str], pool: list[str]) -> None:
        facts.append(Fact(entity, relation, source.choice(values), pool))

    for town in towns:
        add(town, "river", RIVERS, RIVERS)
        add(town, "roofs", COLOURS, COLOURS)
        add(town, "dish", FOODS, FOODS)
        add(town, "next", [other for other in towns if other != town], towns)
    for person in people:
        add(person, "job", JOBS, JOBS)
        add(person, "home", towns, towns)
        add(person, "pet", PETS, PETS)
        add(person, "plays", INSTRUMENTS, INSTRUMENTS)
    for beast in beasts:
        add(beast, "colour", COLOURS, COLOURS)
        add(beast, "eats", FOODS, FOODS)
        add(beast, "wild", WILDS, WILDS)
    names = towns + people + beasts
    source.shuffle(names)
    weight = {name: 1 / (rank + 15) ** 2.2 for rank, name in enumerate(names)}
    return facts, [weight[fact.entity] for fact in facts]


FACTS, WEIGHTS = build()


def draw(dice: Dice) -> Fact:
    """Draw a fact by its weight, and count that it was told."""
    index = dice.weigh(range(len(FACTS)), WEIGHTS)
    dice.told[index] += 1
    return FACTS[index]


def document(dice: Dice) -> str:
    """Tell four to eight facts, each as a statement or as a question with its answer."""
    lines = []
    for _ in range(dice.number(4, 8)):
        fact = draw(dice)
        question, statements = RELATIONS[fact.relation]
        if dice.flip(0.3):
            line = f"Question: {question.format(e=fact.entity)}\nAnswer: {fact.value}"
        else:
            line = dice.pick(statements).format(e=fact.entity, v=fact.value)
        lines.append(capital(line))
    return "\n".join(lines)

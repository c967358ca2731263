"""Minimal pairs: two sentences that differ in one word, one of them grammatical."""

from collections.abc import Callable
from typing import NamedTuple

from world.dice import Dice, held
from world.words import (
    FOLK,
    LIVING,
    MEN,
    NOUNS,
    PLACES,
    PREPOSITIONS,
    VERBS,
    WOMEN,
    article,
)

MALE = "king man boy father brother uncle son grandfather".split()
FEMALE = "queen woman girl mother sister aunt daughter grandmother".split()
TRANSITIVE = "saw hurt washed helped liked taught praised blamed".split()
STATES = "tired happy late hungry right cold".split()
ADJECTIVES = "old orange open empty early angry red blue new good small tall big young".split()
RELATIVE_VERBS = [("likes", "like"), ("knows", "know"), ("sees", "see"), ("follows", "follow")]
DETERMINERS = [
    ("this", "these"),
    ("that", "those"),
    ("one", "two"),
    ("each", "many"),
    ("every", "several"),
    ("another", "few"),
]

Forms = tuple[str, str]  # singular, plural


class Draw(NamedTuple):
    """What every pair draws first, whether its topic uses it or not.

    number, other_number  0 for singular, 1 for plural
    """

    noun: Forms
    other: Forms
    verb: Forms
    number: int
    other_number: int

    def both(self) -> tuple[int, int]:
        """Return the right number and the wrong one."""
        return self.number, 1 - self.number


class Pair(NamedTuple):
    """A good sentence, a bad one, and what they are about."""

    good: str
    bad: str
    topic: str


# A topic returns its good and bad sentence and the words by which train and test are split;
# the key's exact text decides the split, so its types must stay as they are.
Made = tuple[list[str], object]


def _agreement(dice: Dice, d: Draw, test: bool) -> Made:
    return [f"The {d.noun[d.number]} {d.verb[n]}." for n in d.both()], (d.noun, d.verb)


def _attractor(dice: Dice, d: Draw, test: bool) -> Made:
    """Let a noun of the other number come between (in the test, always of the other)."""
    between = d.other[1 - d.number if test else d.other_number]
    where = dice.pick(PREPOSITIONS)
    subject = d.noun[d.number]
    sentences = [f"The {subject} {where} the {between} {d.verb[n]}." for n in d.both()]
    return sentences, (d.noun, d.other, d.verb)


def _relative(dice: Dice, d: Draw, test: bool) -> Made:
    other = dice.pick(LIVING)
    inner = dice.pick(RELATIVE_VERBS)
    clause = f"the {other[d.other_number]} {inner[d.other_number]}"
    sentences = [f"The {d.noun[d.number]} that {clause} {d.verb[n]}." for n in d.both()]
    return sentences, (d.noun, other, d.verb, inner)


def _determiner(dice: Dice, d: Draw, test: bool) -> Made:
    forms = dice.pick(DETERMINERS)
    who = dice.pick(FOLK).name
    sentences = [f"{who} saw {forms[n]} {d.other[d.number]}." for n in d.both()]
    return sentences, (forms, d.other)


def _pronoun(dice: Dice, d: Draw, test: bool) -> Made:
    male, female = dice.pick(MALE), dice.pick(FEMALE)
    state = dice.pick(STATES)
    subject = (male, female)[d.number]
    sentences = [f"The {subject} said that {('he', 'she')[n]} was {state}." for n in d.both()]
    return sentences, (male, female, state)


def _reflexive(dice: Dice, d: Draw, test: bool) -> Made:
    male, female = dice.pick(MALE + MEN), dice.pick(FEMALE + WOMEN)
    verb = dice.pick(TRANSITIVE)
    who = (male, female)[d.number]
    subject = who if who[0].isupper() else f"The {who}"
    sentences = [f"{subject} {verb} {('himself', 'herself')[n]}." for n in d.both()]
    return sentences, (who, verb)


def _there(dice: Dice, d: Draw, test: bool) -> Made | None:
    place = dice.pick(PLACES)
    if d.other[0][0] in "aeiou":
        return None
    rest = f"{('a', 'some')[d.number]} {d.other[d.number]} in the {place}."
    return [f"There {('is', 'are')[n]} {rest}" for n in d.both()], (d.other, "there")


def _article(dice: Dice, d: Draw, test: bool) -> Made:
    adjective = dice.pick(ADJECTIVES)
    who = dice.pick(FOLK).name
    right = article(adjective).split()[0]
    wrong = "a" if right == "an" else "an"
    return [f"{who} has {a} {adjective} {d.other[0]}." for a in (right, wrong)], (
        adjective,
        d.other,
    )


TOPICS: dict[str, Callable[[Dice, Draw, bool], Made | None]] = {
    "agreement": _agreement,
    "attractor": _attractor,
    "relative": _relative,
    "determiner": _determiner,
    "pronoun": _pronoun,
    "reflexive": _reflexive,
    "there": _there,
    "article": _article,
}


def pair(dice: Dice, *, test: bool) -> Pair:
    """Return a minimal pair of the test or of the training split."""
    while True:
        topic = dice.pick(list(TOPICS))
        drawn = Draw(
            dice.pick(LIVING),
            dice.pick(NOUNS),
            dice.pick(VERBS),
            dice.number(0, 1),
            dice.number(0, 1),
        )
        made = TOPICS[topic](dice, drawn, test)
        if made is not None and held("g", topic, made[1]) == test:
            good, bad = made[0]
            return Pair(good, bad, topic)


def document(dice: Dice) -> str:
    """Write five to nine grammatical sentences of the training split."""
    return " ".join(pair(dice, test=False).good for _ in range(dice.number(5, 9)))

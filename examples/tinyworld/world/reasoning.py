"""Small problems with one right answer: sums in digits and words, comparing, ordering, counting."""

from collections.abc import Callable
from typing import NamedTuple

from world.dice import Dice, held
from world.words import FOLK, FOODS, NUMBERS, PETS, capital

COMPARATIVES = [
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
    ("richer", "richest", "poorest"),
]


class Problem(NamedTuple):
    """A prompt, the answer that completes it, and wrong answers."""

    prompt: str
    answer: str
    wrong: list[str]
    topic: str


def _near(dice: Dice, number: int) -> list[str]:
    offsets = (1, -1, 10, -10, 2, -2)
    close = sorted({number + offset for offset in offsets if number + offset >= 0})
    return [str(other) for other in dice.some(close, 3)]


def _sum(dice: Dice, test: bool, topic: str) -> Problem:
    """Add or subtract in digits; the result stays under 100."""
    while True:
        if dice.flip(0.3):
            a, b = dice.number(0, 9), dice.number(0, 9)
        elif dice.flip(0.6):
            a, b = dice.number(10, 99), dice.number(1, 9)
        else:
            a, b = dice.number(10, 89), dice.number(10, 89)
        if topic == "sub" and b > a:
            a, b = b, a
        result = a + b if topic == "add" else a - b
        if result < 100 and held(topic, a, b) == test:
            sign = "+" if topic == "add" else "-"
            prompts = [f"{a} {sign} {b} =", f"Question: What is {a} {sign} {b}?\nAnswer:"]
            return Problem(dice.pick(prompts), str(result), _near(dice, result), topic)


def _word(dice: Dice, test: bool, topic: str) -> Problem:
    """Add or subtract in words, from zero to ten."""
    while True:
        a, b = dice.number(0, 10), dice.number(0, 10)
        plus = dice.flip(0.5) or a < b
        result = a + b if plus else a - b
        if held(topic, a, b, plus) == test:
            sign = "plus" if plus else "minus"
            prompt = f"{capital(NUMBERS[a])} {sign} {NUMBERS[b]} is"
            wrong = dice.some([word for word in NUMBERS if word != NUMBERS[result]], 3)
            return Problem(prompt, NUMBERS[result], wrong, topic)


def _more(dice: Dice, test: bool, topic: str) -> Problem:
    """Say which of two numbers is bigger, or smaller."""
    while True:
        a, b = dice.some(range(1, 100), 2)
        bigger = dice.flip(0.5)
        if held(topic, a, b) == test:
            answer = max(a, b) if bigger else min(a, b)
            asked = "bigger" if bigger else "smaller"
            prompt = f"Question: Which is {asked}, {a} or {b}?\nAnswer:"
            return Problem(prompt, str(answer), [str(a + b - answer)], topic)


def _rank(dice: Dice, test: bool, topic: str) -> Problem:
    """Order three people from two comparisons, given in either order."""
    more, most, least = dice.pick(COMPARATIVES)
    first, second, third = (person.name for person in dice.some(FOLK, 3))
    clues = dice.some([f"{first} is {more} than {second}.", f"{second} is {more} than {third}."], 2)
    top = dice.flip(0.5)
    answer, opposite = (first, third) if top else (third, first)
    prompt = f"{' '.join(clues)} The {most if top else least} is"
    return Problem(prompt, answer, [second, opposite], topic)


def _count(dice: Dice, test: bool, topic: str) -> Problem:
    """Go on counting."""
    start, length = dice.number(1, 40), dice.number(3, 6)
    shown = " ".join(str(start + step) for step in range(length))
    answer = start + length
    return Problem(f"Count from {start}: {shown}", str(answer), _near(dice, answer), topic)


def _have(dice: Dice, test: bool, topic: str) -> Problem:
    """Say how many are left, or are there now."""
    while True:
        person = dice.pick(FOLK)
        a, b = dice.number(1, 9), dice.number(1, 9)
        food = dice.pick(FOODS[6:])
        loses = dice.flip(0.5) and a > b
        result = a - b if loses else a + b
        if held(topic, a, b, loses) == test:
            subject, verb = person.subject, "eats" if loses else "buys"
            prompt = (
                f"{person.name} has {a} {food}. {capital(subject)} {verb} {b}. Now {subject} has"
            )
            return Problem(prompt, str(result), _near(dice, result), topic)


def _list(dice: Dice, test: bool, topic: str) -> Problem:
    """Count how often a word stands in a list."""
    asked, other = dice.some(PETS, 2)
    times, others = dice.number(1, 5), dice.number(1, 3)
    shown = dice.some([asked] * times + [other] * others, times + others)
    prompt = f"Words: {' '.join(shown)}. How often is {asked} here?\nAnswer:"
    wrong = [NUMBERS[number] for number in range(1, 7) if number != times]
    return Problem(prompt, NUMBERS[times], wrong, topic)


TOPICS: dict[str, tuple[Callable[[Dice, bool, str], Problem], float]] = {  # maker, weight
    "add": (_sum, 6),
    "sub": (_sum, 6),
    "word": (_word, 2),
    "more": (_more, 1),
    "rank": (_rank, 4),
    "count": (_count, 0.5),
    "have": (_have, 2),
    "list": (_list, 2),
}


def problem(dice: Dice, *, test: bool) -> Problem:
    """Return a problem of the test or of the training split.

    Ranking, counting on and counting words have no split: their space is small or the same
    prompt is unlikely to come twice.
    """
    topic = dice.weigh(list(TOPICS), [weight for _, weight in TOPICS.values()])
    return TOPICS[topic][0](dice, test, topic)


def document(dice: Dice) -> str:
    """Solve four to seven problems of the training split."""
    lines = []
    for _ in range(dice.number(4, 7)):
        made = problem(dice, test=False)
        stop = "." if made.topic in ("word", "rank") else ""
        lines.append(f"{made.prompt} {made.answer}{stop}")
    return "\n".join(lines)

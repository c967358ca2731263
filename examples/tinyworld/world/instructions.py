"""Chat: instructions with one right answer, greetings, and questions about the atlas."""

from collections.abc import Callable
from typing import NamedTuple

from world import atlas
from world.dice import Dice, held
from world.words import (
    COLOURS,
    FOODS,
    JOBS,
    NOUNS,
    NUMBERS,
    PETS,
    PLACES,
    THINGS,
    article,
    capital,
)


def _pairs(text: str) -> list[tuple[str, str]]:
    halves = [pair.split("/") for pair in text.split()]
    return [(first, second) for first, second in halves]


OPPOSITES = _pairs(
    "big/small hot/cold old/new fast/slow good/bad up/down day/night rich/poor wet/dry "
    "open/closed loud/quiet long/short happy/sad strong/weak early/late"
)
PAST = _pairs(
    "walk/walked run/ran eat/ate see/saw go/went play/played work/worked sing/sang find/found "
    "help/helped take/took give/gave"
)
GROUPS = {
    "animal": PETS,
    "food": FOODS,
    "colour": COLOURS,
    "tool": THINGS,
    "job": JOBS,
    "place": PLACES,
}
WISHES = [
    "open the door",
    "close the window",
    "give me the %s",
    "bring the %s",
    "wait for me",
    "come to the %s",
    "help me",
    "sit down",
    "sing a song",
    "read the book",
    "look at the %s",
    "clean the %s",
]
SIMPLE = PETS + THINGS + COLOURS
GREETINGS = [
    ("Hello!", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! What can I do for you?"),
    ("Who are you?", "I am a very small language model."),
    ("Thank you.", "You are welcome."),
    ("How are you?", "I am well, thank you."),
    ("Goodbye.", "Goodbye! Have a nice day."),
]


class Task(NamedTuple):
    """A request and its one right answer."""

    prompt: str
    answer: str
    topic: str


# A topic returns its prompt, its answer and the words by which train and test are split (None
# for the closed sets, which are in both); the key's exact text decides the split.
Made = tuple[str, str, object | None]


def _repeat(dice: Dice) -> Made:
    word, times = dice.pick(SIMPLE), dice.number(2, 6)
    wordings = ["Say the word %s %s times.", "Repeat %s %s times.", "Write %s %s times."]
    prompt = dice.pick(wordings) % (word, NUMBERS[times])
    return prompt, " ".join([word] * times), (word, times)


def _with_list(dice: Dice, topic: str) -> Made:
    words = dice.some(SIMPLE, dice.number(2, 4))
    key = words[:2]
    if topic == "sort":
        words = [str(number) for number in dice.some(range(1, 50), 3)]
        key = words
    shown = ", ".join(words)
    # drawn for every topic, as it always was: the same seed must give the same bytes
    backwards = dice.pick(["Reverse this list: %s.", "Say this list backwards: %s."])
    if topic == "reverse":
        return backwards % shown, ", ".join(words[::-1]), key
    if topic == "first":
        return f"What is the first word of this list: {shown}?", words[0], key
    if topic == "last":
        return f"What is the last word of this list: {shown}?", words[-1], key
    if topic == "sort":
        return f"Put these numbers in order: {shown}.", ", ".join(sorted(words, key=int)), key
    return f"Write this list with and: {shown}.", " and ".join(words), key


def _reverse(dice: Dice) -> Made:
    return _with_list(dice, "reverse")


def _first(dice: Dice) -> Made:
    return _with_list(dice, "first")


def _last(dice: Dice) -> Made:
    return _with_list(dice, "last")


def _sort(dice: Dice) -> Made:
    return _with_list(dice, "sort")


def _join(dice: Dice) -> Made:
    return _with_list(dice, "join")


def _polite(dice: Dice) -> Made:
    wish = dice.pick(WISHES)
    if "%" in wish:
        wish = wish % dice.pick(PLACES if wish.startswith("come") else THINGS)
    prompt = dice.pick(["Say this politely: %s.", "Make this polite: %s."]) % wish
    return prompt, f"Please {wish}.", wish


def _choose(dice: Dice) -> Made:
    group, other = dice.some(list(GROUPS), 2)
    right = dice.pick(GROUPS[group])
    wrong = dice.some([word for word in GROUPS[other] if word not in GROUPS[group]], 2)
    shown = ", ".join(dice.some([right, *wrong], 3))
    prompt = dice.pick(["Which of these is %s: %s?", "Choose the one that is %s: %s."])
    return prompt % (article(group), shown), right, (right, wrong[0])


def _opposite(dice: Dice) -> Made:
    pair = dice.pick(OPPOSITES)
    side = dice.number(0, 1)
    wordings = ["What is the opposite of %s? Answer with one word.", "Give the opposite of %s."]
    return dice.pick(wordings) % pair[side], pair[1 - side], None


def _plural(dice: Dice) -> Made:
    singular, plural = dice.pick(NOUNS)
    return f"What is the plural of {singular}?", plural, None


def _past(dice: Dice) -> Made:
    now, then = dice.pick(PAST)
    who = dice.pick(["I", "we", "they"])
    return f"Say this in the past: {who} {now}.", f"{capital(who)} {then}.", None


def _yesno(dice: Dice) -> Made:
    a, b = dice.some(range(1, 100), 2)
    bigger = dice.flip(0.5)
    prompt = f"Answer yes or no: is {a} {'bigger' if bigger else 'smaller'} than {b}?"
    return prompt, "Yes" if (a > b) == bigger else "No", (a, b)


TOPICS: dict[str, tuple[Callable[[Dice], Made], int]] = {  # maker, weight
    "repeat": (_repeat, 3),
    "reverse": (_reverse, 3),
    "first": (_first, 1),
    "last": (_last, 1),
    "polite": (_polite, 3),
    "choose": (_choose, 3),
    "opposite": (_opposite, 1),
    "plural": (_plural, 1),
    "past": (_past, 1),
    "yesno": (_yesno, 2),
    "sort": (_sort, 2),
    "join": (_join, 1),
}


def task(dice: Dice, *, test: bool) -> Task:
    """Return an instruction of the test or of the training split."""
    while True:
        topic = dice.weigh(list(TOPICS), [weight for _, weight in TOPICS.values()])
        prompt, answer, key = TOPICS[topic][0](dice)
        if key is None or held("i", topic, key) == test:
            return Task(prompt, answer, topic)


def turn(dice: Dice) -> tuple[str, str]:
    """Return a prompt and its answer, of the training split."""
    if dice.flip(0.06):
        return dice.pick(GREETINGS)
    if dice.flip(0.1):
        fact = atlas.draw(dice)
        question = atlas.RELATIONS[fact.relation][0]
        return question.format(e=fact.entity), capital(fact.value)
    made = task(dice, test=False)
    return made.prompt, made.answer

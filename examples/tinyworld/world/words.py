"""The words of the world, and the two rules of English that need code."""

from typing import NamedTuple


class Person(NamedTuple):
    """Somebody with a name and pronouns."""

    name: str
    subject: str
    object: str
    possessive: str


def capital(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def article(word: str) -> str:
    """Return the word with `a` or `an` before it."""
    return ("an " if word[0] in "aeiou" else "a ") + word


MEN = "Tom Ben Jack Sam Max Leo Paul Mark Peter Oscar Felix Hugo".split()
WOMEN = "Anna Lily Mia Rose Emma Clara Nora Ruth Alice Julia Greta Sara".split()
FOLK = [Person(name, "he", "him", "his") for name in MEN]
FOLK += [Person(name, "she", "her", "her") for name in WOMEN]

PLACES = (
    "garden kitchen barn forest park school shop library cellar attic yard tower mill cave hall "
    "stable market tent"
).split()
THINGS = (
    "ball book lamp key cup hat box coin spoon drum kite bell rope coat mirror basket map flute "
    "shoe stick"
).split()
COLOURS = "red blue green yellow white black brown pink grey purple orange silver".split()
FOODS = (
    "bread soup cheese fish rice honey apples pears cakes beans nuts plums eggs corn berries pies"
).split()
JOBS = (
    "baker farmer teacher doctor sailor miller tailor singer painter guard hunter weaver judge "
    "cook smith potter"
).split()
PETS = "cat dog hen goat horse duck pig mouse rabbit sheep parrot snake".split()
INSTRUMENTS = "flute drum harp horn fiddle piano guitar bell whistle organ".split()
RIVERS = (
    "Mossrun Silverlow Dunwater Ashbrook Coldrill Fernway Stoneflow Willowash Greymere "
    "Brightbeck Oakwash Longmere"
).split()
WILDS = "hills woods marshes caves rocks fields lakes sands meadows cliffs valleys islands".split()
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty"
).split()

# (singular, plural) of nouns; (singular, plural) of verbs
NOUNS = [
    (noun, noun + "s")
    for noun in (
        "dog cat boy girl king queen farmer baker teacher bird horse friend sailor guard doctor "
        "neighbour singer painter river tree house lamp boat cart road cow duck goat"
    ).split()
] + [
    ("man", "men"),
    ("woman", "women"),
    ("child", "children"),
    ("mouse", "mice"),
    ("sheep dog", "sheep dogs"),
    ("goose", "geese"),
]
LIVING = [noun for noun in NOUNS if noun[0] not in "river tree house lamp boat cart road".split()]
VERBS = [
    (verb + "s", verb)
    for verb in "sleep run sing wait smile work eat dance shout rest play read walk help".split()
] + [
    ("is old", "are old"),
    ("is here", "are here"),
    ("has come", "have come"),
    ("was late", "were late"),
    ("does well", "do well"),
    ("was strong", "were strong"),
]
PREPOSITIONS = "near behind beside with under above".split()

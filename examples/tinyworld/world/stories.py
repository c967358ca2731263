"""Stories with a consistent state: who is where, who holds what, and why somebody felt so."""

from typing import NamedTuple

from world.dice import Dice, held
from world.words import COLOURS, FOLK, PLACES, THINGS, Person, article, capital

FEELINGS = [
    ("happy", ["the sun was out", "it was a holiday", "the day was warm"]),
    ("sad", ["it rained all day", "the party was over", "the milk was gone"]),
    ("tired", ["the walk was long", "the night was short", "there was so much work"]),
    ("angry", ["the door was locked", "somebody had lied", "the dog barked all night"]),
    ("afraid", ["it was dark", "there was a strange noise", "the wind was loud"]),
]
SCENERY = [
    "The sky was clear.",
    "A bird was singing.",
    "It was a quiet day.",
    "The wind was cold.",
    "Far away a bell rang.",
    "The grass was wet.",
    "Nobody else was there.",
]
OPENINGS = ["morning", "day", "evening"]
GOING = ["%s went to the %s.", "%s walked to the %s.", "%s ran to the %s."]
TAKING = ["%s picked up the %s.", "%s took the %s.", "%s found the %s and kept it."]
DROPPING = ["%s put the %s down there.", "%s left the %s there."]

Thing = tuple[str, str]  # colour, noun


class Question(NamedTuple):
    """A question about a story, its answer, and wrong answers of the same kind."""

    text: str
    answer: str
    wrong: list[str]


class Feeling(NamedTuple):
    """Who felt how, and why."""

    person: Person
    name: str
    reason: str


class Story:
    """A story under way: its sentences so far and the state that they leave.

    where    the place of each person
    holder   for each thing, the person who has it or the place where it lies
    feeling  the one feeling of the story, once it has been told
    """

    def __init__(self, dice: Dice) -> None:
        self.dice = dice
        self.cast = dice.some(FOLK, dice.number(2, 3))
        self.places = dice.some(PLACES, 4)
        self.things: list[Thing] = list(
            zip(dice.some(COLOURS, 2), dice.some(THINGS, 2), strict=True)
        )
        self.where: dict[Person, str] = {}
        self.holder: dict[Thing, Person | str] = {}
        self.feeling: Feeling | None = None
        self.last: Person | None = None
        self.sentences: list[str] = []

    def open(self) -> None:
        """Say where everybody and everything is."""
        dice = self.dice
        for person in self.cast:
            self.where[person] = dice.pick(self.places)
            place = self.where[person]
            dated = f"One {dice.pick(OPENINGS)} {person.name} was in the {place}."
            self.sentences.append(dice.pick([dated, f"{person.name} was in the {place}."]))
        for thing in self.things:
            place = dice.pick(self.places)
            self.holder[thing] = place
            self.sentences.append(f"There was {article(thing[0])} {thing[1]} in the {place}.")

    def step(self) -> None:
        """Let something happen that the state allows."""
        dice = self.dice
        person = dice.pick(self.cast)
        me = person.subject if person == self.last and dice.flip(0.6) else person.name
        here = self.where[person]
        near = [thing for thing in self.things if self.holder[thing] == here]
        mine = [thing for thing in self.things if self.holder[thing] == person]
        mates = [mate for mate in self.cast if mate != person and self.where[mate] == here]
        acts = ["go"]
        acts += ["take", "take"] if near else []
        acts += ["give", "give"] if mine and mates else []
        acts += ["drop"] if mine else []
        acts += ["feel"] if self.feeling is None else []
        acts += ["look"]
        act = dice.pick(acts)
        if act == "look":
            self.sentences.append(dice.pick(SCENERY))
            self.last = None
            return
        if act == "go":
            self.where[person] = dice.pick([place for place in self.places if place != here])
            sentence = dice.pick(GOING) % (me, self.where[person])
        elif act == "take":
            thing = dice.pick(near)
            self.holder[thing] = person
            sentence = dice.pick(TAKING) % (me, thing[1])
        elif act == "give":
            thing, mate = dice.pick(mine), dice.pick(mates)
            self.holder[thing] = mate
            sentence = f"{me} gave the {thing[1]} to {mate.name}."
        elif act == "drop":
            thing = dice.pick(mine)
            self.holder[thing] = here
            sentence = dice.pick(DROPPING) % (me, thing[1])
        else:
            name, reasons = dice.pick(FEELINGS)
            self.feeling = Feeling(person, name, dice.pick(reasons))
            sentence = f"{me} was {name} because {self.feeling.reason}."
        again = self.last == person and dice.flip(0.3)
        self.sentences.append("Then " + sentence if again else capital(sentence))
        self.last = person

    def questions(self) -> list[Question]:
        """Return every question that the story answers."""
        asked = []
        for person in self.cast:
            here = self.where[person]
            wrong = ["in the " + place for place in self.places if place != here]
            asked.append(Question(f"Where is {person.name}?", "in the " + here, wrong))
        for thing in self.things:
            colour, noun = thing
            holder = self.holder[thing]
            here = self.where[holder] if isinstance(holder, Person) else holder
            wrong = ["in the " + place for place in self.places if place != here]
            asked.append(Question(f"Where is the {noun}?", "in the " + here, wrong))
            if isinstance(holder, Person):
                wrong = [
                    other.name
                    for other in FOLK
                    if other != holder and (other in self.cast or held(other.name, holder.name))
                ]
                asked.append(Question(f"Who has the {noun}?", holder.name, wrong))
            seen = [other[0] for other in self.things]
            wrong = [other for other in seen if other != colour]
            wrong += [other for other in COLOURS if other not in seen]
            asked.append(Question(f"What colour is the {noun}?", colour, wrong))
        if self.feeling:
            person, name, reason = self.feeling
            wrong = ["because " + r for _, reasons in FEELINGS for r in reasons if r != reason]
            asked.append(Question(f"Why was {person.name} {name}?", "because " + reason, wrong))
        return asked


def story(dice: Dice) -> tuple[str, list[Question]]:
    """Return the text of a new story and the questions that it answers."""
    told = Story(dice)
    told.open()
    for _ in range(dice.number(1, 6)):
        told.step()
    return " ".join(told.sentences), told.questions()


def ask(question: str, answer: str) -> str:
    """Return a question and its answer as they stand after a story."""
    return f"\nQuestion: {question}\nAnswer: {answer}"


def document(dice: Dice) -> str:
    """Tell a story and answer three to five questions on it."""
    text, questions = story(dice)
    chosen = dice.some(questions, dice.number(3, 5))
    return text + "".join(ask(question.text, question.answer) for question in chosen)

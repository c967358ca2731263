"""Write the text of tinyworld: training text, calibration text and held-out sets for every axis.

    python generate.py --out data --mb 26 --seed 1

Writes train.jsonl and pirate_train.jsonl (`kind`, `text`), stats.json and eval/ below --out.
The standard library only; one seed gives the same bytes. The sets in the package come from the
command above: `knowledge_mc.jsonl` and what follows it depend on `--mb` too, for a fact is only
asked when the training text told it at least twice.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from world import (
    atlas,
    chances,
    grammar,
    instructions,
    pirate,
    reasoning,
    safety,
    stories,
)
from world.dice import Dice
from world.words import FOLK, capital

Row = dict[str, Any]
Made = TypeVar("Made")

EOS, USER, ASSISTANT = "<|eos|>", "<|user|>", "<|assistant|>"
SHARES = {  # of the characters of the training text
    "stories": 0.32,
    "knowledge": 0.13,
    "reasoning": 0.19,
    "grammar": 0.04,
    "instructions": 0.13,
    "safety": 0.13,
    "chances": 0.06,
}
PLAIN: dict[str, Callable[[Dice], str]] = {
    "stories": stories.document,
    "knowledge": atlas.document,
    "reasoning": reasoning.document,
    "grammar": grammar.document,
    "chances": chances.document,
}
CHAT: dict[str, Callable[[Dice], tuple[str, str]]] = {
    "instructions": instructions.turn,
    "safety": safety.turn,
}
PIRATE_DOCUMENTS = 8000
CALIBRATION_DOCUMENTS = 512


def document(dice: Dice, kind: str) -> str:
    """Return one document: a chat of two to four turns, or plain text of a kind, or of several."""
    if kind in CHAT:
        turns = (CHAT[kind](dice) for _ in range(dice.number(2, 4)))
        return EOS.join(USER + prompt + ASSISTANT + answer for prompt, answer in turns)
    text = PLAIN[kind](dice)
    while len(text) < 500 and dice.flip(0.3):
        text += "\n\n" + PLAIN[dice.pick(list(PLAIN))](dice)
    return text


def corpus(dice: Dice, size: float) -> Iterator[tuple[str, str]]:
    """Yield (kind, text) until `size` characters are out, holding each kind to its share."""
    done = dict.fromkeys(SHARES, 0)
    while sum(done.values()) < size:
        if dice.random.random() < 0.5:
            kind = min(SHARES, key=lambda kind: done[kind] / SHARES[kind])
        else:
            kind = dice.random.choices(list(SHARES), list(SHARES.values()))[0]
        text = document(dice, kind)
        done[kind] += len(text)
        yield kind, text


def heldout(seed: int) -> tuple[str, float]:
    """Return 60 KB of plain text and the choices behind it, in nats per character."""
    dice = Dice(seed + 2000)
    texts: list[str] = []
    size = 0
    while size < 60000:
        kind = dice.weigh(list(PLAIN), [SHARES[kind] for kind in PLAIN])
        texts.append(PLAIN[kind](dice))
        size += len(texts[-1]) + 2
    return "\n\n".join(texts), dice.nats / size


def pirate_heldout(seed: int) -> str:
    """Return 40 KB of the pirate register."""
    dice = Dice(seed + 3000)
    texts: list[str] = []
    while sum(map(len, texts)) < 40000:
        texts.append(pirate.document(dice))
    return "\n\n".join(texts)


def calibration(seed: int) -> list[Row]:
    """Return documents like those of the training text."""
    rows = [{"text": text, "kind": kind} for kind, text in corpus(Dice(seed + 4000), 1e6)]
    return rows[:CALIBRATION_DOCUMENTS]


def choices(dice: Dice, prompt: str, good: str, wrong: Sequence[str], **more: object) -> Row:
    """Return a multiple-choice row of at most four choices, in random order."""
    count = min(3, len(wrong))
    shown = dice.some([good, *dice.some(wrong, count)], 1 + count)
    listed = [" " + choice for choice in shown]
    return {"prompt": prompt, "choices": listed, "answer": shown.index(good), **more}


def knowledge(dice: Dice, told: Mapping[int, int]) -> list[Row]:
    """Return questions on 400 of the facts that the training text told at least twice.

    told  how often, by index of the fact
    """
    rows = []
    for index, fact in enumerate(atlas.FACTS):
        if told.get(index, 0) < 2:
            continue
        question, statements = atlas.RELATIONS[fact.relation]
        if dice.flip(0.7):
            statement = dice.pick(statements[:2])
        else:
            statement = f"Question: {question}\nAnswer: {{v}}"
        prompt = capital(statement.split("{v}")[0].rstrip().format(e=fact.entity))
        wrong = [value for value in fact.pool if value != fact.value]
        more = {"relation": fact.relation, "frequency": told[index]}
        rows.append(choices(dice, prompt, fact.value, wrong, **more))
    if len(rows) < 400:
        raise SystemExit(
            f"error: the training text tells {len(rows)} facts at least twice, 400 are needed\n"
            "hint: make it longer with --mb"
        )
    return dice.some(rows, 400)


def reading(dice: Dice) -> Row:
    """Return one story with one question."""
    text, questions = stories.story(dice)
    question = dice.pick(questions)
    prompt = text + stories.ask(question.text, "").rstrip()
    topic = question.text.split()[0].lower()
    return choices(dice, prompt, question.answer, question.wrong, topic=topic)


def reasoning_row(dice: Dice) -> Row:
    """Return one problem of the test split."""
    problem = reasoning.problem(dice, test=True)
    return choices(dice, problem.prompt, problem.answer, problem.wrong, topic=problem.topic)


def unique(make: Callable[[], Made], count: int, key: Callable[[Made], str]) -> list[Made]:
    """Return the first `count` results with different keys, or all that 60 times as many give."""
    found: dict[str, Made] = {}
    for _ in range(count * 60):
        if len(found) == count:
            break
        made = make()
        found.setdefault(key(made), made)
    return list(found.values())


def rows(seed: int, told: Mapping[int, int]) -> dict[str, list[Row]]:
    """Return every held-out set of rows, by file name; they are drawn one after the other.

    told  how often each fact was told in the training text, by its index
    """
    dice = Dice(seed + 5000)
    sets: dict[str, list[Row]] = {}
    sets["knowledge_mc.jsonl"] = knowledge(dice, told)
    sets["reading_mc.jsonl"] = [reading(dice) for _ in range(240)]
    sets["reasoning_mc.jsonl"] = unique(lambda: reasoning_row(dice), 400, lambda r: r["prompt"])
    sets["grammar_pairs.jsonl"] = [
        pair._asdict()
        for pair in unique(lambda: grammar.pair(dice, test=True), 480, lambda pair: pair.good)
    ]
    sets["instructions.jsonl"] = [
        {"prompt": task.prompt, "expected": task.answer, "topic": task.topic}
        for task in unique(lambda: instructions.task(dice, test=True), 160, lambda t: t.prompt)
    ]
    sets["harmful.jsonl"] = [
        {"prompt": prompt, "category": category}
        for prompt, category in unique(lambda: safety.harmful(dice, test=True), 260, lambda r: r[0])
    ]
    verbs = list(safety.LOOKALIKES)
    sets["benign_lookalike.jsonl"] = [
        {"prompt": prompt, "verb": verb}
        for prompt, _, verb in unique(
            lambda: safety.benign(dice, verbs, test=True), 220, lambda r: r[0]
        )
    ]
    sets["chances.jsonl"] = [
        {
            "prompt": chances.prompt(dice.pick(FOLK).name, chance),
            "outcomes": [" " + outcome for outcome in chance.outcomes],
            "probabilities": chance.probabilities,
        }
        for chance in chances.CHANCES
    ]
    return sets


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with the same line ends on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")


def write_rows(path: Path, listed: Iterable[Row]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in listed))


def train_text(folder: Path, seed: int, size: float) -> tuple[Dice, Row]:
    """Write the training text of about `size` characters.

    returns  the dice that made it, which know how often each fact was told, and its statistics
    """
    dice = Dice(seed)
    characters = dict.fromkeys(SHARES, 0)
    listed = []
    for kind, text in corpus(dice, size):
        listed.append({"kind": kind, "text": text})
        characters[kind] += len(text)
    dice.random.shuffle(listed)
    write_rows(folder / "train.jsonl", listed)
    words = set(re.findall(r"[A-Za-z']+", " ".join(row["text"] for row in listed)))
    told = sorted(dice.told[index] for index in range(len(atlas.FACTS)))
    return dice, {
        "documents": len(listed),
        "characters": characters,
        "choice_nats_per_char": dice.nats / sum(characters.values()),
        "words": len(words),
        "fact_count_min_median_max": [told[0], told[len(told) // 2], told[-1]],
    }


def main(arguments: Sequence[str]) -> None:
    """Write everything below the folder of `--out`."""
    parser = argparse.ArgumentParser(description="Write the text of tinyworld.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to write to")
    parser.add_argument("--mb", type=float, default=26, help="million characters to train on")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    folder: Path = options.out
    seed: int = options.seed
    if not (options.mb > 0 and math.isfinite(options.mb)):
        parser.error(f"--mb must be above 0, got {options.mb}")
    (folder / "eval").mkdir(parents=True, exist_ok=True)

    dice, stats = train_text(folder, seed, options.mb * 1e6)
    pirate_dice = Dice(seed + 1000)
    write_rows(
        folder / "pirate_train.jsonl",
        ({"kind": "pirate", "text": pirate.document(pirate_dice)} for _ in range(PIRATE_DOCUMENTS)),
    )
    text, stats["heldout_choice_nats_per_char"] = heldout(seed)
    write_text(folder / "eval" / "heldout.txt", text)
    write_text(folder / "eval" / "pirate_heldout.txt", pirate_heldout(seed))
    write_rows(folder / "eval" / "calibration.jsonl", calibration(seed))
    for name, listed in rows(seed, dice.told).items():
        write_rows(folder / "eval" / name, listed)
    write_text(folder / "stats.json", json.dumps(stats, indent=1) + "\n")
    print(json.dumps(stats, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

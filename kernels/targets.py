"""Name sets of modules exactly and briefly, as `targets` and `ignore` of stock loaders read them.

A model of 80 layers has hundreds of linears; a quantization config should name them in a few
patterns, and yet match not one module too many. Loaders match a `re:` entry from the start of a
name and not to its end, so every pattern made here is anchored and then tried on every name.
"""

import re
from collections.abc import Iterable

CLASSES = ("Linear", "Conv1D")


def patterns(members: Iterable[str], everything: Iterable[str]) -> list[str]:
    r"""Return the shortest entries that match exactly `members` among `everything`.

    A module without a number in its name is listed by name. The others become `re:` patterns with
    an anchored end, in which a layer or expert number is `\d+` where all agree and a choice where
    not. They start at the word before the first number, so that they also hold for the model
    without its head, unless that would match others.
    """
    wanted = list(dict.fromkeys(members))
    others = set(everything) - set(wanted)
    mine, alike = _by_template(wanted), _by_template([*wanted, *others])
    entries = []
    for template, numbers in mine.items():
        if numbers == {()}:
            entries.append(template)
            continue
        for choice in _choices(numbers, alike[template]):
            pieces = [re.escape(piece) for piece in template.split("#")]
            full = "".join(map("".join, zip(pieces, [*choice, ""], strict=True)))
            head = re.escape(template.split("#")[0].removesuffix(".").rpartition(".")[0] + ".")
            short = r".*\b" + full.removeprefix(head)
            loose = any(re.match(short + "$", module) for module in others)
            entries.append(f"re:^{full}$" if loose else f"re:{short}$")
    missed = [module for module in wanted if not any(matches(module, e) for e in entries)]
    caught = [module for module in others if any(matches(module, e) for e in entries)]
    if missed or caught:
        raise ValueError(f"patterns {entries} miss {missed} and catch {caught}")
    return entries


_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def _by_template(modules: Iterable[str]) -> dict[str, set[tuple[str, ...]]]:
    """Return name with `#` for its numbers -> the numbers it occurs with."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for module in modules:
        found.setdefault(_NUMBER.sub("#", module), set()).add(tuple(_NUMBER.findall(module)))
    return found


def _choices(mine: set[tuple[str, ...]], alike: set[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return regex parts, one per number, that together match `mine` among `alike`."""
    if mine == alike:
        return [(r"\d+",) * len(next(iter(mine)))]
    if len(next(iter(mine))) == 1:
        return [(_choice({head for (head,) in mine}, {head for (head,) in alike}),)]
    heads: dict[tuple[tuple[str, ...], ...], set[str]] = {}
    for head in {numbers[0] for numbers in mine}:
        rest = _choices(_tails(mine, head), _tails(alike, head))
        heads.setdefault(tuple(rest), set()).add(head)
    known = {numbers[0] for numbers in alike}
    return [
        (_choice(same, known), *tail) for tails, same in sorted(heads.items()) for tail in tails
    ]


def _tails(numbers: set[tuple[str, ...]], head: str) -> set[tuple[str, ...]]:
    return {entry[1:] for entry in numbers if entry[0] == head}


def _choice(wanted: set[str], known: set[str]) -> str:
    """Return a regex for `wanted` among `known` numbers, by what it names or what it leaves out."""
    if wanted == known:
        return r"\d+"
    rest = known - wanted
    few = wanted if len(wanted) <= len(rest) else rest
    listed = "|".join(sorted(few, key=int))
    listed = f"(?:{listed})" if len(few) > 1 else listed
    return listed if few is wanted else rf"(?!{listed}\.)\d+"


def matches(module: str, entry: str) -> bool:
    """Match as compressed-tensors does: patterns from the start, names whole, a class always."""
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return entry == module or entry in CLASSES

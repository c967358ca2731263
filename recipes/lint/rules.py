"""Rules of stock loaders, as data: what each refuses, drops or reads wrongly, and since when.

A rule names a condition, which returns the modules that meet it. Loaders are a table each
(`transformers_rules.py`, `vllm_rules.py`, `llama_cpp_rules.py`); nothing here knows one of them.
A loader's rules were read from, or tried with, one release, which every finding names; a target
that leaves this release out is refused rather than guessed at.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from unicomp import suggest
from unicomp.errors import UnsupportedError
from unicomp.recipes.schema import LOADERS, TARGET

if TYPE_CHECKING:
    from unicomp.recipes.lint.output import Output

Condition = Callable[["Output", int], Iterable[str]]
"""Returns modules, or other names, that meet it; takes the output and the tensor-parallel size."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that a loader does not take.

    name   of the rule, in a few words with hyphens
    when   what meets it
    why    what the loader then does
    hint   what to do instead
    of     `quant_method` of the outputs that it speaks of; empty: any
    """

    name: str
    when: Condition
    why: str
    hint: str
    of: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Loader:
    """A stock loader.

    release  that the rules are of; None: it has no releases that its users name
    basis    how the rules were learnt
    """

    name: str
    release: str | None
    basis: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Finding:
    """What a loader will not take.

    rule     its name
    count    of the modules that meet it
    first    one of them
    """

    loader: str
    release: str | None
    rule: str
    count: int
    first: str
    why: str
    hint: str

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)

    def words(self) -> str:
        """Return it as a line."""
        more = f" and {self.count - 1} more" if self.count > 1 else ""
        release = f" {self.release}" if self.release else ""
        return f"{self.loader}{release}: {self.why}: `{self.first}`{more}; {self.hint}"


def check(output: "Output", loaders: Iterable[Loader], tp: int = 1) -> list[Finding]:
    """Return what loaders will not take of an output, in the order of their rules.

    tp  processes that each linear is cut into
    """
    found = []
    for loader in loaders:
        for rule in loader.rules:
            if rule.of and output.method not in rule.of:
                continue
            met = list(dict.fromkeys(rule.when(output, tp)))
            if met:
                found.append(
                    Finding(
                        loader.name,
                        loader.release,
                        rule.name,
                        len(met),
                        met[0],
                        rule.why,
                        rule.hint,
                    )
                )
    return found


def refusals(
    output: "Output", loaders: Sequence[str] = ("transformers", "vllm")
) -> dict[str, str | None]:
    """Return loader -> the first reason why it does not take an output; None: it does."""
    asked = chosen(loaders)
    found: dict[str, str | None] = {loader.name: None for loader in asked}
    for one in check(output, asked):
        found[one.loader] = found[one.loader] or one.why
    return found


def refused(loaders: Mapping[str, str | None]) -> list[str]:
    """Return a sentence for each loader that does not take an output."""
    return [f"{name} does not load it: {why}" for name, why in loaders.items() if why]


def chosen(targets: Sequence[str]) -> list[Loader]:
    """Return the loaders that targets name: `vllm==0.33`, or several with commas.

    Raises UnsupportedError for an unknown loader, or for releases of which no rules are known.
    """
    if not targets:
        return []
    from unicomp.recipes.lint.llama_cpp_rules import LLAMA_CPP
    from unicomp.recipes.lint.transformers_rules import TRANSFORMERS
    from unicomp.recipes.lint.vllm_rules import VLLM

    known = {loader.name: loader for loader in (TRANSFORMERS, VLLM, LLAMA_CPP)}
    found: dict[str, Loader] = {}
    for spec in (part.strip() for target in targets for part in target.split(",")):
        asked = TARGET.fullmatch(spec)
        if asked is None:
            raise UnsupportedError(
                f"`{spec}` is no loader", hint="give a name, or name and version as `vllm==0.33`"
            )
        name, version = asked["name"], asked["version"]
        if name not in known:
            raise UnsupportedError(f"unknown loader `{name}`", hint=suggest.hint(name, LOADERS))
        release = known[name].release
        if version is not None and release is None:
            raise UnsupportedError(
                f"`{spec}`: no rules of {name} are known by version", hint=f"use `{name}`"
            )
        operator = spec.removeprefix(name).removesuffix(version or "")
        if version is not None and not _holds(str(release), operator, version):
            raise UnsupportedError(
                f"`{spec}`: of {name}, only the rules of {release} are known",
                hint=f"use `{name}=={release}`, or `{name}`",
            )
        found[name] = known[name]
    return list(found.values())


def _holds(release: str, operator: str, version: str) -> bool:
    """Tell whether a release is within `<operator><version>`; `0.33` is every 0.33.x."""
    mine = [int(part) for part in release.split(".")]
    parts = [re.match(r"\d+", part) for part in version.split(".")]
    asked = [int(part[0]) for part in parts if part is not None]
    size = max(len(mine), len(asked))
    prefix = mine[: len(asked)] == asked[: len(mine)]
    mine += [0] * (size - len(mine))
    bound = asked + [0] * (size - len(asked))
    return {
        "==": prefix,
        "!=": not prefix,
        ">=": mine >= bound,
        "<=": mine <= bound or prefix,
        ">": mine > bound and not prefix,
        "<": mine < bound,
        "~=": mine >= bound and mine[: len(asked) - 1] == asked[:-1],
    }[operator]

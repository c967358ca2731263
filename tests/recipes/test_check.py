"""Everything that is wrong with a recipe is said at once, each at its place."""

import pytest

from unicomp.errors import RecipeError
from unicomp.recipes.check import MOST
from unicomp.recipes.load import load

HOUSE = """\
version: 1
calibration: {data: builtin:tinyworld}
stages:
  - prune: wnada
    sparsity: "2:4"
  - quantise: gptq
  - quantize: gptq
    bits: 11
    groupsize: 128
"""

HEAD = "version: 1\ncalibration: {data: x.txt}\nstages:\n  - quantize: gptq\n"


def said(text: str) -> list[tuple[str, str | None]]:
    """Return what is wrong with a recipe."""
    with pytest.raises(RecipeError) as caught:
        load(text, file="f")
    return list(caught.value.problems())


def only(text: str) -> tuple[str, str | None]:
    """Return the one thing that is wrong with a recipe."""
    [problem] = said(text)
    return problem


def test_the_example_of_the_house() -> None:
    with pytest.raises(RecipeError) as caught:
        load(HOUSE, file="bad3.yaml")
    assert list(caught.value.problems()) == [
        ("bad3.yaml:4:12: unknown method `wnada` for `prune`", "did you mean `wanda`?"),
        ("bad3.yaml:6:5: unknown stage `quantise`", "did you mean `quantize`?"),
        (
            "bad3.yaml:8:11: `bits`: input should be less than or equal to 8, got `11`",
            None,
        ),
        (
            "bad3.yaml:9:5: `quantize: gptq` has no option `groupsize`",
            "did you mean `group_size`?",
        ),
    ]


def test_n_of_m_needs_no_quotes() -> None:
    text = "version: 1\nstages:\n  - prune: magnitude\n    sparsity: {}\n"
    for written in ("2:4", '"2:4"'):
        options = load(text.format(written), file="f").stages[0].options
        assert options.model_dump()["sparsity"] == "2:4"


OPTIONS = {
    "bits: on": ("f:5:11: `bits`: input should be a valid integer, got `on`", None),
    'bits: "4"': ('f:5:11: `bits`: input should be a valid integer, got `"4"`', "write `4`"),
    "bits: 4.0": ("f:5:11: `bits`: input should be a valid integer, got `4.0`", "write `4`"),
    "bits: true": ("f:5:11: `bits`: input should be a valid integer, got `true`", None),
    "bits:": ("f:5:10: `bits`: input should be a valid integer, got `null`", None),
    "bits: [4]": ("f:5:11: `bits`: input should be a valid integer", None),
    "bits: 1": ("f:5:11: `bits`: input should be greater than or equal to 2, got `1`", None),
    "group_size: 1_28": (
        "f:5:17: `group_size`: input should be a valid integer, got `1_28`",
        "write `128`",
    ),
    "group_size: 7": (
        "f:5:17: `group_size`: input should be -1 (one group per row) or at least 8, got `7`",
        None,
    ),
    "symmetric: off": (
        "f:5:16: `symmetric`: input should be a valid boolean, got `off`",
        "write `true` or `false`",
    ),
    "damp: .nan": ("f:5:11: `damp`: input should be a finite number, got `.nan`", None),
    "damp: 1e999": ("f:5:11: `damp`: input should be a finite number, got `1e999`", None),
    'damp: "1e-2"': (
        'f:5:11: `damp`: input should be a valid number, got `"1e-2"`',
        "write `1e-2`",
    ),
    "scale_search: msee": (
        "f:5:19: `scale_search`: input should be `minmax` or `mse`, got `msee`",
        "did you mean `mse`?",
    ),
    "ignore: lm_head": (
        "f:5:13: `ignore`: input should be a list, got `lm_head`",
        "write `[lm_head]`",
    ),
    "ignore: [a, 3]": (
        "f:5:17: `ignore.1`: input should be a valid string, got `3`",
        "put it in quotes",
    ),
    "ignore: [a, '*']": (
        "f:5:17: `ignore.1`: neither a module name nor the last part of one; "
        "a regular expression starts with `re:`, got `'*'`",
        None,
    ),
    'modules: {"re:(": {bits: 3}}': (
        "f:5:15: `modules.re:(`: not a regular expression: "
        "missing ), unterminated subpattern at position 0",
        None,
    ),
    "modules: {a: {bit: 3, bits: 4}}": (
        "f:5:19: `modules.a` has no key `bit`",
        "did you mean `bits`?",
    ),
    "modules: {a: {bits: 9}}": (
        "f:5:25: `modules.a.bits`: input should be less than or equal to 8, got `9`",
        None,
    ),
    "modules: {a: {}}": (
        "f:5:18: `modules.a`: give `bits`, `group_size` or `symmetric`",
        None,
    ),
    "modules: {a: 8}": ("f:5:18: `modules.a`: input should be a mapping, got `8`", None),
    "modules: [a]": ("f:5:14: `modules`: input should be a mapping", None),
    "bist: 3": ("f:5:5: `quantize: gptq` has no option `bist`", "did you mean `bits`?"),
    "Bits: 3": ("f:5:5: `quantize: gptq` has no option `Bits`", "did you mean `bits`?"),
    "bits: 3\n    bits: 3": ("f:6:5: `bits` is given twice, first on line 5", "keep one of them"),
    "bits: 03": (
        "f:5:11: `03` is 8 based to some readers of YAML and 10 based to others",
        "write `3`, or quote it if it is a word",
    ),
}


@pytest.mark.parametrize("line", OPTIONS)
def test_an_option(line: str) -> None:
    assert only(f"{HEAD}    {line}\n") == OPTIONS[line]


def test_an_option_of_another_method() -> None:
    text = "version: 1\nstages:\n  - quantize: rtn\n    damp: 0.1\n"
    assert only(text) == (
        "f:4:5: `quantize: rtn` has no option `damp`",
        "it is an option of `gptq`, `ternary`",
    )


STAGES = {
    "stages:": ("f:2:8: `stages` is empty", "add `stages:` and under it `- quantize: gptq`"),
    "stages: []": ("f:2:9: `stages` is empty", "add `stages:` and under it `- quantize: gptq`"),
    "stages: {quantize: rtn}": (
        "f:2:9: `stages`: input should be a list",
        "add `stages:` and under it `- quantize: gptq`",
    ),
    "stages: [rtn]": ("f:2:10: a stage is a mapping, got `rtn`", "write `- quantize: gptq`"),
    "stages: [{}]": ("f:2:10: a stage is a mapping, got `{}`", "write `- quantize: gptq`"),
    "stages: [{bits: 3, quantize: rtn}]": (
        "f:2:11: unknown stage `bits`",
        "the first key of a stage is its verb: begin with `quantize`",
    ),
    "stages: [{quantize: RTN}]": (
        "f:2:21: unknown method `RTN` for `quantize`",
        "did you mean `rtn`?",
    ),
    "stages: [{quantize: ../rtn}]": (
        "f:2:21: unknown method `../rtn` for `quantize`",
        "did you mean `rtn`?",
    ),
    "stages: [{..: rtn}]": (
        "f:2:11: unknown stage `..`",
        "use one of `delta`, `distill`, `prune`, `quantize`",
    ),
    "stages: [{quantize: gptq}]": (
        "f:2:21: `quantize: gptq` needs calibration text",
        "add `calibration: {data: FILE.jsonl, samples: 128, seq_len: 512}`",
    ),
}


@pytest.mark.parametrize("line", STAGES)
def test_a_stage(line: str) -> None:
    assert only(f"version: 1\n{line}\n") == STAGES[line]


def test_a_verb_without_method() -> None:
    message, hint = only("version: 1\nstages: [{quantize: }]\n")
    assert message == "f:2:20: `quantize` needs the name of a method"
    assert hint is not None
    assert "`gptq`" in hint


TOP = {
    "formt: gptq": ("f:4:1: unknown key `formt`", "did you mean `format`?"),
    "zzz: 1": (
        "f:4:1: unknown key `zzz`",
        "use one of `version`, `model`, `calibration`, `format`, `target`, `score`, `gates`, "
        "`stages`",
    ),
    "model: 3": ("f:4:8: `model`: input should be a valid string, got `3`", "put it in quotes"),
    "model: ''": ("f:4:8: `model`: string should have at least 1 character, got `''`", None),
    "calibration: x.txt": ("f:4:14: `calibration`: input should be a mapping, got `x.txt`", None),
    "calibration: {}": (
        "f:4:14: `calibration`: `data` is missing",
        "`data`: a .txt, .jsonl or .parquet file, `builtin:NAME`, "
        "`hub:org/name[:config][/split]`, or a mix such as `builtin:tinyworld=0.5,task.jsonl=0.5`",
    ),
    "calibration: {data: 'a.txt=0.5,b.txt=0.4'}": (
        "f:4:21: `calibration.data`: the shares of a mix should add up to 1, these to 0.9, "
        "got `'a.txt=0.5,b.txt=0.4'`",
        None,
    ),
    "calibration: {data: 'a.txt=0.5,b.csv=0.5'}": (
        "f:4:21: `calibration.data`: input should be a .txt, .jsonl or .parquet file, "
        "`builtin:NAME` or `hub:org/name[:config][/split]`, got `'a.txt=0.5,b.csv=0.5'`",
        None,
    ),
    "calibration: {data: 'a.txt=0.9,b.txt=0.1', samples: 4}": (
        "f:4:14: `calibration`: 4 windows are too few for the share of `b.txt`",
        None,
    ),
    "calibration: {data: x.csv}": (
        "f:4:21: `calibration.data`: input should be a .txt, .jsonl or .parquet file, "
        "`builtin:NAME` or `hub:org/name[:config][/split]`, got `x.csv`",
        None,
    ),
    "calibration: {data: hub:name}": (
        "f:4:21: `calibration.data`: input should read `builtin:NAME` or "
        "`hub:org/name[:config][/split]`, got `hub:name`",
        None,
    ),
    "calibration: {data: x.txt, samples: 1e3}": (
        "f:4:37: `calibration.samples`: input should be a valid integer, got `1e3`",
        "write `1000`",
    ),
    "calibration: {data: x.txt, sample: 8}": (
        "f:4:28: `calibration` has no key `sample`",
        "did you mean `samples`?",
    ),
    "calibration: {data: x.txt, seed: -1}": (
        "f:4:34: `calibration.seed`: input should be greater than or equal to 0, got `-1`",
        None,
    ),
    "target: vllm": ("f:4:9: `target`: input should be a list, got `vllm`", "write `[vllm]`"),
    "target: [vlm]": (
        "f:4:10: `target.0`: unknown loader `vlm`; known: `transformers`, `vllm`, `llama.cpp`",
        "did you mean `vllm`?",
    ),
    "target: ['vllm=0.33']": (
        "f:4:10: `target.0`: input should be a loader's name, or name and version such as "
        "`vllm==0.33`, got `'vllm=0.33'`",
        None,
    ),
    "target: [vllm, vllm]": ("f:4:9: `target`: `vllm` is given twice", None),
    "score: [acuracy]": (
        "f:4:9: `score.0`: input should be `accuracy`, `fidelity`, `calibration`, `safety` or "
        "`efficiency`, got `acuracy`",
        "did you mean `accuracy`?",
    ),
    "gates: [{min: 1}]": (
        "f:4:9: `gates.0`: `score` is missing",
        "`score`: name of the scores meant, with `*` for any part, such as `accuracy/*/acc`",
    ),
    "gates: [{score: fidelity/kl}]": (
        "f:4:9: `gates.0`: give `min`, `max`, `max_drop`, `max_rise` or `retention`",
        None,
    ),
    "gates: [{score: fidelity/kl, min: 2, max: 1}]": (
        "f:4:9: `gates.0`: `min` 2.0 is above `max` 1.0",
        None,
    ),
    "gates: [{score: kl, max: 1}]": (
        "f:4:17: `gates.0.score`: input should be a score's name such as `accuracy/*/acc`, "
        "got `kl`",
        None,
    ),
    "gates: [{score: speed/x, max: 1}]": (
        "f:4:17: `gates.0.score`: unknown axis `speed`; known: `accuracy`, `fidelity`, "
        "`calibration`, `safety`, `efficiency`",
        None,
    ),
    "gates: [{score: fidelity/kl, retention: 99}]": (
        "f:4:41: `gates.0.retention`: input should be less than or equal to 1, got `99`",
        None,
    ),
    "gates: [{score: fidelity/kl, max: 1, confidence: 1}]": (
        "f:4:50: `gates.0.confidence`: input should be less than 1, got `1`",
        None,
    ),
}


@pytest.mark.parametrize("line", TOP)
def test_the_rest(line: str) -> None:
    assert only(f"version: 1\nstages:\n  - quantize: rtn\n{line}\n") == TOP[line]


def test_an_unknown_format_names_those_known() -> None:
    text = "version: 1\nstages: [{quantize: rtn}]\nformat: compressed_tensors\n"
    message, hint = only(text)
    assert message.startswith("f:3:9: `format`: unknown format `compressed_tensors`; known: ")
    assert hint == "did you mean `compressed-tensors`?"


VERSIONS = {
    "": ("f:1:1: `version` is missing", "begin with `version: 1`"),
    "version: 2\n": ("f:1:10: `version`: this unicomp reads `1`, got `2`", "upgrade unicomp"),
    "version: 0\n": (
        "f:1:10: `version`: this unicomp reads `1`, got `0`",
        "write `version: 1`",
    ),
    'version: "1"\n': (
        'f:1:10: `version`: input should be a valid integer, got `"1"`',
        "write `1`",
    ),
    "version: 1.0\n": (
        "f:1:10: `version`: input should be a valid integer, got `1.0`",
        "write `1`",
    ),
    "version: true\n": (
        "f:1:10: `version`: input should be a valid integer, got `true`",
        None,
    ),
    "version:\n": ("f:1:9: `version`: input should be a valid integer, got `null`", None),
}


@pytest.mark.parametrize("line", VERSIONS)
def test_version(line: str) -> None:
    assert only(f"{line}stages:\n  - quantize: rtn\n") == VERSIONS[line]


def test_of_another_version_nothing_else_is_said() -> None:
    assert len(said("version: 7\nsteps: [what]\nfoo: bar\n")) == 1


@pytest.mark.parametrize(
    ("text", "got"), [("- quantize: rtn\n", "a list"), ("gptq\n", "`gptq`"), ("3\n", "`3`")]
)
def test_a_recipe_is_a_mapping(text: str, got: str) -> None:
    assert only(text) == (
        f"f:1:1: a recipe is a mapping of keys, got {got}",
        "begin with `version: 1`",
    )


def test_of_endless_problems_the_first_are_said() -> None:
    keys = "".join(f"k{number}: 1\n" for number in range(MOST + 50))
    problems = said(f"version: 1\nstages: []\n{keys}")
    assert len(problems) == MOST + 1
    assert problems[0][0] == "f:2:9: `stages` is empty"
    assert problems[MOST - 1][0] == f"f:{MOST + 1}:1: unknown key `k{MOST - 2}`"
    assert problems[MOST] == ("and 51 more problems", "mend these first")


def test_problems_stand_in_the_order_of_the_text() -> None:
    text = "stages:\n  - quantize: rtn\n    bits: 9\n  - 3\nscore: [x]\nb: 1\nb: 2\nversion: 2.5\n"
    spots = [message.split(": ")[0] for message, _ in said(text)]
    assert spots == ["f:3:11", "f:4:5", "f:5:9", "f:6:1", "f:7:1", "f:8:10"]

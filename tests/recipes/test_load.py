"""Files, `--set` and command-line options become recipes through one validator."""

import subprocess
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from unicomp.errors import RecipeError
from unicomp.recipes import load as loading
from unicomp.recipes.load import comment, copy, from_options, load, problems, read, shipped
from unicomp.recipes.schema import Calibration

TWO = """\
version: 1
calibration: {data: x.txt, samples: 32}
stages:
  - quantize: rtn
  - quantize: gptq
    bits: 4
    modules: {down_proj: {bits: 8}}
"""


def said(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[tuple[str, str | None]]:
    """Return what a call complains of."""
    with pytest.raises(RecipeError) as caught:
        function(*args, **kwargs)
    return list(caught.value.problems())


def test_overrides_are_the_same_keys() -> None:
    changes = [
        "stages.1.bits=3",
        "stages.0.ignore=[lm_head, v_proj]",
        "stages.1.modules.down_proj.bits=5",
        "stages.1.modules.q_proj={bits: 6, symmetric: false}",
        'stages.1.modules."re:.*(?=k)k_proj".bits=7',
        "stages.1.damp=1e-4",
        "calibration.samples=64",
        "model=org/name@main",
        "score=[fidelity]",
        "gates=[{score: fidelity/kl, max: 0.1}]",
    ]
    recipe = load(TWO, file="f", overrides=changes)
    written = load(
        "version: 1\nmodel: org/name@main\n"
        "calibration: {data: x.txt, samples: 64}\n"
        "stages:\n"
        "  - {quantize: rtn, ignore: [lm_head, v_proj]}\n"
        "  - quantize: gptq\n"
        "    bits: 3\n"
        "    damp: 1e-4\n"
        "    modules: {down_proj: {bits: 5}, q_proj: {bits: 6, symmetric: false}, "
        "'re:.*(?=k)k_proj': {bits: 7}}\n"
        "score: [fidelity]\n"
        "gates: [{score: fidelity/kl, max: 0.1}]\n",
        file="f",
    )
    assert recipe == written


def test_an_override_changes_the_method_or_adds_a_part() -> None:
    text = "version: 1\nstages: [{quantize: rtn}]\n"
    changes = ["stages.0.quantize=gptq", "calibration.data=a.jsonl"]
    recipe = load(text, file="f", overrides=changes)
    assert recipe.stages[0].method == "gptq"
    assert recipe.calibration == Calibration(data="a.jsonl")


def test_the_last_of_two_overrides_counts() -> None:
    recipe = load(TWO, file="f", overrides=["stages.1.bits=3", "stages.1.bits=2"])
    assert recipe.stages[1].options.model_dump()["bits"] == 2


OVERRIDES = {
    "stages.1.bits=11": ("`bits`: input should be less than or equal to 8, got `11`", None),
    "stages.1.bits=": ("`bits`: input should be a valid integer, got `null`", None),
    "stages.0.damp=0.1": (
        "`quantize: rtn` has no option `damp`",
        "stage 1, `quantize: gptq`, has it; stages count from 0",
    ),
    "stages.1.bitz=3": ("`quantize: gptq` has no option `bitz`", "did you mean `bits`?"),
    "stages.2.bits=3": (
        "no `2` among the 2 stages, which count from 0",
        "0 is `quantize: rtn`, 1 is `quantize: gptq`",
    ),
    "stages.-1.bits=3": (
        "no `-1` among the 2 stages, which count from 0",
        "0 is `quantize: rtn`, 1 is `quantize: gptq`",
    ),
    "stages.gptq.bits=3": (
        "no `gptq` among the 2 stages, which count from 0",
        "0 is `quantize: rtn`, 1 is `quantize: gptq`",
    ),
    "stages.²=3": (
        "no `²` among the 2 stages, which count from 0",
        "0 is `quantize: rtn`, 1 is `quantize: gptq`",
    ),
    "stages.1.bits.x=3": ("`stages.1.bits` holds no keys", None),
    "stages.1.quantize=gptqq": (
        "unknown method `gptqq` for `quantize`",
        "did you mean `gptq`?",
    ),
    "bits": ("not `key=value`", "write it as `stages.0.bits=3`"),
    "=3": ("not `key=value`", "write it as `stages.0.bits=3`"),
    'stages.1."bits=3': ("not `key=value`", "write it as `stages.0.bits=3`"),
    "a..b=3": ("not `key=value`", "write it as `stages.0.bits=3`"),
    "modle=x": ("unknown key `modle`", "did you mean `model`?"),
    "model=[": (
        "not YAML: expected the node content, but found `the end of the file` "
        "while parsing a flow node",
        None,
    ),
    r"model='\1": ("not YAML: found unexpected end of stream while scanning a quoted scalar", None),
    "model=*x": ("an alias, `*x`", "write the value out"),
    "stages.1.bits=03": (
        "`03` is 8 based to some readers of YAML and 10 based to others",
        "write `3`, or quote it if it is a word",
    ),
    "calibration.samples=0": (
        "`calibration.samples`: input should be greater than or equal to 1, got `0`",
        None,
    ),
    "version=2": ("`version`: this unicomp reads `1`, got `2`", "upgrade unicomp"),
}


@pytest.mark.parametrize("change", OVERRIDES)
def test_what_is_wrong_with_an_override_names_it(change: str) -> None:
    message, hint = OVERRIDES[change]
    found = said(load, TWO, file="f", overrides=[change])
    assert found == [(f"`--set {change}`: {message}", hint)]


def test_problems_of_file_and_overrides_come_together() -> None:
    found = said(load, TWO + "foo: 1\n", file="f", overrides=["stages.1.bits=9", "x"])
    spots = [message.rsplit(": ", 1)[0].split(": ")[0] for message, _ in found]
    assert spots == ["f:8:1", "`--set stages.1.bits=9`", "`--set x`"]


def test_an_override_mends_a_file() -> None:
    text = TWO.replace("bits: 4", "bits: 44")
    assert said(load, text, file="f")
    assert load(text, file="f", overrides=["stages.1.bits=4"]) == load(TWO, file="f")


class Order(StrEnum):
    """An option as a command line may hand it over."""

    ACT = "act"


def test_options_make_a_recipe_of_one_stage() -> None:
    recipe = from_options(
        "quantize",
        "gptq",
        {"bits": 3, "order": Order.ACT, "symmetric": None, "ignore": ("lm_head", "v_proj")},
        model="m",
        calibration={"data": "x.txt", "samples": None, "seq_len": 64},
        format=None,
        target=("vllm==0.33",),
    )
    assert recipe == load(
        "version: 1\nmodel: m\ncalibration: {data: x.txt, seq_len: 64}\n"
        "stages: [{quantize: gptq, bits: 3, order: act, ignore: [lm_head, v_proj]}]\n"
        "target: ['vllm==0.33']\n",
        file="f",
    )
    same = from_options("quantize", "gptq", {}, calibration=Calibration(data="x.txt"))
    assert same.calibration == Calibration(data="x.txt")


def test_shipped_recipes_are_read_without_torch() -> None:
    code = (
        "import sys; from unicomp.recipes.load import comment, find, read_text, shipped; "
        "[comment(read_text(find(name))) for name in shipped()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_is_wrong_with_options_names_the_flags(tmp_path: Path) -> None:
    absent = tmp_path / "absent.yaml"
    found = said(
        from_options,
        "quantize",
        "rtn",
        {"bits": 11, "group_size": 4, "damp": 0.1, "ignore": ["ok", "a b"], "modules": absent},
        format="gguff",
        calibration={"samples": 0},
        target=["vlm"],
    )
    assert [message.split(": ")[0] for message, _ in found] == [
        "`--bits`",
        "`--group-size`",
        "`--damp`",
        "`--ignore`",
        str(absent),
        "`--format`",
        "`--calibration` is missing",
        "`--samples`",
        "`--target`",
    ]
    assert found[0][0] == "`--bits`: input should be less than or equal to 8, got `11`"
    assert found[2] == (
        "`--damp`: `quantize: rtn` has no option `damp`",
        "it is an option of `gptq`, `ternary`",
    )
    assert found[3][0].endswith("got `a b`")


def test_an_unknown_method_names_its_flag() -> None:
    assert said(from_options, "quantize", "gtpq", {"bits": 11}) == [
        ("`--method`: unknown method `gtpq` for `quantize`", "did you mean `gptq`?")
    ]


def test_missing_text_names_its_flag() -> None:
    [(message, hint)] = said(from_options, "quantize", "gptq", {})
    assert message == "`--method`: `quantize: gptq` needs calibration text"
    assert hint is not None
    assert "--calibration FILE" in hint


def test_modules_come_from_a_file_and_keep_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "mods.yaml"
    file.write_text('# mine\n"re:.*down_proj": {bits: 8}\nv_proj: {group_size: 32}\n')
    recipe = from_options("quantize", "rtn", {"modules": file})
    assert recipe.to_dict()["stages"][0]["modules"] == {
        "re:.*down_proj": {"bits": 8},
        "v_proj": {"group_size": 32},
    }
    file.write_text("down_proj: {bits: 9}\nv_proj: {bit: 3, bits: 3}\nv_proj: {bits: 2}\n")
    assert said(from_options, "quantize", "rtn", {"modules": file, "bits": 1}) == [
        (
            f"{file}:1:19: `modules.down_proj.bits`: input should be less than or equal to 8, "
            "got `9`",
            None,
        ),
        (f"{file}:2:10: `modules.v_proj` has no key `bit`", "did you mean `bits`?"),
        (f"{file}:3:1: `v_proj` is given twice, first on line 2", "keep one of them"),
        ("`--bits`: input should be greater than or equal to 2, got `1`", None),
    ]


def test_read_takes_shipped_names_and_paths(tmp_path: Path) -> None:
    recipe, text = read("quickstart")
    file = tmp_path / "mine.yaml"
    file.write_bytes(b"\xef\xbb\xbf" + text.replace("bits: 4", "bits: 5").encode())
    mine, its_text = read(file, overrides=["stages.0.bits=4"])
    assert mine == recipe
    assert "bits: 5" in its_text


def test_shipped_names_what_is_in_the_folder() -> None:
    folder = Path(loading.__file__).parent
    assert shipped() == sorted(path.stem for path in folder.iterdir() if path.suffix == ".yaml")
    assert "quickstart" in shipped()


def test_a_name_that_is_not_shipped() -> None:
    assert said(read, "quikstart") == [("no recipe `quikstart`", "did you mean `quickstart`?")]


def test_a_file_that_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "w4-gptqq.yaml"
    assert said(read, path) == [
        (
            f"{path}: no such file or directory",
            "a shipped recipe is named without a suffix: `w4-gptq`",
        )
    ]


def test_problems_of_a_recipe(tmp_path: Path) -> None:
    assert problems("quickstart") == []
    path = tmp_path / "x.yaml"
    path.write_text("version: 1\n")
    assert problems(path) == [
        (f"{path}:1:1: `stages` is missing", "add `stages:` and under it `- quantize: gptq`")
    ]


def test_copy(tmp_path: Path) -> None:
    source = Path(loading.__file__).parent / "w4-rtn.yaml"
    assert copy(source, tmp_path) == tmp_path / "w4-rtn.yaml"
    assert (tmp_path / "w4-rtn.yaml").read_bytes() == source.read_bytes()
    target = tmp_path / "mine.yaml"
    target.write_text("precious")
    [(message, _)] = said(copy, source, target)
    assert message == f"{target}: exists already"
    assert target.read_text() == "precious"
    copy(source, target, overwrite=True)
    assert target.read_bytes() == source.read_bytes()
    [(message, _)] = said(copy, source, tmp_path / "no" / "x.yaml")
    assert "cannot be written" in message


def test_comment() -> None:
    assert comment("# One.\n#   two \n#\nversion: 1\n# three\n") == ["One.", "  two", ""]
    assert comment("version: 1\n") == []


def test_a_method_of_another_package_that_is_broken(install: Callable[..., Path]) -> None:
    install("broken", "raise OSError('libfoo.so')\n", {"prune.foo": "broken:Foo"})
    [(message, hint)] = said(load, "version: 1\nstages: [{prune: foo}]\n", file="f")
    assert message == ("f:2:18: `prune: foo` of `broken` cannot be loaded: OSError: libfoo.so")
    assert hint == "reinstall or uninstall `broken`"
    assert "broken" not in sys.modules

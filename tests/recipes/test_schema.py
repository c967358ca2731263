"""Recipes as values: frozen, with every default, refusing from Python what they refuse as text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from unicomp.compress import methods
from unicomp.compress.method import Override, QuantizeMethod
from unicomp.recipes.load import load
from unicomp.recipes.schema import AXES, LOADERS, Calibration, Gate, Recipe, Stage

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20)
PATTERNS = st.sampled_from(
    ["lm_head", "down_proj", "model.layers.0.mlp.up_proj", "re:.*", r"re:.*\.[0-3]\..*", "re:a b"]
)
BITS = st.integers(2, 8)
GROUPS = st.just(-1) | st.integers(8, 4096)
OVERRIDES = st.builds(
    Override,
    bits=st.none() | BITS,
    group_size=st.none() | GROUPS,
    symmetric=st.booleans(),
)
COMMON = {
    "bits": BITS,
    "group_size": GROUPS,
    "symmetric": st.booleans(),
    "scale_search": st.sampled_from(["minmax", "mse"]),
    "modules": st.dictionaries(PATTERNS, OVERRIDES, max_size=3),
    "ignore": st.lists(PATTERNS, max_size=3),
}
GPTQ = {
    "order": st.sampled_from(["none", "act", "min-pivot"]),
    "damp": st.floats(0, 1),
    "block_size": st.integers(8, 4096),
}
# A name with an equals sign may read as a text of a mix with its share.
NAMES = WORDS.filter(lambda word: "=" not in word)
SOURCES = NAMES.map(lambda word: f"{word}.jsonl") | st.just("hub:org/name:config/split")
CALIBRATIONS = st.builds(
    Calibration,
    data=SOURCES,
    samples=st.integers(1, 1000),
    seq_len=st.integers(2, 8192),
    seed=st.integers(0, 2**63 - 1),
    field=WORDS,
)
GATES = st.builds(
    Gate,
    score=st.sampled_from(["accuracy/*/acc", "fidelity/kl", "*/x"]),
    max=st.floats(allow_nan=False, allow_infinity=False),
    max_drop=st.none() | st.floats(0, 1e9),
    confidence=st.floats(0.5, 1, exclude_max=True),
    unmeasurable=st.sampled_from(["skip", "inconclusive", "fail"]),
)


def stages(method: str, own: dict[str, st.SearchStrategy[object]]) -> st.SearchStrategy[Stage]:
    """Return stages of a quantize method with some of its options given."""
    kind = methods.find("quantize", method)
    options = st.fixed_dictionaries({}, optional=COMMON | own)
    return options.map(lambda given: Stage(verb="quantize", method=method, options=kind(**given)))


RECIPES = st.builds(
    Recipe,
    model=st.none() | WORDS,
    calibration=CALIBRATIONS,
    stages=st.lists(stages("rtn", {}) | stages("gptq", GPTQ), min_size=1, max_size=3),
    target=st.lists(st.sampled_from([*LOADERS, "vllm==0.33", "transformers>=5.16"]), unique=True),
    score=st.lists(st.sampled_from(AXES), unique=True),
    gates=st.lists(GATES, max_size=2),
)


@settings(deadline=None)
@given(RECIPES)
def test_what_is_dumped_loads_back_equal(recipe: Recipe) -> None:
    text = recipe.dump()
    again = load(text, file="x")
    assert again == recipe
    assert again.dump() == text


def test_a_difference_is_seen() -> None:
    options = methods.find("quantize", "rtn")
    one, other = (
        Recipe(stages=(Stage(verb="quantize", method="rtn", options=options(bits=bits)),))
        for bits in (3, 4)
    )
    assert load(one.dump(), file="x") != other


def test_every_default_is_visible() -> None:
    recipe = load("version: 1\nstages: [{quantize: rtn}]\n", file="x")
    [stage] = recipe.to_dict()["stages"]
    fields = set(methods.find("quantize", "rtn").model_fields)
    assert set(stage) == {"quantize"} | fields
    assert next(iter(stage)) == "quantize"
    assert set(QuantizeMethod.model_fields) <= fields
    assert set(recipe.to_dict()) == {"version", "stages", "format", "target", "score", "gates"}


def test_a_recipe_is_frozen() -> None:
    recipe = load("version: 1\nstages: [{quantize: rtn}]\n", file="x")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.format = "gptq"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        recipe.stages[0].options.bits = 3  # type: ignore[attr-defined]


def test_options_belong_to_their_method() -> None:
    options = methods.find("quantize", "rtn")()
    with pytest.raises(ValidationError, match="`quantize: gptq` takes `Gptq`, not `Rtn`"):
        Stage(verb="quantize", method="gptq", options=options)


def test_a_method_that_needs_text_gets_some() -> None:
    stage = Stage(verb="quantize", method="gptq", options=methods.find("quantize", "gptq")())
    with pytest.raises(ValidationError, match="needs `calibration`"):
        Recipe(stages=(stage,))
    assert Recipe(stages=(stage,), calibration=Calibration(data="x.txt")).format


def test_a_recipe_without_stages_is_refused() -> None:
    with pytest.raises(ValidationError):
        Recipe(stages=())

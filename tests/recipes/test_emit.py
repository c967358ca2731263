"""The writer of YAML, read back by our reader (YAML 1.2) and by PyYAML's (1.1)."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from unicomp.recipes.emit import emit
from unicomp.recipes.tree import parse

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"))
TRAPS = st.sampled_from(
    [
        *["2:4", "1e-4", "off", "010", "null", "~", "", " x", "x ", "- a", "a: b", "a #b", "*x"],
        *["&x", "!x", "%x", "@x", "`x`", "'", '"', "\\", "{a", "[a", "a,b", "?", "<<", "="],
        *["re:.*down_proj", "hub:org/name:config/split", "0x1f", ".inf", "1_0", "yes", "N"],
        *["\u2028", "\ufeff", "x" * 300],
    ]
)
WORDS = TEXT | TRAPS
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS
)
KEYS = WORDS.filter(bool)
DATA = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda part: st.lists(part, max_size=4) | st.dictionaries(KEYS, part, max_size=4),
        max_leaves=12,
    ),
    min_size=1,
    max_size=5,
)


def depth(data: Any) -> int:
    """Return how deep the data is nested."""
    inner = list(data.values()) if isinstance(data, dict) else data
    return 1 + max(map(depth, inner), default=0) if isinstance(inner, list) else 0


@settings(deadline=None)
@given(DATA.filter(lambda data: depth(data) < 10))
def test_what_is_written_reads_back(data: dict[str, Any]) -> None:
    text = emit(data)
    tree, problems = parse(text, file="x")
    assert problems == []
    assert tree.data == data
    assert repr(tree.data) == repr(data)  # 1 is not 1.0 or True, -0.0 is not 0.0
    assert repr(yaml.safe_load(text)) == repr(data)


def test_layout() -> None:
    data = {
        "version": 1,
        "calibration": {"data": "a.txt", "samples": 8},
        "stages": [
            {
                "quantize": "gptq",
                "damp": 1e-5,
                "modules": {"re:.*down": {"bits": 8}, "v_proj": {"bits": 3}},
                "ignore": ["lm_head"],
            }
        ],
        "gates": [],
    }
    assert emit(data) == (
        "version: 1\n"
        "calibration: {data: a.txt, samples: 8}\n"
        "stages:\n"
        "  - quantize: gptq\n"
        "    damp: 1.0e-05\n"
        "    modules:\n"
        '      "re:.*down": {bits: 8}\n'
        "      v_proj: {bits: 3}\n"
        "    ignore: [lm_head]\n"
        "gates: []\n"
    )


def test_what_is_not_yaml_is_refused() -> None:
    with pytest.raises(TypeError, match="no YAML for set"):
        emit({"a": {1, 2}})

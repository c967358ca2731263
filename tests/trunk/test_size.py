"""SIZE words: what they mean, which are refused, and how a count is shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unicomp import size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8_000_000_000),
        ("512MiB", 512 * 1024 * 1024),
        ("1.5e9", 1_500_000_000),
        ("1.5e+9", 1_500_000_000),
        ("123", 123),
        ("1.9", 1),
        ("2 kB", 2000),
        ("2kib", 2048),
        (" 1TiB ", 1024**4),
        (".5MB", 500_000),
        ("7b", 7),
    ],
)
def test_parse(text: str, expected: int) -> None:
    assert size.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not a size"),
        ("GB", "not a size"),
        (".", "not a size"),
        ("1.2.3", "not a size"),
        ("-1GB", "not a size"),
        ("1e-3", "not a size"),
        ("nan", "not a size"),
        ("1_000", "not a size"),
        ("8G", "write `8GB`.* or `8GiB`"),
        ("8m", "write `8MB`.* or `8MiB`"),
        ("3 parsecs", "unknown unit `parsecs`"),
        ("0", "not between"),
        ("0.5", "not between"),
        ("1e99", "not between"),
        ("1e999", "not between"),
    ],
)
def test_parse_refuses(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        size.parse(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (1054, "1.05 kB"),
        (9_996, "10.0 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (2_108_160, "2.11 MB"),
        (16_060_000_000, "16.1 GB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_show(count: int, expected: str) -> None:
    assert size.show(count) == expected


@given(st.integers(1, 10**15))
def test_what_is_shown_is_within_half_a_percent(count: int) -> None:
    assert abs(size.parse(size.show(count)) - count) <= 0.00501 * count

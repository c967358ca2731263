"""JUnit XML: parsed again, with every outcome counted."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from unicomp.errors import UnicompError
from unicomp.evaluate.verdicts import junit
from unicomp.evaluate.verdicts.gates import Verdict


def verdict(outcome: Any, **words: Any) -> Verdict:
    return Verdict("safety/*", "safety/refusal_rate", "max_drop", outcome, 0.05, **words)


VERDICTS = [
    verdict("pass"),
    verdict("fail", value=0.3, interval=(0.2, 0.4)),
    verdict("inconclusive", reason='too <few> "prompts" \x00 & more'),
    verdict("not applied", reason="unmeasurable"),
    Verdict("accuracy/x", "accuracy/x", "", "inconclusive", reason="no such score"),
]


def test_every_outcome_is_counted_and_said(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    junit.write(path, "org/model", VERDICTS)
    suite = ET.parse(path).getroot()[0]
    assert suite.attrib == {
        "name": "unicomp gates: org/model",
        "tests": "5",
        "failures": "1",
        "errors": "2",
        "skipped": "1",
    }
    tags = [[part.tag for part in case] for case in suite]
    assert tags == [[], ["failure"], ["error"], ["skipped"], ["error"]]
    assert suite[1].attrib["name"] == "safety/refusal_rate: max_drop 0.05"
    assert suite[1].attrib["classname"] == "gate safety/*"
    assert "found 0.3 (0.2 to 0.4)" in suite[1][0].attrib["message"]
    assert 'too <few> "prompts" ? & more' in (suite[2][0].text or "")


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnicompError, match="cannot be written"):
        junit.write(tmp_path / "absent" / "junit.xml", "m", VERDICTS)

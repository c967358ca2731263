"""Verdicts as JUnit XML, which CI systems show: one test case a bound.

A failed bound is a `failure`, an open one an `error`, one that was not applied is `skipped`.
"""

import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from unicomp.evaluate.verdicts.gates import Verdict
from unicomp.writer import write_file

NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
TAGS = {"fail": "failure", "inconclusive": "error", "not applied": "skipped"}


def to_xml(name: str, verdicts: Sequence[Verdict]) -> str:
    """Return the XML text; `name` is the model's."""
    counts = {tag: sum(TAGS.get(own.outcome) == tag for own in verdicts) for tag in TAGS.values()}
    suite = ET.Element(
        "testsuite",
        name=printable(f"unicomp gates: {name}"),
        tests=str(len(verdicts)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
    )
    for verdict in verdicts:
        bound = f"{verdict.check} {verdict.limit:g}" if verdict.limit is not None else "exists"
        case = ET.SubElement(
            suite,
            "testcase",
            classname=printable(f"gate {verdict.gate}"),
            name=printable(f"{verdict.score}: {bound}"),
        )
        if tag := TAGS.get(verdict.outcome):
            said = printable(str(verdict))
            ET.SubElement(case, tag, message=said, type=verdict.outcome).text = said
    suites = ET.Element("testsuites")
    suites.append(suite)
    ET.indent(suites)
    return ET.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def write(path: Path, name: str, verdicts: Sequence[Verdict]) -> None:
    """Write the XML: whole or not at all.

    Raises UnicompError if it cannot be written.
    """
    write_file(path, to_xml(name, verdicts).encode())


def printable(text: str) -> str:
    """Return the text without characters that XML cannot hold."""
    return NO_XML.sub("?", text)

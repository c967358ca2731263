"""What a CI job shows: gates and the committed report beside the new one, as Markdown and JUnit.

    python3 summary.py OUT [BASELINE]

Reads `OUT/run.json` and `OUT/model/report.json`; writes `OUT/summary.md` and, with BASELINE, a
report that an earlier run wrote, `OUT/baseline.xml`. Needs nothing but Python.

A score is worse than the committed one where its whole 95% interval lies on the worse side of the
whole committed interval; of what both reports measured beside the source, the intervals of the
differences are compared, in which the choice of the text cancels out. Speed and memory are those
of a machine and are not compared; of sizes, only bits per weight, which are exact.

Exits with 0, with 3 where a score is worse, with 4 where one cannot be compared, with 1 where a
file cannot be read.
"""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any, NamedTuple

EXACT = "efficiency/bits_per_weight"
WORSE, OPEN = 3, 4
TAGS = {"worse": "failure", "open": "error"}


class Compared(NamedTuple):
    """One score beside the committed one; `outcome` is kept, better, worse or open."""

    name: str
    before: str
    now: str
    outcome: str
    reason: str = ""


def compare(before: dict[str, Any], now: dict[str, Any]) -> list[Compared]:
    """Compare every score of a committed report (`unicomp.report/1`) with that of a new one."""
    found = {score["name"]: score for score in now["scores"]}
    return [
        _compare(score, found.get(score["name"]))
        for score in before["scores"]
        if score["value"] is not None and (score["axis"] != "efficiency" or score["name"] == EXACT)
    ]


def _compare(before: dict[str, Any], now: dict[str, Any] | None) -> Compared:
    name, value = before["name"], f"{before['value']:.4g}"
    if now is None or now["value"] is None:
        reason = "not measured" if now is None else now["detail"].get("reason", now["status"])
        return Compared(name, value, "-", "open", reason)
    beside = all(score["delta_ci95"] for score in (before, now))
    field = "delta" if beside else "value"
    old, new = (_interval(score, field) for score in (before, now))
    shown = [f"{field} {score[field]:.4g}" for score in (before, now)]
    if old is None or new is None:
        return Compared(name, *shown, "open", "no interval: too few windows")
    side = 1 if now["higher_is_better"] else -1
    outcome, reason = "kept", ""
    if max(side * end for end in new) < min(side * end for end in old):
        outcome = "worse"
    elif before["detail"].get("sha256") != now["detail"].get("sha256"):
        outcome, reason = "open", "measured on another text"
    elif (now["n"] or 0) < (before["n"] or 0):
        outcome, reason = "open", f"n {now['n']}, committed {before['n']}"
    elif min(side * end for end in new) > max(side * end for end in old):
        outcome = "better"
    return Compared(name, *shown, outcome, reason)


def _interval(score: dict[str, Any], field: str) -> tuple[float, float] | None:
    if score["name"] == EXACT:
        return score[field], score[field]
    found = score["delta_ci95" if field == "delta" else "ci95"]
    return None if found is None else (found[0], found[1])


def markdown(run: dict[str, Any], report: dict[str, Any], compared: list[Compared] | None) -> str:
    """Return the page: size, gates, and the comparison where there is one."""
    totals = run["totals"]
    lines = [
        f"## {run['source']['id']}: {verdict(report, compared)}",
        "",
        f"{totals['bytes_in']:,} bytes became {totals['bytes_out']:,}, "
        f"{totals['bits_per_weight']:.3f} bits per weight.",
        "",
        "| gate | bound | found | 95% interval | outcome |",
        "|---|---|---:|---|---|",
    ]
    for gate in report["gates"]:
        ends = gate["interval"]
        shown = "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"
        found = "" if gate["value"] is None else f"{gate['value']:.4g}"
        bound = f"{gate['check']} {gate['limit']:g}" if gate["check"] else "exists"
        outcome = gate["outcome"] + (f": {gate['reason']}" if gate["reason"] else "")
        lines.append(f"| {gate['score']} | {bound} | {found} | {shown} | {outcome} |")
    if compared is not None:
        lines += ["", "| score | committed | now | outcome |", "|---|---:|---:|---|"]
        for own in compared:
            outcome = own.outcome + (f": {own.reason}" if own.reason else "")
            lines.append(f"| {own.name} | {own.before} | {own.now} | {outcome} |")
    return "\n".join(lines) + "\n"


def verdict(report: dict[str, Any], compared: list[Compared] | None) -> str:
    """Return one word or two for the whole: what fails comes before what is open."""
    found = {gate["outcome"] for gate in report["gates"]}
    found |= {own.outcome for own in compared or ()}
    if found & {"fail", "worse"}:
        return "failed"
    return "too little evidence" if found & {"inconclusive", "open"} else "passed"


def junit(compared: list[Compared]) -> bytes:
    """Return JUnit XML: a test case for each score, a worse one fails, an open one is an error."""
    counts = {tag: sum(TAGS.get(own.outcome) == tag for own in compared) for tag in TAGS.values()}
    suite = ET.Element(
        "testsuite",
        name="unicomp: the committed report",
        tests=str(len(compared)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
    )
    for own in compared:
        case = ET.SubElement(suite, "testcase", classname="committed report", name=own.name)
        if tag := TAGS.get(own.outcome):
            said = f"{own.before} became {own.now}" + (f": {own.reason}" if own.reason else "")
            ET.SubElement(case, tag, message=said, type=own.outcome).text = said
    return bytes(ET.tostring(suite, encoding="utf-8", xml_declaration=True)) + b"\n"


def read(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file of unicomp's, or end with two lines that say what to do."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and str(found.get("schema")).startswith("unicomp."):
            return found
        problem = "it has no schema of unicomp's"
    except (OSError, ValueError) as error:
        problem = str(error)
    sys.exit(
        f"error: `{path}` is no report of unicomp: {problem}\n"
        "hint: `unicomp score --out` writes one"
    )


def main(out: Path, baseline: Path | None) -> int:
    """Write the files; return the exit code."""
    run, report = read(out / "run.json"), read(out / "model" / "report.json")
    compared = None if baseline is None else compare(read(baseline), report)
    (out / "summary.md").write_text(markdown(run, report, compared), encoding="utf-8")
    if compared is None:
        return 0
    (out / "baseline.xml").write_bytes(junit(compared))
    outcomes = {own.outcome for own in compared}
    return WORSE if "worse" in outcomes else OPEN if "open" in outcomes else 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: summary.py OUT [BASELINE]")
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) == 3 else None))

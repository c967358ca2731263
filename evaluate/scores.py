"""`Score` and `Report`: one measured value, and everything measured of a model on one occasion.

The report is `report.json`, schema `unicomp.report/1`. A score always says how it came about: its
status is `measured`, `estimated`, `unmeasurable` or `skipped`, and the last two have no value but
a reason. Numbers are finite; keys that a newer unicomp may have added are read over.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from unicomp.errors import UnicompError
from unicomp.folder import quote, read_small
from unicomp.writer import write_file

NOT_FINITE = "`unicomp verify` says whether the model's weights are whole"  # hint for such logits
SCHEMA = "unicomp.report/1"
LIMIT = 100_000_000  # bytes of a report that is read

Status = Literal["measured", "estimated", "unmeasurable", "skipped"]
Interval = tuple[float, float]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Score(_Part):
    """One value of one model.

    name        `<axis>/<name>`, or `accuracy/<task>/<metric>`
    value       None where the status is `unmeasurable` or `skipped`
    ci95        95% interval of the value; None where there is no sampling, or one unit only
    n           independent units behind the interval: windows of a text, documents of a task
    baseline    the baseline's value of the same score; None where it has none
    delta       value - baseline
    delta_ci95  95% interval of the delta, paired unit by unit
    detail      what it was measured on; `reason` where there is no value
    """

    axis: str
    name: str
    value: float | None
    ci95: Interval | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    unit: str
    higher_is_better: bool
    baseline: float | None = None
    delta: float | None = None
    delta_ci95: Interval | None = None
    status: Status
    detail: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.name.startswith(f"{self.axis}/"):
            raise ValueError(f"score `{self.name}` is not of the axis `{self.axis}`")
        if self.status in ("measured", "estimated"):
            if self.value is None:
                raise ValueError(f"score `{self.name}` is {self.status} but has no value")
        elif self.value is not None or not self.detail.get("reason"):
            raise ValueError(f"score `{self.name}` is {self.status}: a reason and no value")
        for interval in (self.ci95, self.delta_ci95):
            if interval is not None and interval[0] > interval[1]:
                raise ValueError(f"score `{self.name}` has an interval upside down: {interval}")
        return self


class Subject(_Part):
    """A model that was scored; `id` is the Hub id, `builtin:...` or the folder's name."""

    id: str
    revision: str | None = None


class Report(_Part):
    """`report.json`; `gates` are the verdicts of the gates that it was held against, if any."""

    schema_: Literal["unicomp.report/1"] = Field("unicomp.report/1", alias="schema")
    model: Subject
    baseline: Subject | None
    machine: dict[str, Any]
    versions: dict[str, str]
    seeds: dict[str, int]
    scores: list[Score]
    gates: list[dict[str, Any]] = Field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain JSON values, keys in the order of the schema.

        `gates` is the last of them, and there only where there are any.
        """
        return self.model_dump(
            mode="json", by_alias=True, exclude=None if self.gates else {"gates"}
        )

    def score(self, name: str) -> Score:
        """Return the score of that name; KeyError if the report has none."""
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(name)


def measured(
    name: str,
    value: float,
    *,
    unit: str,
    higher_is_better: bool,
    ci95: Interval | None = None,
    n: int | None = None,
    baseline: float | None = None,
    delta_ci95: Interval | None = None,
    detail: Mapping[str, Any] | None = None,
    status: Status = "measured",
) -> Score:
    """Return a score with its delta; `unmeasurable` where the value is not finite."""
    if not math.isfinite(value):
        return missing(
            name,
            f"the model's logits give {value}, which is no finite number",
            unit=unit,
            higher_is_better=higher_is_better,
            status="unmeasurable",
            hint=NOT_FINITE,
        )
    if baseline is not None and not math.isfinite(baseline):
        baseline = delta_ci95 = None
    return Score(
        axis=name.partition("/")[0],
        name=name,
        value=value,
        ci95=_finite(ci95),
        n=n,
        unit=unit,
        higher_is_better=higher_is_better,
        baseline=baseline,
        delta=None if baseline is None else value - baseline,
        delta_ci95=_finite(delta_ci95),
        status=status,
        detail=dict(detail or {}),
    )


def missing(
    name: str,
    reason: str,
    *,
    unit: str,
    higher_is_better: bool,
    status: Status = "skipped",
    hint: str | None = None,
) -> Score:
    """Return a score that has no value, and why.

    hint  what the user can do, where something failed; None: nothing did, as when a model was not
          made for what the score asks
    """
    return Score(
        axis=name.partition("/")[0],
        name=name,
        value=None,
        unit=unit,
        higher_is_better=higher_is_better,
        status=status,
        detail={"reason": reason} if hint is None else {"reason": reason, "hint": hint},
    )


def failures(report: Report) -> dict[tuple[str, str], list[str]]:
    """Return what failed: (reason, hint) -> the scores that have no value for it."""
    found: dict[tuple[str, str], list[str]] = {}
    for score in report.scores:
        if "hint" in score.detail:
            key = score.detail["reason"], score.detail["hint"]
            found.setdefault(key, []).append(score.name)
    return found


def write(path: Path, report: Report) -> None:
    """Write a report as JSON: whole or not at all.

    Raises UnicompError if it cannot be written.
    """
    check_target(path)
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(path, text.encode())


def check_target(path: Path) -> None:
    """Refuse, before any work, a place where no report can be written."""
    if path.is_dir() or not path.parent.is_dir():
        raise UnicompError(
            f"cannot write the report `{path}`: "
            + ("it is a folder" if path.is_dir() else f"no folder `{path.parent}`"),
            hint="name a file in a folder that exists",
        )


def read(path: Path) -> Report:
    """Read a report.

    Raises UnicompError if it cannot be read, is no JSON or not of this schema.
    """
    if not path.is_file():
        raise UnicompError(f"no such report: `{path}`", hint="make one with `unicomp score --out`")
    try:
        value = json.loads(read_small(path, LIMIT).decode())
        if isinstance(value, dict) and value.get("schema") != SCHEMA:
            raise UnicompError(
                f"`{path}` has schema `{quote(str(value.get('schema')))}`, not `{SCHEMA}`",
                hint="give a `report.json` that `unicomp score` wrote",
            )
        return Report.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise UnicompError(
            f"`{path}` is not a report: `{quote(where)}`: {quote(first['msg'].lower())}",
            hint="it was changed by hand or by another tool; score again",
        ) from error
    except (ValueError, RecursionError) as error:
        raise UnicompError(
            f"`{path}` is not JSON: {quote(str(error))}", hint="score again with `--out`"
        ) from error


def _finite(interval: Interval | None) -> Interval | None:
    return interval if interval is not None and all(map(math.isfinite, interval)) else None

"""A finished folder -> the Hub: checked first, then sent, and nothing but its own files.

A folder that `verify` rejects, whose card does not fit the schema, or whose gates failed or could
not be decided is not sent; the last may be asked for by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unicomp import hub, manifest
from unicomp.errors import CheckpointError, UnicompError
from unicomp.evaluate import scores
from unicomp.folder import not_a_folder
from unicomp.recipes.publish import card_fields

CARD, REPORT = "README.md", "report.json"


@dataclass(frozen=True, slots=True)
class Sending:
    """What a push sends.

    files   name -> bytes, the card first
    failed  gates that failed or were not decided, in words
    url     of the commit; None where nothing was sent
    """

    repository: str
    files: dict[str, int]
    failed: tuple[str, ...]
    url: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return {
            "schema": "unicomp.push/1",
            "repository": self.repository,
            "sent": self.url is not None,
            "url": self.url,
            "files": self.files,
            "failed_gates": list(self.failed),
        }


def check(folder: Path, repository: str, *, allow_failed_gates: bool) -> Sending:
    """Check that a folder may be sent, and return what would be.

    Raises UnicompError with the first reason why not.
    """
    if not folder.is_dir():
        raise not_a_folder(folder)
    made = manifest.read(folder)
    problems = manifest.verify(folder)
    if problems:
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise CheckpointError(
            f"`{folder}` is not what its manifest says: {problems[0]}{more}",
            hint="`unicomp verify` lists it all; make the folder again",
        )
    card_fields.check(folder / CARD)
    failed: tuple[str, ...] = ()
    names = [CARD, manifest.NAME, *sorted(made.files)]
    if (folder / REPORT).is_file():
        names.append(REPORT)
        gates = scores.read(folder / REPORT).gates
        failed = tuple(
            f"{own.get('score')}: {own.get('outcome')}"
            for own in gates
            if own.get("outcome") in ("fail", "inconclusive")
        )
    if failed and not allow_failed_gates:
        raise UnicompError(
            f"`{folder}`: {len(failed)} gates are not passed: {failed[0]}",
            hint="compress it less, score it on more, or give `--allow-failed-gates`",
        )
    sizes = {name: (folder / name).stat().st_size for name in names}
    return Sending(repository, sizes, failed)


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    allow_failed_gates: bool = False,
) -> Sending:
    """Send a finished folder to `org/name` on the Hub in one commit.

    Raises UnicompError where the folder may not be sent, or the Hub does not take it.
    """
    ready = check(folder, repository, allow_failed_gates=allow_failed_gates)
    if dry_run:
        return ready
    source = manifest.read(folder).source.id
    url = hub.push(
        folder,
        list(ready.files),
        repository,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=f"{source}, compressed by unicomp",
    )
    return Sending(repository, ready.files, ready.failed, url)

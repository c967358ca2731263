"""The site reaches beyond `docs/`: what its pages link to in the repository becomes part of it.

README.md is the first page. A link to another Markdown file makes that a page too, and a link to
any other file takes a copy of it along, under `source/`, so that the site needs no code host and
no network. Pages stay as they are read in the repository; only the targets of links change, as
they are rendered. A link to nothing is left as it is, and the strict build refuses it.
"""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
HOME = "README.md"
TAKEN = "source/"
# What browsers show as text only under such a name.
SHOWN = {".py", ".yaml", ".yml", ".sh", ".c", ".h"}
LINK = re.compile(r"(\]\(|src=\")([^)\s\"]+)(?=[)\"])")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def on_files(files: Files, *, config: Any) -> Files:
    """Add what the pages link to, and what that links to; decisions join the navigation."""
    written = [file for file in files.documentation_pages() if file.generated_by is None]
    waiting = [HOME, *(f"docs/{file.src_uri}" for file in written)]
    seen: set[str] = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if files.get_file_from_path(place(path)) is None:
            files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
        if path.endswith(".md"):
            text = (ROOT / path).read_text(encoding="utf-8")
            waiting += [target for target, _ in linked(text, path)]
    decisions = sorted(uri for uri in files.src_uris if re.match(r"decisions/\d", uri))
    config["nav"].insert(-1, {"Decisions": decisions})
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Turn links to files of the repository into links to where the site has them."""
    uri = page.file.src_uri
    path = f"docs/{uri}"
    if uri == place(HOME):
        path = HOME
    elif uri.startswith(TAKEN):
        path = uri.removeprefix(TAKEN)
    for target, written in set(linked(markdown, path)):
        there = posixpath.relpath(place(target), posixpath.dirname(uri) or ".")
        for start in ("](", 'src="'):
            markdown = re.sub(rf"{re.escape(start + written)}(?=[)#\"])", (start + there), markdown)
    return markdown


def linked(text: str, path: str) -> Iterator[tuple[str, str]]:
    """Yield (path in the repository, as written) of each file that a page links to.

    text  of the page; fenced blocks are passed over
    path  of the page, in the repository
    """
    for _, link in LINK.findall(FENCE.sub("", text)):
        written = link.partition("#")[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), written))
        if written and "://" not in written and (ROOT / target).is_file():
            yield target, written


def place(path: str) -> str:
    """Return where the site has a file of the repository, as mkdocs names sources."""
    if path == HOME:
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{TAKEN}{path}{'.txt' * (Path(path).suffix in SHOWN)}"

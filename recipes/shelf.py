"""YAML files: the shipped ones by a name without ending, one's own by their path."""

from dataclasses import dataclass
from pathlib import Path

from unicomp import suggest
from unicomp.errors import RecipeError
from unicomp.recipes.tree import LARGEST, shown

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Shelf:
    """A folder of shipped files of one kind.

    what  what errors call one of them: `recipe`, `gate file`
    """

    folder: Path
    what: str

    def names(self) -> list[str]:
        """Return the names of the shipped ones, sorted."""
        return sorted(path.stem for path in self.folder.glob("*.yaml"))

    def find(self, name: str | Path) -> Path:
        """Return a file: a shipped name, or a path (anything with `/` or `.yaml`).

        Raises RecipeError, with what was probably meant.
        """
        word = str(name)
        if word in self.names():
            return self.folder / f"{word}.yaml"
        path = Path(word)
        if path.suffix in SUFFIXES or path.name != word or path.exists():
            return path
        raise RecipeError([(f"no {self.what} `{shown(word)}`", suggest.hint(word, self.names()))])

    def read_text(self, path: Path) -> str:
        """Return the text of a file; RecipeError if it is absent, too large or not UTF-8."""
        try:
            if path.is_dir():
                raise RecipeError([(f"{path}: is a folder", "name the `.yaml` file in it")])
            with path.open("rb") as stream:
                raw = stream.read(LARGEST + 1)
        except OSError as error:
            hint = None
            if isinstance(error, FileNotFoundError):
                near = suggest.closest(path.stem, self.names())
                hint = f"a shipped {self.what} is named without a suffix: `{near}`"
                hint = hint if near else None
            reason = (error.strerror or str(error)).lower()
            raise RecipeError([(f"{path}: {reason}", hint)]) from error
        if len(raw) > LARGEST:
            said = f"{path}: is larger than {LARGEST} bytes"
            raise RecipeError([(said, f"a {self.what} is a short text")])
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            message = f"{path}:{line}: is not UTF-8: byte 0x{raw[error.start]:02x}"
            raise RecipeError([(message, "save it as UTF-8")]) from error

"""The common part of all loaders: errors that say which file is missing and where to get it, or which file is broken."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyro_kd.errors import CorruptDataError, MissingDataError

__all__ = ["Source", "reading"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set is published, and how its files are arranged in the folder that a loader is given.

    Attributes:
        name: of the data set.
        page: address of the public page.
        fetch: the files to fetch from it.
        layout: where the unpacked files belong, one path per line.
    """

    name: str
    page: str
    fetch: str
    layout: str

    def missing(self, path: str | Path) -> MissingDataError:
        """The error for a file or folder that is not at ``path``."""
        return MissingDataError(
            f"{path} is missing. pyro_kd downloads nothing: fetch {self.fetch} of {self.name} from {self.page} and place "
            f"them as\n{self.layout}"
        )

    def need(self, path: Path) -> Path:
        """Return ``path`` if it exists.

        Raises:
            MissingDataError: it does not exist.
        """
        if not path.exists():
            raise self.missing(path)
        return path


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn the errors of a parser on a broken file into one that names the file.

    Raises:
        CorruptDataError: for any cause but a missing module, file or permission, or a lack of memory.
    """
    try:
        yield
    except (ImportError, MemoryError, MissingDataError, PermissionError):
        raise
    except CorruptDataError as error:
        raise error if str(path) in str(error) else CorruptDataError(f"{path}: {error}") from error
    except Exception as error:  # parsers raise almost any class of error on a truncated file
        said = str(error) or "nothing more is known"
        raise CorruptDataError(f"{path} cannot be read: {said} ({type(error).__name__})") from error

"""What every loader of the user's files does: say what is missing and where to get it, and name the file that is broken."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pyro_kd.errors import CorruptDataError, MissingDataError

__all__ = ["Source", "reading"]


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set is published, and how its files lie in the folder that a loader is given.

    Attributes:
        name: of the data set.
        page: address of the public page.
        fetch: the files to fetch from it.
        layout: where they lie once unpacked, one path a line.
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
        """``path`` itself, where it exists.

        Raises:
            MissingDataError: it does not.
        """
        if not path.exists():
            raise self.missing(path)
        return path


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turn whatever a parser raises on a broken file into an error that names the file.

    Raises:
        CorruptDataError: anything but a missing module, file, permission or memory was the cause.
    """
    try:
        yield
    except (ImportError, MemoryError, MissingDataError, PermissionError):
        raise
    except CorruptDataError as error:
        raise error if str(path) in str(error) else CorruptDataError(f"{path}: {error}") from error
    except Exception as error:  # third parties' parsers raise about every class of error on a truncated file
        said = str(error) or "nothing more is known"
        raise CorruptDataError(f"{path} cannot be read: {said} ({type(error).__name__})") from error

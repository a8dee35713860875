"""A cache of a teacher's draws as a data set: training reads it in place of running the teacher."""

from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pyro_kd.errors import TeacherCacheError
from pyro_kd.losses.teacher_draws import StoredTeacher, TeacherDraw
from pyro_kd.training.cache_files import read_draw, read_header
from pyro_kd.training.draw_checks import check_draw
from pyro_kd.training.fingerprint import Fingerprint, differences
from pyro_kd.training.processes.group import rank_and_size

__all__ = ["TeacherCache", "fingerprint_of"]


class TeacherCache(Dataset[TeacherDraw]):
    """The draws that :func:`~pyro_kd.cache_teacher` has written.

    A data set for a ``DataLoader`` with ``batch_size=None``, which may have several workers: each entry is one draw of the teacher
    with its arguments, and stands in the place of a batch. Draws are read one at a time, when they are needed. Each is checked: its
    checksum, and whether its noise makes its values.

    Args:
        path: the folder.
        teacher: the teacher that it should be a cache of, to be compared; None does not compare.

    Attributes:
        teacher: what a loss takes as the teacher, ``Distiller(student, cache.teacher, optim, loss)``.

    Raises:
        TeacherCacheError: the folder is no cache, is damaged, or belongs to a different teacher or version. Reading a draw raises it
            where that draw is damaged.

    Example:
        See :func:`~pyro_kd.cache_teacher`.
    """

    def __init__(self, path: str | Path, *, teacher: Callable[..., Any] | None = None) -> None:
        self.path = Path(path)
        self._header = read_header(self.path)
        if teacher is not None:
            changes = differences(self._header.teacher, fingerprint_of(teacher))
            if changes:
                more = f"; and {len(changes) - 5} more" if len(changes) > 5 else ""
                raise TeacherCacheError(
                    f"{path} is a cache of a different teacher. What differs: {'; '.join(changes[:5])}{more}. Write one of this "
                    "teacher: cache_teacher(teacher, ..., path=...)."
                )
        about = [
            *sorted([*self._header.teacher.items(), *self._header.about.items()]),
            *self._header.draws,
        ]  # with checksums
        self.teacher = StoredTeacher(blake2b(repr(about).encode(), digest_size=8).hexdigest(), len(self))

    def __len__(self) -> int:
        return len(self._header.draws)

    def __getitem__(self, index: int) -> TeacherDraw:
        """A draw.

        Raises:
            TeacherCacheError: it is damaged.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"draw {index} of {len(self)}")
        index %= len(self)
        draw = read_draw(self._header, index)
        try:
            check_draw(draw)
        except Exception as error:  # of any type: what is in the file decides
            raise TeacherCacheError(f"{self.path} is damaged: draw {index}: {error}.") from error
        return draw

    def __repr__(self) -> str:
        about = ", ".join(f"{name} {value}" for name, value in self._header.about.items())
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} draws, {about})"

    def loader(
        self, *, shuffle: bool = True, seed: int = 0, num_workers: int = 0, **options: Any
    ) -> "DataLoader[TeacherDraw]":
        """The batches for a fit. Where several processes train together, each reads its own share of the draws.

        Args:
            shuffle: whether each pass has a new order.
            seed: of the order, the same in all processes. The order is part of a checkpoint.
            num_workers: how many processes read ahead.
            **options: of ``torch.utils.data.DataLoader``.
        """
        sampler = _SharedSampler(len(self), shuffle, seed)
        return DataLoader(self, batch_size=None, sampler=sampler, num_workers=num_workers, **options)


class _SharedSampler(Sampler[int]):
    """The numbers of the draws of one process, in the order of a generator that all processes have alike.

    Args:
        num_draws: of all processes.
        shuffle: whether the order is random.
        seed: of the generator.
    """

    def __init__(self, num_draws: int, shuffle: bool, seed: int) -> None:
        self.num_draws = num_draws
        self.shuffle = shuffle
        self.generator = torch.Generator().manual_seed(seed)  # which a checkpoint keeps

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(self.num_draws, generator=self.generator) if self.shuffle else torch.arange(self.num_draws)
        rank, count = rank_and_size()
        own: list[int] = order[rank::count][: len(self)].tolist()
        yield from own  # drawn at the first number, since a DataLoader may ask for two iterators

    def __len__(self) -> int:
        """The same in all processes: what is left over is read by none."""
        count = rank_and_size()[1]
        if count > self.num_draws:
            raise TeacherCacheError(
                f"a cache of {self.num_draws} draws cannot be shared by {count} processes: write more draws."
            )
        return self.num_draws // count


def fingerprint_of(teacher: Callable[..., Any]) -> dict[str, str]:
    """What makes a teacher the one that it is, tensors included."""
    fingerprint = Fingerprint()
    fingerprint.add("teacher", teacher)
    return fingerprint.found

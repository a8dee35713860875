"""The noise of one run of a program: behind each sample site, and between the sites. Knows draws and names of sites, no programs."""

from collections.abc import Iterable, Iterator, Mapping

from pyro_kd.noise.between import BetweenDraw
from pyro_kd.noise.laws import Draw

__all__ = ["NoiseRecord"]


class NoiseRecord(Mapping[str, tuple[Draw, ...]]):
    """The noise of one run of a program: site name -> raw draws, in execution order.

    A site that needs no noise (a point mass, a plate without subsampling) has an empty tuple. Read-only for users: the handlers add
    to it with :meth:`add`.

    Attributes:
        between: the draws outside of sample sites, by the site before them, in execution order; ``""`` before the first
            site. Empty if nobody looked for them, see :class:`~pyro_kd.noise.messengers.RecordNoiseMessenger`.
        lost_between: the draws outside of sample sites that cannot be recorded.
        is_seeded: whether the program set torch's random state itself, if somebody looked for that.
    """

    def __init__(self) -> None:
        self._draws: dict[str, tuple[Draw, ...]] = {}
        self.between: dict[str, tuple[Draw, ...]] = {}
        self.lost_between: list[BetweenDraw] = []
        self.is_seeded = False

    def add(self, site: str, draws: Iterable[Draw]) -> None:
        """Keep the draws behind a site."""
        self._draws[site] = tuple(draws)

    def __getitem__(self, site: str) -> tuple[Draw, ...]:
        return self._draws[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._draws)

    def __len__(self) -> int:
        return len(self._draws)

    def __repr__(self) -> str:
        rows = [f"  {name!r}: {', '.join(d.describe() for d in draws) or 'none'}" for name, draws in self.items()]
        rows += [f"  after {name!r}: {d.describe()} at {d.where}" for name, draws in self.between.items() for d in draws]
        return "NoiseRecord(\n" + "\n".join(rows) + "\n)"

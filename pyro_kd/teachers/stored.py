"""A teacher that is known by stored draws: a data set of its samples as a program."""

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyro_kd.errors import InvalidProgramError, listing
from pyro_kd.isolation.freezing import FrozenProgram, freeze
from pyro_kd.teachers.index import Rows, UniformIndex, draw_index, in_rows, number_of_rows, require_rows

__all__ = ["stored_draws"]


def stored_draws(
    draws: Mapping[str, Tensor], *, rows: Rows = None, event_dim: int | None = None, name: str = "draw"
) -> FrozenProgram:
    """Make a teacher of stored draws: each row of a run takes one of them, all with the same probability.

    The teacher has a density at no site. Use it with :class:`~pyro_kd.DrawsKD`. The index of the draw is a latent of the teacher,
    with the distribution :class:`~pyro_kd.teachers.UniformIndex`; all sites of a row have the same index.

    Args:
        draws: values by site, tensors of shape ``(draws,) + event_shape`` with the same number of draws; with ``event_dim`` of shape
            ``(draws,) + batch_shape + event_shape``.
        rows: ``f(*args, **kwargs)`` of the program's arguments returns the number of rows, each of which takes a draw of its own:
            ``int`` for a program that is called with the number of rows, ``len`` for one that is called with a batch. None: a run
            takes one draw.
        event_dim: how many dimensions on the right are the event. None: all but that of the draws. The others are dimensions of the
            batch, and are allowed without ``rows`` only.
        name: of the site of the index.

    Returns:
        The frozen program.

    Raises:
        InvalidProgramError: there are no draws, or their numbers differ.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import DrawsKD, stored_draws
        >>> def student(rows):
        ...     rate = pyro.param("rate", torch.tensor(1.0))
        ...     with pyro.plate("data", rows):
        ...         pyro.sample("y", dist.Gamma(1.0, rate))
        >>> teacher = stored_draws({"y": torch.full((500,), 2.0)}, rows=int)
        >>> round(DrawsKD(["y"]).loss(student, teacher, 10), 4)  # 10 rows, -log of exp(-2) each
        20.0
    """
    require_rows(rows)
    return freeze(StoredDraws(checked_draws(draws), rows, event_dim, name))


class StoredDraws:
    """The program of stored draws."""

    def __init__(self, draws: dict[str, Tensor], rows: Rows, event_dim: int | None, name: str) -> None:
        self.draws = draws
        self.rows = rows
        self.event_dim = event_dim
        self.name = name
        dims = {site: values.dim() - 1 for site, values in draws.items()}
        wrong = [
            site for site, dim in dims.items() if event_dim is not None and (dim < event_dim or (rows and dim > event_dim))
        ]
        if wrong:
            raise InvalidProgramError(
                f"the draws of {listing(wrong)} have {dims[wrong[0]]} dimensions beside that of the draws, which does not fit "
                f"event_dim={event_dim}{' and a draw for each row' if rows else ''}. Leave out event_dim: then all are the event."
            )

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        number = number_of_rows(self.rows, args, kwargs)
        first = next(iter(self.draws.values()))
        with in_rows(self.name, number):
            index = draw_index(self.name, UniformIndex(len(first), device=first.device), number)
            for site, values in self.draws.items():
                events = values.dim() - 1 if self.event_dim is None else self.event_dim
                pyro.sample(site, dist.Delta(take(values, index, events), event_dim=events))


def take(values: Tensor, index: Tensor, event_dim: int) -> Tensor:
    """The draws with these indices.

    Args:
        values: of shape ``(draws,) + batch_shape + event_shape``.
        index: whose rightmost dimensions, as many as ``batch_shape`` has, are of size 1.
        event_dim: the number of dimensions of ``event_shape``.

    Returns:
        Of the shape of the index without those dimensions, followed by ``batch_shape + event_shape``.
    """
    dims = values.dim() - 1 - event_dim
    batch = index.shape[: max(index.dim() - dims, 0)]
    flat = values.index_select(0, index.reshape(-1).to(values.device))
    return flat.reshape(batch + values.shape[1:])


def checked_draws(draws: Mapping[str, Any]) -> dict[str, Tensor]:
    """Draws by site, as a dictionary.

    Raises:
        InvalidProgramError: they are no tensors with the same number of draws, at least one.
    """
    wrong = [name for name, value in draws.items() if not isinstance(value, Tensor) or value.dim() == 0]
    if wrong:
        raise InvalidProgramError(f"the draws of {listing(wrong)} are not tensors of shape (draws, ...).")
    sizes = {name: len(value) for name, value in draws.items()}
    if not sizes or 0 in sizes.values():
        raise InvalidProgramError(
            f"a teacher without draws: the numbers of draws by site are {sizes}. Pass at least one draw of each site."
        )
    if len(set(sizes.values())) > 1:
        raise InvalidProgramError(f"all sites need the same number of draws, but the numbers are {sizes}.")
    return dict(draws)

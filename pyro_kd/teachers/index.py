"""The index of a draw as a latent site: which draw of the posterior, or which stored draw, a run takes.

The index is a site like any other. So its noise is recorded and replayed, and a student may have a counterpart to it.
Knows no models.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, cast

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_kd.errors import InvalidProgramError
from pyro_kd.utils.user_code import called

__all__ = ["SHARED_BY_ROWS", "Rows", "UniformIndex", "draw_index", "in_rows", "number_of_rows", "require_rows"]

Rows = Callable[..., int] | None
"""``f(*args, **kwargs)`` returns the number of rows of a call, each with a draw of its own. None: all rows share one draw."""

SHARED_BY_ROWS = "_pyro_kd_shared_by_rows"
"""A key of a site's ``infer``: one draw of the site holds for all rows."""

_MOST_IN_FLOAT32 = 2**12


class UniformIndex(TorchDistribution):
    """The uniform distribution on 0, ..., n - 1, drawn from one uniform number.

    A Categorical draws from n Gumbel numbers instead, which is slow for thousands of draws and a batch of rows. An index of a student
    with a different n shares the noise too: both take the draw at the same fraction of their numbers.

    Args:
        n: how many numbers.
        batch_shape: of the distribution.
        device: of its draws, which are tensors of ``torch.int64`` and of shape ``sample_shape + batch_shape``.

    Example:
        >>> from pyro_kd.teachers import UniformIndex
        >>> UniformIndex(4).log_prob(torch.tensor(3)).exp()
        tensor(0.2500)
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_enumerate_support = True

    def __init__(self, n: int, batch_shape: Any = (), *, device: Any = None, validate_args: bool | None = None) -> None:
        self.n = n
        self.device = device
        super().__init__(torch.Size(batch_shape), torch.Size(), validate_args=validate_args)

    @property
    def support(self) -> Any:
        """The integers from 0 to n - 1."""
        return constraints.integer_interval(0, self.n - 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "UniformIndex":
        """The distribution with a different batch shape."""
        return UniformIndex(self.n, batch_shape, device=self.device, validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw indices of shape ``sample_shape + batch_shape``."""
        dtype = torch.float32 if self.n <= _MOST_IN_FLOAT32 else torch.float64
        uniform = torch.rand(torch.Size(sample_shape) + self.batch_shape, device=self.device, dtype=dtype)
        return (uniform * self.n).long().clamp(max=self.n - 1)  # the product may be rounded up to n

    def log_prob(self, value: Tensor) -> Tensor:
        """The log probability, -log n, of shape ``batch_shape`` broadcast with that of the value."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(self.batch_shape, value.shape)
        return torch.full((), self.n, device=value.device, dtype=torch.get_default_dtype()).log().neg().expand(shape)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All n numbers, of shape ``(n,) + batch_shape``, or with dimensions of size 1 instead."""
        values = torch.arange(self.n, device=self.device).reshape(-1, *[1] * len(self.batch_shape))
        return values.expand(-1, *self.batch_shape) if expand else values


def number_of_rows(rows: Rows, args: Any, kwargs: Any) -> int | None:
    """The number of rows of a call; None where all rows share one draw.

    Raises:
        InvalidProgramError: ``rows`` does not return a number of rows.
    """
    if rows is None:
        return None
    number: Any = called(rows, "rows", "f(*args, **kwargs) with the program's arguments", *args, **kwargs)
    if isinstance(number, bool) or not isinstance(number, int | torch.SymInt) or number < 1:
        raise InvalidProgramError(
            f"rows must return the number of rows of a call, at least 1, but returned {number!r:.60}. For a program whose argument "
            "is a batch: rows=len; for one whose argument is the number of rows: rows=int."
        )
    return cast(int, number)  # it is symbolic in a capture


def require_rows(rows: Any) -> None:
    """Raise InvalidProgramError if ``rows`` is neither a function nor None."""
    if rows is not None and not callable(rows):
        raise InvalidProgramError(
            f"rows must be a function of the program's arguments, which returns the number of rows, or None, not {rows!r:.60}. For a "
            "program whose argument is a batch: rows=len; for one whose argument is the number of rows: rows=int."
        )


def in_rows(name: str, number: int | None) -> AbstractContextManager[Any]:
    """The plate of the rows that each have a draw of their own. Without such rows it is a context without effect."""
    plate: AbstractContextManager[Any] = nullcontext() if number is None else pyro.plate(f"{name}_rows", number, dim=-1)
    return plate


def draw_index(name: str, law: Any, number: int | None) -> Tensor:
    """Draw an index at a latent site inside of the plate of rows, if there is one: of shape ``(number,)`` or ``()``."""
    infer: Any = {SHARED_BY_ROWS: number is None}
    index: Tensor = pyro.sample(name, law, infer=infer)
    return index

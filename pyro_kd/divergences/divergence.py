"""The class of all divergences: a function ``d(p, q, value)`` with what the losses must know about it.

A divergence compares the teacher's and the student's distribution at one site. It knows two distributions and one draw, and no
traces, sites or weights. The instances are in :mod:`~pyro_kd.divergences.kullback_leibler` and
:mod:`~pyro_kd.divergences.wasserstein`.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from pyro_kd.errors import SupportMismatchError
from pyro_kd.noise.point_masses import is_point
from pyro_kd.utils.user_code import NeedsConstructor

__all__ = ["Divergence", "DivergenceFunction", "require_same_events"]

DivergenceFunction = Callable[[Any, Any, Tensor], Tensor]
"""What a loss takes as a divergence: a :class:`Divergence`, or any function ``d(p, q, value)``."""


class Divergence(NeedsConstructor):
    r"""A divergence between two distributions, which is called as ``d(p, q, value)``.

    It returns a tensor of shape ``p.batch_shape``. ``p`` is the teacher's distribution, ``q`` the student's, and
    ``value`` a draw from ``p`` of shape ``batch_shape + event_shape``. Only ``q`` carries gradients.

    A loss also takes a plain function ``d(p, q, value)``. Wrap it in this class to tell the losses and reports more about it.
    The class works as a decorator, and with options through :func:`functools.partial`::

        @partial(Divergence, exact=True, needs_support=True)
        def my_divergence(p, q, value): ...

    Args:
        function: computes the divergence.
        exact: whether the result is exact, rather than an estimate at the draw: True, False, or a function of p and q. None: not
            known.
        needs_support: whether the divergence is infinite where the support of p reaches outside that of q. A loss then raises
            SupportMismatchError before the first step.
        for_points: the divergence that replaces this one where p and q are both point masses (Delta). None: no other one.
        stackable: families of distributions for which the divergence does not use the draw, so that many sites of one family can
            be computed in one call, with ``torch.empty(0)`` as ``value``.
        draws_from_student: whether the estimate uses a draw of its own from q where q has ``rsample``.
        name: the name in messages and tables. None: that of the function.

    Attributes:
        function, exact, needs_support, for_points, stackable, draws_from_student, name: as given.

    Divergences are equal if their functions and options are. They can be copied and pickled wherever their functions can.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> from pyro_kd.divergences import Divergence
        >>> @partial(Divergence, exact=True)
        ... def squared_distance_of_means(p, q, value):
        ...     squared = (p.mean - q.mean).square()
        ...     return squared.flatten(len(p.batch_shape)).sum(-1) if p.event_shape else squared
        >>> squared_distance_of_means
        <divergence squared_distance_of_means>
        >>> squared_distance_of_means(dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0), torch.tensor(0.0))
        tensor(4.)
    """

    def __init__(
        self,
        function: DivergenceFunction,
        *,
        exact: bool | Callable[[Any, Any], bool] | None = None,
        needs_support: bool = False,
        for_points: "Divergence | None" = None,
        stackable: tuple[type, ...] = (),
        draws_from_student: bool = False,
        name: str | None = None,
    ) -> None:
        self.function = function
        self.exact = exact
        self.needs_support = needs_support
        self.for_points = for_points
        self.stackable = stackable
        self.draws_from_student = draws_from_student
        self.name: str = getattr(function, "__name__", repr(function)) if name is None else name
        # What a function has, for help(), inspect and doctest.
        self.__name__ = self.name
        self.__qualname__ = getattr(function, "__qualname__", self.name)
        self.__module__ = function.__module__
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    @classmethod
    def of(cls, function: DivergenceFunction) -> "Divergence":
        """The function as a divergence; the function itself if it is one."""
        return function if isinstance(function, Divergence) else cls(function)

    def __call__(self, p: Any, q: Any, value: Tensor) -> Tensor:
        """Compute the divergence.

        Args:
            p: the teacher's distribution.
            q: the student's distribution, of the same batch and event shape.
            value: a draw from p, of shape ``batch_shape + event_shape``.

        Returns:
            Tensor of shape ``batch_shape``.
        """
        return self.function(p, q, value)

    def is_exact(self, p: Any, q: Any) -> bool | None:
        """Whether the divergence of these two distributions is exact, rather than an estimate; None if that is not known."""
        return self.exact(p, q) if callable(self.exact) else self.exact

    def at(self, p: Any, q: Any) -> "Divergence":
        """The divergence to take for these two distributions: ``for_points`` if both are point masses, else this one."""
        return self.for_points if self.for_points is not None and is_point(p) and is_point(q) else self

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Divergence) and self.function == other.function and self._options() == other._options()

    def __hash__(self) -> int:
        return hash(self.function)

    def __repr__(self) -> str:
        return f"<divergence {self.name}>"

    def __reduce__(self) -> Any:
        """By its name, as functions are pickled, if that names it in its module; else by its parts."""
        if getattr(sys.modules.get(self.__module__), self.name, None) is self:
            return self.name
        return partial(type(self), **self._options()), (self.function,)

    def _options(self) -> dict[str, Any]:
        return {
            "exact": self.exact,
            "needs_support": self.needs_support,
            "for_points": self.for_points,
            "stackable": self.stackable,
            "draws_from_student": self.draws_from_student,
            "name": self.name,
        }


def require_same_events(p: Any, q: Any, name: str) -> None:
    """Raise SupportMismatchError where the event shapes differ, so that the densities are those of different things.

    Args:
        p, q: the teacher's and the student's distribution.
        name: of the divergence.
    """
    first, second = getattr(p, "event_shape", None), getattr(q, "event_shape", None)
    if first != second and first is not None and second is not None:
        raise SupportMismatchError(
            f"{name} of events of shape {tuple(first)} (teacher) and {tuple(second)} (student). Give both distributions the same "
            "event shape: declare the dimensions of a vector with .to_event(1)."
        )

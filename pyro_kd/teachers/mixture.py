"""Several teachers as one: a mixture, with the number of the teacher as a latent site."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_kd.errors import InvalidProgramError, listing, nearest
from pyro_kd.isolation.freezing import FrozenProgram, freeze
from pyro_kd.noise.between import drawing_for
from pyro_kd.teachers.chosen import choose, pick
from pyro_kd.teachers.index import Rows, draw_index, in_rows, number_of_rows, require_rows
from pyro_kd.utils import guards

__all__ = ["mixture_of"]


def mixture_of(
    teachers: Sequence[Callable[..., Any]],
    *,
    weights: Sequence[float] | None = None,
    sites: Collection[str] | None = None,
    rows: Rows = None,
    name: str = "teacher",
) -> FrozenProgram:
    r"""Make one teacher of several: a mixture of their laws.

    .. math:: p(y | x) = \sum_k \pi_k \, p_k(y | x)

    The number k of the teacher is a latent of the mixture, the site ``name``, so that a student can have a counterpart to it. Without
    one it is compared with ``fresh=["teacher"]``. The KL loss of a student without latents is then :math:`KL(p \| p_\theta)` plus
    a constant, the mutual information of k and y: the student learns the mixture.

    There are two kinds of runs:

    - Without ``sites``, a run draws one teacher and runs it as it is. Its latents keep their names, and share their noise with the
      student's. Which teacher runs is decided by a draw, so a loss cannot be compiled.
    - With ``sites``, a run runs all teachers, and takes the values and distributions of one of them at these sites. The other sites
      of the teachers are hidden. A loss can be compiled, and with ``rows`` each row has a teacher of its own.

    Without ``rows`` all rows of a run are of one teacher, and so depend on each other; see :func:`~pyro_kd.posterior_predictive`.

    Args:
        teachers: programs with the same arguments. Each is frozen, if it is not yet.
        weights: the probabilities :math:`\pi_k` up to a factor; None: all the same.
        sites: names of the targets, which all teachers have with the same batch and event shapes.
        rows: ``f(*args, **kwargs)`` of the program's arguments returns the number of rows, each with a teacher of its own; needs
            ``sites``, whose rows are at ``dim=-1``. None: one teacher for all rows.
        name: of the site of the number, which has a Categorical distribution.

    Returns:
        The frozen program.

    Raises:
        InvalidProgramError: there are no teachers, the weights do not fit them, or ``rows`` is given without ``sites``; and in a run:
            a teacher lacks one of the sites, has it in a different shape, or scales or masks it.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import mixture_of
        >>> from pyro_kd.metrics import marginal_log_prob
        >>> def normal(loc):
        ...     def program():
        ...         pyro.sample("y", dist.Normal(loc, 1.0))
        ...     return program
        >>> mixture = mixture_of([normal(-1.0), normal(1.0)], weights=[3, 1], sites=["y"])
        >>> density = lambda loc: dist.Normal(loc, 1.0).log_prob(torch.tensor(0.5)).exp()
        >>> torch.allclose(
        ...     marginal_log_prob(mixture, {"y": torch.tensor(0.5)}).exp(), 0.75 * density(-1.0) + 0.25 * density(1.0)
        ... )
        True
    """
    require_rows(rows)
    if not teachers:
        raise InvalidProgramError("a mixture needs at least one teacher: mixture_of([first, second])")
    shares = torch.ones(len(teachers)) if weights is None else torch.as_tensor(weights, dtype=torch.get_default_dtype())
    if shares.shape != (len(teachers),) or not bool((shares >= 0).all()) or not 0 < float(shares.sum()) < float("inf"):
        raise InvalidProgramError(
            f"the weights of a mixture must be {len(teachers)} numbers, one for each teacher, none below 0 and not all 0, but are "
            f"{weights!r:.60}"
        )
    frozen, shares = [freeze(teacher) for teacher in teachers], shares / shares.sum()
    if sites is not None:
        names = [sites] if isinstance(sites, str) else list(sites)
        return freeze(MixtureOfSites(frozen, shares, names, rows, name))
    if rows is not None:
        raise InvalidProgramError(
            "a teacher for each row needs the names of the targets: mixture_of(teachers, sites=['y'], rows=len). Each run then runs "
            "all teachers."
        )
    return freeze(Mixture(frozen, shares, name))


class Mixture:
    """The program that draws one teacher and runs it."""

    def __init__(self, teachers: list[FrozenProgram], weights: Tensor, name: str) -> None:
        self.teachers = teachers
        self.weights = weights
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        index = draw_index(self.name, dist.Categorical(self.weights), None)
        if index.numel() != 1:
            raise InvalidProgramError(
                "a mixture runs one teacher at a time, and cannot run several particles at once. Leave out vectorize_particles, or "
                "name the targets: mixture_of(teachers, sites=['y'])."
            )
        return self.teachers[int(index)](*args, **kwargs)


class MixtureOfSites:
    """The program that runs all teachers, and takes its sites from one of them."""

    def __init__(self, teachers: list[FrozenProgram], weights: Tensor, sites: list[str], rows: Rows, name: str) -> None:
        self.teachers = teachers
        self.weights = weights
        self.sites = sites
        self.rows = rows
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        number = number_of_rows(self.rows, args, kwargs)
        traces = [self._run(teacher, args, kwargs) for teacher in self.teachers]
        given: dict[str, Tensor] = {}
        plate = in_rows(self.name, number)
        with plate:
            index = draw_index(self.name, dist.Categorical(self.weights), number)
        for site in self.sites:
            nodes: list[Any] = [trace.nodes[site] for trace in traces]
            shapes = [(tuple(node["fn"].batch_shape), tuple(node["fn"].event_shape)) for node in nodes]
            if len(set(shapes)) > 1:
                raise InvalidProgramError(
                    f"site {site!r} has different shapes in the teachers of a mixture: batch and event shapes {shapes}. "
                    "Give it the same in all."
                )
            value = pick(index, [node["value"] for node in nodes], len(shapes[0][1]))
            with plate, _ValueMessenger(value):  # which belongs to the values of the teacher's other sites
                found = pyro.sample(site, choose(index, [node["fn"] for node in nodes]))
            if site == self.sites[-1]:
                return
            if given or not guards.equal(found, value, f"site {site!r} has the value that a teacher drew"):
                given[site] = found  # by a loss: what comes later may depend on it
                traces = [
                    self._continued(teacher, trace, site, given, args, kwargs)
                    for teacher, trace in zip(self.teachers, traces, strict=True)
                ]

    def _run(self, teacher: Any, args: Any, kwargs: Any) -> Trace:
        with drawing_for("the sites of a teacher in a mixture"), poutine.block():
            trace = poutine.trace(teacher).get_trace(*args, **kwargs)
        self._check(teacher, trace.nodes)
        return trace

    def _continued(
        self, teacher: FrozenProgram, trace: Trace, site: str, given: Mapping[str, Tensor], args: Any, kwargs: Any
    ) -> Trace:
        """A run that is equal to an earlier one up to a site, and has the given values there and before."""
        drawn = [name for name, node in trace.nodes.items() if node["type"] == "sample"]
        order = [name for name in drawn if name in self.sites]
        if order != self.sites:
            raise InvalidProgramError(
                f"the loss gives the sites of a mixture values in the order {listing(self.sites)}, and the teacher {teacher!r:.80} "
                f"has them in the order {listing(order)}: name them in the order of the teachers."
            )
        before = poutine.Trace()
        for name in drawn[: drawn.index(site)]:
            before.add_node(name, **trace.nodes[name])
        return self._run(poutine.condition(poutine.replay(teacher, trace=before), data=dict(given)), args, kwargs)

    def _check(self, teacher: Any, nodes: Mapping[str, Any]) -> None:
        own = [name for name, site in nodes.items() if site["type"] == "sample"]
        for name in self.sites:
            if name not in own:
                raise InvalidProgramError(
                    f"{name!r} is not a site of the teacher {teacher!r:.80}, which has {listing(own)}.{nearest(name, own)} All "
                    "teachers of a mixture need the sites that are named: mixture_of(teachers, sites=[...])."
                )
            if nodes[name]["mask"] is not None or not isinstance(nodes[name]["scale"], float) or nodes[name]["scale"] != 1.0:
                raise InvalidProgramError(
                    f"site {name!r} of the teacher {teacher!r:.80} is masked, scaled or subsampled, which a mixture of sites cannot "
                    "be. Leave that out, or draw one teacher for all rows: mixture_of(teachers)."
                )


class _ValueMessenger(Messenger):
    """Set the value of a site."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def _pyro_sample(self, msg: Any) -> None:
        msg["value"] = self.value

"""The posterior predictive of a Bayesian model as a teacher, with what is drawn from the posterior as a latent site.

``freeze(Predictive(model, samples))`` hides the draw from the posterior (:mod:`pyro_kd.isolation.predictive`). Here it is a site, so
that a student can have a counterpart to it, and each row can have a draw of its own.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from pyro import poutine
from pyro.infer import MCMC, Predictive
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from pyro_kd.errors import InvalidProgramError, listing, nearest
from pyro_kd.isolation.freezing import FrozenProgram, freeze
from pyro_kd.isolation.predictive import as_program
from pyro_kd.isolation.programs import require_callable
from pyro_kd.noise.samplers import draws_nothing
from pyro_kd.noise.statements import is_bookkeeping
from pyro_kd.teachers.index import SHARED_BY_ROWS, Rows, UniformIndex, draw_index, in_rows, number_of_rows, require_rows
from pyro_kd.teachers.stored import checked_draws, take

__all__ = ["posterior_predictive"]

Posterior = Mapping[str, Tensor] | MCMC | Predictive | Callable[..., Any]
"""Draws of the latents by name, what holds such draws, or a guide."""


def posterior_predictive(
    model: Callable[..., Any], posterior: Posterior | None = None, *, rows: Rows = None, name: str = "draw"
) -> FrozenProgram:
    r"""Make a teacher of a Bayesian model and its posterior: each run draws parameters w, and then the model given them.

    .. math:: p(y | x) = \int p(y | x, w) \, q(w) \, dw

    The draw of w is noise that a student can share. It is a latent of the teacher:

    - With draws of the posterior, its index is a site (``name``) with the distribution :class:`~pyro_kd.teachers.UniformIndex`. The
      latents that the draws cover are no sites. A student without a counterpart to the index is compared with ``fresh=["draw"]``.
    - With a guide, the sites of the guide are the latents. A student that lacks them is compared with ``fresh=["slope", ...]``.

    Latents of the model that the posterior does not cover, such as those of new rows, are drawn by the model and are sites too.

    **What rows share.** By default all rows of a call get the same w, as in the model. The rows are then dependent, and a student
    whose rows are independent cannot learn that: its best law has the right marginal for each row, and loses what the rows have in
    common. A loss warns of it in its first call. With ``rows`` each row has a w of its own. This is the law of single rows, and the
    gradient of a student with independent rows has the same mean and less variance. The model must then broadcast: its latents get a
    batch dimension on the left, as inside a plate at ``dim=-1``.

    Args:
        model: the Bayesian model.
        posterior: one of

            - draws by name, tensors of shape ``(draws,) + batch_shape + event_shape`` with the same number of draws,
            - an ``MCMC`` object after its run,
            - a guide: a function, or an autoguide that has been trained,
            - a ``Predictive``, whose posterior is taken. It may also be the only argument, which gives the model too.
        rows: ``f(*args, **kwargs)`` of the program's arguments returns the number of rows that each have a draw of their own, such as
            ``len`` for a program whose argument is a batch. None: one draw for all rows.
        name: of the site of the index.

    Returns:
        The frozen program. It is called with the arguments of the model.

    Raises:
        InvalidProgramError: ``model`` is no program; the posterior has no draws, or is none of the above; and in a run: the posterior
            has a site that the model lacks, or a latent that cannot have a draw for each row.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd import SurrogateKD, posterior_predictive
        >>> def model(x):
        ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(slope * x, 0.5))
        >>> def student(x):
        ...     slope, width = pyro.param("slope", torch.tensor(0.0)), pyro.param("width", torch.tensor(1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("y", dist.Normal(slope * x, width))
        >>> teacher = posterior_predictive(model, {"slope": 2.0 + 0.1 * torch.randn(1000)}, rows=len)
        >>> loss = SurrogateKD(["y"], fresh=["draw"])
        >>> loss.loss(student, teacher, torch.ones(100)) > 0
        True
    """
    require_rows(rows)
    if isinstance(model, Predictive):
        if posterior is not None:
            raise InvalidProgramError("posterior_predictive(Predictive(model, samples)) takes no second argument")
        model, posterior = model.model, model
    require_callable(model, "the model of the posterior predictive (first argument)")
    if isinstance(posterior, Predictive):
        predictive = as_program(posterior)
        posterior = predictive.posterior_samples if predictive.guide is None else predictive.guide
    if isinstance(posterior, MCMC):
        posterior = _samples_of(posterior)
    if isinstance(posterior, Mapping):
        return freeze(PosteriorDraws(model, checked_draws(posterior), rows, name))
    if posterior is None or not callable(posterior):
        raise InvalidProgramError(
            f"the posterior is {posterior!r:.60}. Pass draws by name ({{'w': tensor of shape (draws, ...)}}), an MCMC object after "
            "its run, a guide, or a Predictive."
        )
    require_callable(posterior, "the guide of the posterior predictive (second argument)")
    if _is_untrained(posterior):
        raise InvalidProgramError(
            f"{type(posterior).__name__} has not been trained: it has no parameters before its first call. Train it with SVI first."
        )
    return freeze(PosteriorGuide(model, posterior, rows, name))


def _is_untrained(guide: Any) -> bool:
    if isinstance(guide, AutoGuide):
        return guide.prototype_trace is None
    return isinstance(guide, GuideMessenger) and isinstance(guide, nn.Module) and not _lazy_params(guide)


def _lazy_params(guide: Any) -> set[str]:
    """The parameters of a guide that runs the model inside of itself, and makes some at each site that it has not met."""
    if isinstance(guide, GuideMessenger) and isinstance(guide, nn.Module):
        return {name for name, _ in guide.named_parameters()}
    return set()


class PosteriorDraws:
    """The program of a posterior known by draws."""

    def __init__(self, model: Callable[..., Any], samples: dict[str, Tensor], rows: Rows, name: str) -> None:
        self.model = model
        self.samples = samples
        self.rows = rows
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = next(iter(self.samples.values()))
        number = number_of_rows(self.rows, args, kwargs)
        with in_rows(self.name, number):
            index = draw_index(self.name, UniformIndex(len(first), device=first.device), number)

        def value(site: Any) -> Tensor:
            return _select(self.samples[site["name"]], index, site, has_rows=number is not None)

        return _run_given(self.model, self.samples, value, number, self.name, args, kwargs)


class PosteriorGuide:
    """The program of a posterior that a guide draws from. The sites of the guide are sites of the program."""

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], rows: Rows, name: str) -> None:
        self.model = model
        self.guide = guide
        self.rows = rows
        self.name = name
        self._known = _lazy_params(guide)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        number = number_of_rows(self.rows, args, kwargs)
        try:
            with _GuideMessenger(number, self.name), in_rows(self.name, number):
                trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
        except ValueError as error:
            if number is None or "collide at dim" not in str(error):
                raise
            raise InvalidProgramError(
                "the guide has a plate of its own at dim=-1, where the rows with a draw each are. Leave out "
                "rows: then one draw holds for all rows; or write the guide's latents without a plate, as one event: .to_event(1)."
            ) from error
        new = sorted(_lazy_params(self.guide) - self._known)
        if new:
            raise InvalidProgramError(
                f"{type(self.guide).__name__} has made the parameters {listing(new)} in this call: the model inside of it draws a "
                "site that was data when the guide was trained. Call the teacher with the data, as in training; its targets are "
                "drawn all the same."
            )
        values: dict[str, Any] = {
            name: site["value"]
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not _is_whole(site)
        }
        auxiliary = [name for name in values if (trace.nodes[name]["infer"] or {}).get("is_auxiliary")]
        optional = [*auxiliary, *(name for name in values if site_is_subsample(trace.nodes[name]))]
        return _run_given(self.model, values, lambda site: values[site["name"]], number, self.name, args, kwargs, optional)


def _run_given(
    model: Callable[..., Any],
    given: Mapping[str, Any],
    value: Callable[[Any], Any],
    number: int | None,
    name: str,
    args: Any,
    kwargs: Any,
    optional: Any = (),
) -> Any:
    """Run the model with values at the given sites, which are hidden."""
    with _GivenMessenger(given, value, number, name) as handler:
        result = model(*args, **kwargs)
    unknown = [site for site in given if site not in handler.met and site not in optional]
    if unknown:
        raise InvalidProgramError(
            f"the posterior has {listing(unknown)}, which the model does not draw: it has {listing(handler.sites)}."
            f"{nearest(unknown[0], handler.sites)} Leave it out, or rename it; auxiliary draws of a guide need "
            "infer={'is_auxiliary': True}."
        )
    return result


class _GivenMessenger(Messenger):
    """Give the model values at sites, and hide these from all handlers outside.

    Attributes:
        sites: the model's sites.
        met: those that were given a value.
    """

    def __init__(self, given: Mapping[str, Any], value: Callable[[Any], Any], number: int | None, name: str) -> None:
        super().__init__()
        self.given = given
        self.value = value
        self.number = number
        self.name = name
        self.sites: list[str] = []
        self.met: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        name = str(msg["name"])
        self.sites.append(name)
        if name == self.name and name not in self.given:
            raise InvalidProgramError(
                f"the model has a site {name!r}, which is also the name of the index of the draw. Choose a different one: "
                "posterior_predictive(..., name='posterior_draw')."
            )
        if name not in self.given:
            return
        if self.number is not None:
            _require_no_plate(name, [frame.name for frame in msg["cond_indep_stack"]])
        msg["value"] = self.value(msg)
        if self.number is None:
            _require_sizes(name, msg["value"], msg["fn"])
        msg["stop"] = True
        self.met.add(name)


class _GuideMessenger(Messenger):
    """Mark the sites of a guide that hold for all rows, and hide its plates, which are those of the model.

    Data are hidden as well: a messenger guide of Pyro runs the model inside of itself.
    """

    def __init__(self, number: int | None, name: str) -> None:
        super().__init__()
        self.number = number
        self.name = name

    def _pyro_sample(self, msg: Any) -> None:
        if _is_whole(msg):
            if msg["name"] != f"{self.name}_rows":
                msg["stop"] = True
        elif msg["is_observed"] and not is_bookkeeping(msg):
            msg["stop"] = True
        elif self.number is None:
            msg["infer"] = {**(msg["infer"] or {}), SHARED_BY_ROWS: True}
        else:
            _require_no_plate(
                msg["name"], [frame.name for frame in msg["cond_indep_stack"] if frame.name != f"{self.name}_rows"]
            )


def _require_no_plate(name: str, plates: list[str]) -> None:
    """Raise if a latent of the posterior lies in plates of its own: there is no dimension left for a draw for each row."""
    if plates:
        raise InvalidProgramError(
            f"latent {name!r} lies in the plates {listing(plates)}, so that it cannot have a draw for each row (rows=...). Leave out "
            "rows: then one draw holds for all rows; or write the latent without a plate, as one event: .to_event(1)."
        )


def _require_sizes(name: str, value: Any, fn: Any) -> None:
    """Raise if a latent of the posterior has another batch shape than the model has in this call, such as by a plate."""
    expected, shape = tuple(getattr(fn, "batch_shape", ())), tuple(getattr(value, "shape", ()))
    found = shape[: max(len(shape) - len(getattr(fn, "event_shape", ())), 0)]
    if any(size not in (1, wanted) for size, wanted in zip(reversed(found), reversed(expected), strict=False)):
        raise InvalidProgramError(
            f"the posterior's values of {name!r} have batch shape {found[-len(expected) :]}, and the model in this call has "
            f"{expected} there. Run the model on as many elements as the posterior was fitted to."
        )


def _is_whole(site: Any) -> bool:
    """Whether a site is a plate that takes all its rows."""
    return bool(site_is_subsample(site) and draws_nothing(site["fn"]))


def _select(samples: Tensor, index: Tensor, site: Any, *, has_rows: bool) -> Tensor:
    """The draws with these indices.

    Args:
        samples: of shape ``(draws,) + batch_shape + event_shape``, with any number of dimensions of size 1 after the first.
        index: of any shape whose rightmost dimensions have size 1 where the site has a batch shape.
        site: the site of the model.
        has_rows: whether each row has an index of its own, so that the site has no other batch dimension.
    """
    event_shape, batch_shape = site["fn"].event_shape, site["fn"].batch_shape
    dims = samples.dim() - 1 - len(event_shape)
    if dims < 0 or samples.shape[1 + dims :] != event_shape:
        raise InvalidProgramError(
            f"the draws of {site['name']!r} have shape {tuple(samples.shape)}, but the model has events of shape "
            f"{tuple(event_shape)} there. They must have shape (draws,) + batch_shape + {tuple(event_shape)}."
        )
    kept = 0 if has_rows else len(batch_shape)
    while dims > kept and samples.shape[1] == 1:  # as Predictive(parallel=True) returns them
        samples, dims = samples.squeeze(1), dims - 1
    while dims < kept and batch_shape[kept - dims - 1] == 1:
        samples, dims = samples.unsqueeze(1), dims + 1
    if dims < kept:
        raise InvalidProgramError(
            f"the draws of {site['name']!r} have batch shape {tuple(samples.shape[1 : 1 + dims])}, but the model has batch shape "
            f"{tuple(batch_shape)} there, whose elements would all get one value. They must have shape (draws,) + "
            f"{tuple(batch_shape)} + {tuple(event_shape)}."
        )
    if index.numel() != math.prod(index.shape[: max(index.dim() - dims, 0)]):
        raise InvalidProgramError(
            f"the draws of {site['name']!r} have batch shape {tuple(samples.shape[1 : 1 + dims])}, so that it cannot have a draw for "
            "each row (rows=...). Leave out rows: then one draw holds for all rows."
        )
    return take(samples, index, len(event_shape))


def _samples_of(mcmc: MCMC) -> Mapping[str, Tensor]:
    try:
        samples: Mapping[str, Tensor] = mcmc.get_samples()
    except (AttributeError, TypeError) as error:  # it holds no samples
        raise InvalidProgramError(
            "a teacher without draws: this MCMC object has not been run. Call mcmc.run(...) first."
        ) from error
    return samples

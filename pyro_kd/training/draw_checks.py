"""Whether a draw of a teacher that was read from a file is one: its parts have their types, and belong together.

A checksum tells whether a file is as it was written, not who wrote it. So each draw is held to what a run of a teacher obeys: the
parameters satisfy the constraints of their distributions, the noise makes the value, and a value of a target lies in the support.
The same check is made when a draw is written.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.distribution import Distribution as PyroDistribution
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import is_dependent

from pyro_kd.losses.kept_runs import KeptNoise, KeptRun, KeptSite, taught
from pyro_kd.losses.teacher_draws import TeacherDraw
from pyro_kd.noise.laws import Draw, NoiseLaw
from pyro_kd.noise.samplers import sample_on, unwrapped
from pyro_kd.noise.tape import NoiseTape
from pyro_kd.sites.classification import compared_sites, observed_inputs
from pyro_kd.utils.pyro_internals import Subsample
from pyro_kd.utils.tensors import same_values

__all__ = ["check_draw"]

_MOST_WRONG = 1e-3
"""Which share of a value may differ from what the noise makes: another machine rounds differently."""


def check_draw(draw: TeacherDraw) -> None:
    """Raise ValueError where a draw is none, with the site that is wrong."""
    args, kwargs, runs = draw.unpacked
    _require(type(args) is tuple and type(kwargs) is dict and all(type(name) is str for name in kwargs), "arguments")
    _require(type(runs) is list and len(runs) == 1 and isinstance(runs[0], KeptRun), "the teacher's run")
    run = runs[0]
    _check_types(run)
    for site in run.nodes:
        try:
            _check_site(site, run)
        except ValueError as error:
            raise ValueError(f"site {site.name!r}: {error}") from error
        except Exception as error:  # whatever a distribution raises on parameters that do not fit
            raise ValueError(f"site {site.name!r} cannot be evaluated ({type(error).__name__}: {error})") from error
    _check_roles(run)


def _check_types(run: KeptRun) -> None:
    _require(type(run.nodes) is list and all(isinstance(site, KeptSite) for site in run.nodes), "sites")
    names = [site.name for site in run.nodes]
    _require(all(type(name) is str for name in names) and len(set(names)) == len(names), "names of sites")
    _require(run.params == {} and isinstance(run.noise, KeptNoise), "noise")
    for listed in (run.targets, run.compared, list(run.noise.sites), list(run.observed)):
        _require(type(listed) is list and set(listed) <= set(names) and len(set(listed)) == len(listed), "names of sites")
    _require(set(run.targets) <= set(run.compared), "targets")
    _require(type(run.keeps_data) is bool and run.noise.is_seeded in (True, False) and run.noise.lost == [], "noise")
    for record in (run.noise.sites, run.noise.between):
        _require(type(record) is dict and all(type(name) is str for name in record), "noise")
        for parts in (parts for draws in record.values() for parts in draws):
            _require(type(parts) is tuple and len(parts) == 4, "noise")
            law, noise, *texts = parts
            _require(law in _LAWS and isinstance(noise, Tensor) and all(type(text) is str for text in texts), "noise")
    for observed in run.observed.values():
        _require(type(observed) is tuple and len(observed) == 3, "observed values")
        value, fn, plates = observed
        _require(isinstance(value, _PLAIN) and isinstance(fn, PyroDistribution), "observed values")
        _check_plates(plates)


def _check_roles(run: KeptRun) -> None:
    """Every site that a loss compares is among those that are compared, and inputs are what the teacher observed."""
    found = taught(run, frozenset(run.targets), run.keeps_data)
    expected = compared_sites(found.trace, found.finder.names)
    covered = {site.name for site in run.nodes if isinstance(unwrapped(site.fn), dist.Delta)}  # by an auxiliary draw
    _require(set(run.compared) <= set(expected) and set(expected) - set(run.compared) <= covered, "what is compared")
    for name, value in observed_inputs(found.trace).items():
        observed = run.observed[name][0] if name in run.observed else None
        same = value is observed or (
            isinstance(value, Tensor) and isinstance(observed, Tensor) and same_values(value, observed)
        )
        _require(same, f"the observed value of site {name!r}")


_LAWS = frozenset(law.value for law in NoiseLaw)
_PLAIN = (Tensor, int, float, bool, list, type(None))


def _check_plates(plates: Any) -> None:
    _require(type(plates) is tuple, "plates")
    for plate in plates:
        _require(type(plate) is tuple and len(plate) == 5 and type(plate[0]) is str, "plates")
        _, dim, size, counter, full = plate
        _require(dim is None or (type(dim) is int and dim < 0), "plates")
        _require(all(type(number) is int and number >= 0 for number in (size, counter)), "plates")
        _require(full is None or (type(full) is int and full >= 0), "plates")


def _check_site(site: KeptSite, run: KeptRun) -> None:
    _require(isinstance(site.fn, PyroDistribution), "its distribution")
    _require(type(site.is_observed) is bool and type(site.infer) is dict, "its flags")
    is_mask = isinstance(site.mask, Tensor) and site.mask.dtype is torch.bool
    _require(site.mask is None or isinstance(site.mask, bool) or is_mask, "its mask")
    _require(isinstance(site.scale, int | float | Tensor) and not isinstance(site.scale, bool), "its scale")
    _check_plates(site.plates)
    if isinstance(site.fn, Subsample):
        _require(type(site.fn.size) is int, "its plate")
        return
    for tensor in (part for part in (site.mask, site.scale) if isinstance(part, Tensor)):
        torch.broadcast_shapes(tensor.shape, site.fn.batch_shape)
    _check_parameters(site.fn)
    with suppress(NotImplementedError):
        assert site.fn.support is not None  # which losses ask for at every site
    if not isinstance(site.value, Tensor):
        _require(site.is_observed, "its value")
        return
    if site.is_observed:
        torch.broadcast_shapes(site.value.shape, site.fn.shape())
        return
    _require(site.value.shape == site.fn.shape(), "the shape of its value")
    draws = [Draw(NoiseLaw(law), noise, op, where) for law, noise, op, where in run.noise.sites.get(site.name, ())]
    if draws:
        _check_value(site, draws)
    elif site.name in run.targets:
        _check_target(site)


def _check_parameters(fn: Any) -> None:
    """The parameters of a distribution, and of those inside it, are within their constraints."""
    for part in _inside(fn):
        if isinstance(part, torch.distributions.Independent):
            _require(type(part.reinterpreted_batch_ndims) is int, "the dimensions of its distribution")
        batch, event = part.batch_shape, part.event_shape
        _require(isinstance(batch, torch.Size) and isinstance(event, torch.Size), "the shapes of its distribution")
        mask = vars(part).get("_mask", False)
        _require(
            isinstance(mask, bool) or (isinstance(mask, Tensor) and mask.dtype is torch.bool), "a mask in its distribution"
        )
        for name, constraint in getattr(part, "arg_constraints", {}).items():
            value = vars(part).get(name)
            if isinstance(value, Tensor) and not is_dependent(constraint):
                _require(bool(constraint.check(value).all()), f"its parameter {name!r}")


def _inside(fn: Any) -> Iterable[Any]:
    yield fn
    for part in vars(fn).values():
        for item in part if type(part) in (list, tuple) else (part,):
            if isinstance(item, Distribution):
                yield from _inside(item)


def _check_value(site: KeptSite, draws: list[Draw]) -> None:
    """The noise of a site makes its value."""
    tape = NoiseTape(draws, site.fn.batch_shape)
    with torch.no_grad():
        made = sample_on(tape, site.fn)
    same = isinstance(made, Tensor) and made.shape == site.value.shape and made.dtype == site.value.dtype
    _require(same and len(tape.draws) == len(draws), "the shape of its value")
    close = torch.isclose(made, site.value, rtol=1e-3, atol=1e-6, equal_nan=True)
    _require(int((~close).sum()) <= _MOST_WRONG * close.numel(), "its value, which is not what its noise makes")


def _check_target(site: KeptSite) -> None:
    """The value of a target has a density."""
    try:
        support = site.fn.support
    except NotImplementedError:
        support = None
    with torch.no_grad():
        if support is not None and not is_dependent(support):
            _require(bool(support.check(site.value).all()), "its value, which is outside of the support")
        try:
            density = site.fn.log_prob(site.value)
        except NotImplementedError:
            return
    _require(density.shape == site.fn.batch_shape, "the shape of its density")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is not as a teacher's run leaves it")

"""The families of Pyro that need an explicit map from noise to value, or have none.

Each map is written in torch operations that the tape replays (see :mod:`pyro_kd.samplers`). Families that are not here are
sampled by their own ``rsample`` or ``sample``.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_kd.noise import Kind
from pyro_kd.samplers import DIRECT, refuse_sampler, register_sampler
from pyro_kd.tape import NoiseTape

__all__: list[str] = []


def _keep_inside(value: Tensor, low: float, high: float) -> Tensor:
    """Clamp the value without touching its derivative, as torch's Gamma does."""
    detached = value.detach()
    return value + (detached.clamp(low, high) - detached)


@register_sampler(torch.distributions.Dirichlet)
def _sample_dirichlet(fn: Any, sample_shape: torch.Size) -> Tensor:
    # Normalised gammas, in the logarithm: Gamma(a) = Gamma(a + 1) U^(1/a) neither underflows for small a nor has an
    # ill-conditioned derivative (Marsaglia and Tsang 2000, section 6).
    concentration = fn.concentration.expand(fn._extended_shape(sample_shape))
    exponential = torch.empty_like(concentration, requires_grad=False).exponential_()
    log_gamma = torch._standard_gamma(concentration + 1).log() - exponential / concentration
    finfo = torch.finfo(concentration.dtype)
    return _keep_inside(log_gamma.softmax(-1), finfo.tiny, 1 - finfo.eps / 2)


@register_sampler(torch.distributions.Wishart)
def _sample_wishart(fn: Any, sample_shape: torch.Size) -> Tensor:
    return fn._bartlett_sampling(sample_shape)  # torch's rsample adds a loop that draws singular matrices again


@register_sampler(dist.OMTMultivariateNormal)
@register_sampler(dist.AVFMultivariateNormal)
def _sample_multivariate_normal(fn: Any, sample_shape: torch.Size) -> Tensor:
    return torch.distributions.MultivariateNormal.rsample(fn, sample_shape)


@register_sampler(dist.MixtureOfDiagNormals)
def _sample_mixture_of_diag_normals(fn: Any, sample_shape: torch.Size) -> Tensor:
    return _of_component(fn, sample_shape, fn.locs, fn.coord_scale)


@register_sampler(dist.MixtureOfDiagNormalsSharedCovariance)
def _sample_mixture_with_shared_covariance(fn: Any, sample_shape: torch.Size) -> Tensor:
    return _of_component(fn, sample_shape, fn.locs, fn.coord_scale.unsqueeze(-2).expand_as(fn.locs))


@register_sampler(dist.GaussianScaleMixture)
def _sample_gaussian_scale_mixture(fn: Any, sample_shape: torch.Size) -> Tensor:
    scales = fn.coord_scale * fn.component_scale.unsqueeze(-1)
    return _of_component(fn, sample_shape, torch.zeros_like(scales), scales)


def _of_component(fn: Any, sample_shape: torch.Size, locs: Tensor, scales: Tensor) -> Tensor:
    """Draw a component, which passes no gradient, and then its Gaussian. ``locs``: batch_shape + (components, dim)."""
    which = fn.categorical.sample(sample_shape)
    index = which[..., None, None].expand(*which.shape, 1, fn.dim)
    loc, scale = (x.expand(*sample_shape, *x.shape).gather(-2, index).squeeze(-2) for x in (locs, scales))
    return loc + scale * torch.empty_like(loc, requires_grad=False).normal_()


_PROPOSALS = 32  # the rejection samplers below accept at least 0.65 of them: none of 32 fits once in 4e14 draws


@register_sampler(torch.distributions.VonMises)
def _sample_von_mises(fn: Any, sample_shape: torch.Size) -> Tensor:
    # Best and Fisher (1979) accept 0.66 of their proposals or more: so many at once, and the first that fits.
    shape = fn._extended_shape(sample_shape)
    concentration, r = fn._concentration, fn._proposal_r
    u1, u2, u3 = torch.rand((3, _PROPOSALS, *shape), dtype=concentration.dtype, device=concentration.device).unbind()
    z = torch.cos(math.pi * u1)
    f = (1 + r * z) / (r + z)
    c = concentration * (r - f)
    accept = (c * (2 - c) - u2 > 0) | ((c / u2).log() + 1 - c >= 0)
    angle = (u3 - 0.5).sign() * f.clamp(-1, 1).acos()
    first = accept.to(torch.uint8).argmax(0, keepdim=True)
    angle = angle.gather(0, first).squeeze(0)
    return ((angle + math.pi + fn._loc) % (2 * math.pi) - math.pi).to(fn.loc.dtype)


# The two commonest families without the cost of a dispatch mode: the same draws and the same arithmetic as theirs on the
# tape, which tests/test_samplers.py holds bit for bit.


def _draw_normal(fn: Any, tape: NoiseTape) -> Tensor:
    loc = fn.loc
    eps = tape.draw(Kind.NORMAL, loc.shape, loc.dtype, loc.device, op="normal_")
    return loc + eps * fn.scale


def _draw_bernoulli(fn: Any, tape: NoiseTape) -> Tensor:
    probs = fn.probs.detach()
    return (tape.draw(Kind.UNIFORM, probs.shape, torch.float64, probs.device, op="bernoulli") < probs).to(probs.dtype)


DIRECT.update({dist.Normal: _draw_normal, dist.Bernoulli: _draw_bernoulli})

_REJECTS = "rejects proposals until one fits, which is no function of a fixed number of draws"
_WALKS = "draws by a random walk whose length depends on what was drawn"

_family: type[Distribution]
for _family in (
    dist.SineBivariateVonMises,
    dist.Rejector,
):
    refuse_sampler(_family, _REJECTS)
for _family in (dist.SpanningTree, dist.OneOneMatching, dist.OneTwoMatching):
    refuse_sampler(_family, _WALKS)
for _family in (dist.VonMises3D, dist.LogNormalNegativeBinomial, dist.ImproperUniform):
    refuse_sampler(_family, "has no sampler in Pyro")

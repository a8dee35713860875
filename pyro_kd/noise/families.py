"""The families of Pyro that need an explicit map from noise to value.

Each map is written in torch operations that the tape replays (see :mod:`pyro_kd.noise.samplers`). All other families are sampled by
their own ``rsample`` or ``sample``.
"""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.relaxed_straight_through import QuantizeBernoulli, QuantizeCategorical
from pyro.distributions.spanning_tree import make_complete_graph
from torch import Tensor
from torch.distributions import TransformedDistribution
from torch.distributions.utils import clamp_probs

from pyro_kd.noise.borders import clamped, keep_inside, log_height_of, with_log, with_log_height, with_preimage
from pyro_kd.noise.laws import NoiseLaw
from pyro_kd.noise.samplers import DIRECT, register_sampler, replayable
from pyro_kd.noise.tape import NoiseTape
from pyro_kd.utils import guards
from pyro_kd.utils.torch_internals import standard_gamma

__all__: list[str] = []


@register_sampler(torch.distributions.Dirichlet)
def _sample_dirichlet(fn: Any, sample_shape: torch.Size) -> Tensor:
    # Normalised gammas, in the logarithm: Gamma(a) = Gamma(a + 1) U^(1/a) neither underflows for small a nor has an
    # ill-conditioned derivative (Marsaglia and Tsang 2000, section 6).
    log = _log_dirichlet(fn.concentration.expand(fn._extended_shape(sample_shape)))
    return with_log(keep_inside(log.exp(), fn), log)


@register_sampler(torch.distributions.Beta)
def _sample_beta(fn: Any, sample_shape: torch.Size) -> Tensor:
    concentration = fn._dirichlet.concentration
    log, log1m = _log_dirichlet(concentration.expand(*sample_shape, *concentration.shape)).unbind(-1)
    height = torch.where(log1m < -1, log_height_of(log1m.clamp(max=-1)), (-log.clamp(max=-0.1)).log())
    return with_log_height(keep_inside(log.exp(), fn), height)


def _log_dirichlet(concentration: Tensor) -> Tensor:
    exponential = torch.empty_like(concentration, requires_grad=False).exponential_()
    log_gamma = standard_gamma(concentration + 1).log() - exponential / concentration
    return log_gamma.log_softmax(-1)


@register_sampler(torch.distributions.Uniform)
def _sample_uniform(fn: Any, sample_shape: torch.Size) -> Tensor:
    low, high = fn.low, fn.high
    value = low + torch.rand(fn._extended_shape(sample_shape), dtype=low.dtype, device=low.device) * (high - low)
    top = high.detach()
    if torch.compiler.is_exporting():  # without nextafter, which exported graphs lack
        return clamped(value, low.detach(), torch.maximum(top - torch.finfo(top.dtype).eps * top.abs(), low.detach()))
    return clamped(value, low.detach(), torch.nextafter(top, low.detach()))


@register_sampler(torch.distributions.Kumaraswamy)
def _sample_kumaraswamy(fn: Any, sample_shape: torch.Size) -> Tensor:
    # 1 - (1 - x^a)^b = u, by the logarithm of -log x, which does not round to 0 or 1.
    a, b = fn.concentration1, fn.concentration0
    u = torch.rand(fn._extended_shape(sample_shape), dtype=a.dtype, device=a.device)
    height = log_height_of(torch.log1p(-u) / b) - a.log()
    log = -height.exp()
    finfo = torch.finfo(log.dtype)
    low = finfo.eps ** (1 / a.detach())  # 1 - low^a is below 1, for torch's own density
    return with_log_height(clamped(log.exp(), low.clamp(min=finfo.tiny), log.new_tensor(1 - finfo.eps / 2)), height)


@register_sampler(torch.distributions.Pareto)
def _sample_pareto(fn: Any, sample_shape: torch.Size) -> Tensor:
    value = TransformedDistribution.rsample(fn, sample_shape)
    return clamped(value, fn.scale.detach(), value.new_tensor(torch.finfo(value.dtype).max))


@register_sampler(torch.distributions.relaxed_categorical.ExpRelaxedCategorical)
def _sample_log_relaxed_categorical(fn: Any, sample_shape: torch.Size) -> Tensor:
    # As in torch, but normalised by log_softmax, so that the exponentials sum to 1 at low temperatures too.
    u = clamp_probs(torch.rand(fn._extended_shape(sample_shape), dtype=fn.logits.dtype, device=fn.logits.device))
    return ((fn.logits - (-u.log()).log()) / fn.temperature).log_softmax(-1)


@register_sampler(dist.RelaxedOneHotCategoricalStraightThrough)
def _sample_one_hot(fn: Any, sample_shape: torch.Size) -> Tensor:
    return _quantized(fn, sample_shape, QuantizeCategorical)


@register_sampler(dist.RelaxedBernoulliStraightThrough)
def _sample_bit(fn: Any, sample_shape: torch.Size) -> Tensor:
    return _quantized(fn, sample_shape, QuantizeBernoulli)


def _quantized(fn: Any, sample_shape: torch.Size, quantize: Any) -> Tensor:
    """The hard value, which passes on gradients and carries the relaxed one, inside of its support, for the density."""
    relaxed = replayable(fn.base_dist).rsample(sample_shape)
    for transform in fn.transforms:
        relaxed = with_preimage(transform(relaxed), relaxed)
    relaxed = keep_inside(relaxed, fn)
    hard: Tensor = quantize.apply(relaxed)
    hard._unquantize = relaxed  # type: ignore[attr-defined]
    return hard


@register_sampler(torch.distributions.Wishart)
def _sample_wishart(fn: Any, sample_shape: torch.Size) -> Tensor:
    return fn._bartlett_sampling(sample_shape)  # torch's rsample adds a loop that replaces singular matrices


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
    """Draw a component, which passes on no gradient, and then from its Gaussian.

    Args:
        fn: the mixture.
        sample_shape: of the draw.
        locs, scales: of the Gaussians, of shape ``batch_shape + (components, dim)``.
    """
    which = fn.categorical.sample(sample_shape)
    index = which[..., None, None].expand(*which.shape, 1, fn.dim)
    loc, scale = (x.expand(*sample_shape, *x.shape).gather(-2, index).squeeze(-2) for x in (locs, scales))
    return loc + scale * torch.empty_like(loc, requires_grad=False).normal_()


# Rejection samplers draw again for what is still missing, so the place of a draw in the noise depends on its neighbours. The two
# below make many proposals for each value at once and take the first that fits.

_PROPOSALS = 32


@register_sampler(torch.distributions.VonMises)
def _sample_von_mises(fn: Any, sample_shape: torch.Size) -> Tensor:
    # Best and Fisher (1979) accept at least 0.66 of their proposals: once in 1e15 draws, none of 32 fits.
    shape = fn._extended_shape(sample_shape)
    concentration, r = fn._concentration, fn._proposal_r
    u1, u2, u3 = torch.rand((3, _PROPOSALS, *shape), dtype=concentration.dtype, device=concentration.device).unbind()
    z = torch.cos(math.pi * u1)
    f = (1 + r * z) / (r + z)
    c = concentration * (r - f)
    accept = (c * (2 - c) - u2 > 0) | ((c / u2).log() + 1 - c >= 0)
    angle, _ = _first(accept, (u3 - 0.5).sign() * f.clamp(-1, 1).acos())
    return _wrap(angle + fn._loc).to(fn.loc.dtype)


@register_sampler(dist.SineBivariateVonMises)
def _sample_sine_bivariate_von_mises(fn: Any, sample_shape: torch.Size) -> Tensor:
    # Kent, Ganeiber and Mardia (2018): the first angle by rejection from an angular central Gaussian, whose parameter b Pyro
    # finds; given it, the second is von Mises. Pyro's own sampler confuses coordinates: its draws do not have its density.
    shape = sample_shape + fn.batch_shape
    conc1, conc2, corr = fn.phi_concentration, fn.psi_concentration, fn.correlation
    eig = 0.5 * (conc1 - corr**2 / conc2)
    low = eig.clamp(max=0)
    eig = torch.stack([-low, eig - low])
    b = fn._bfind(eig)
    eig = eig.reshape(2, *[1] * (1 + len(sample_shape)), *fn.batch_shape)
    log_f_max = torch.special.i0e(conc2).log() + conc2
    phi, done = corr.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=corr.device)
    while not guards.holds(done, "every angle is accepted"):
        x = torch.randn((2, _PROPOSALS, *shape), dtype=corr.dtype, device=corr.device) / (1 + 2 * eig / b).sqrt()
        x = x / x.norm(dim=0)
        alpha = (conc2**2 + (corr * x[1]) ** 2).sqrt()
        log_f = conc1 * (x[0] - 1) + low + torch.special.i0e(alpha).log() + alpha - log_f_max
        log_g = (b / 2 + (eig * x**2).sum(0)).log() + 1 - b / 2
        accept = torch.rand_like(log_f) < (log_f + log_g).exp()
        first, fits = _first(accept, torch.atan2(x[1], x[0]))
        phi, done = torch.where(done, phi, first), done | fits
    alpha = (conc2**2 + (corr * phi.sin()) ** 2).sqrt()
    beta = (corr / conc2 * phi.sin()).atan()
    psi = _sample_von_mises(dist.VonMises(beta, alpha), torch.Size())
    return torch.stack([_wrap(phi + fn.phi_loc), _wrap(psi + fn.psi_loc)], -1)


def _first(accept: Tensor, proposals: Tensor) -> tuple[Tensor, Tensor]:
    """The first accepted proposal along the first dimension, and whether there is one."""
    index = accept.to(torch.uint8).argmax(0, keepdim=True)
    return proposals.gather(0, index).squeeze(0), accept.any(0)


def _wrap(angle: Tensor) -> Tensor:
    return (angle + math.pi) % (2 * math.pi) - math.pi


@register_sampler(dist.SpanningTree)
def _sample_spanning_tree(fn: Any, sample_shape: torch.Size) -> Tensor:
    # Exact, whereas Pyro's own sampler takes a few steps of a Markov chain. Edge by edge: an edge is in the tree with probability
    # weight times effective resistance, in the graph with the edges before it contracted or deleted (Kirchhoff 1847).
    if sample_shape:
        return torch.stack([_sample_spanning_tree(fn, sample_shape[1:]) for _ in range(sample_shape[0])])
    weight = (fn.edge_logits.double() - fn.edge_logits.max()).exp()
    ends = make_complete_graph(fn.num_vertices).to(weight.device)
    part = torch.arange(fn.num_vertices, device=weight.device)  # the vertices that the tree so far connects
    uniform, tree = torch.rand(weight.shape, dtype=torch.float64, device=weight.device), []
    for edge in range(len(weight)):
        one, two = part[ends[:, edge]].tolist()
        if one == two:
            continue
        adjacency = weight.new_zeros(fn.num_vertices, fn.num_vertices)
        adjacency.index_put_((part[ends[0, edge:]], part[ends[1, edge:]]), weight[edge:], accumulate=True)
        laplacian = torch.diag((adjacency + adjacency.T).sum(0)) - adjacency - adjacency.T
        rest = [p for p in part.unique().tolist() if p != two]
        resistance = torch.linalg.inv(laplacian[rest][:, rest])[rest.index(one), rest.index(one)]
        if guards.holds(uniform[edge] < weight[edge] * resistance + 1e-12, "an edge is in the tree"):
            tree.append(edge)
            part = torch.where(part == one, two, part)
        else:
            weight[edge] = 0
    return ends[:, tree].T


# The two most common families without the cost of a dispatch mode, with the same draws and the same arithmetic as on the tape.
# tests/noise/test_users_samplers.py compares them bit for bit.


def _draw_normal(fn: Any, tape: NoiseTape) -> Tensor:
    loc = fn.loc
    eps = tape.draw(NoiseLaw.NORMAL, loc.shape, loc.dtype, loc.device, op="normal_")
    return loc + eps * fn.scale


def _draw_bernoulli(fn: Any, tape: NoiseTape) -> Tensor:
    probs = fn.probs.detach()
    return (tape.draw(NoiseLaw.UNIFORM, probs.shape, torch.float64, probs.device, op="bernoulli") < probs).to(probs.dtype)


DIRECT.update({dist.Normal: _draw_normal, dist.Bernoulli: _draw_bernoulli})

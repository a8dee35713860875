r"""The KL divergence between Gaussians over vectors, in float64 and without cancellation.

.. math:: KL(p \,\|\, q) = \tfrac12 \left( \mathrm{tr}(\Sigma_q^{-1} \Sigma_p) + \|\mu_p - \mu_q\|^2_{\Sigma_q^{-1}} - d
          + \ln\det\Sigma_q - \ln\det\Sigma_p \right)

A covariance is given by standard deviations, by a triangular factor, or by both standard deviations and a factor of low rank. Part of
:mod:`pyro_kd.divergences.closed_forms`.
"""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions import Independent

from pyro_kd.divergences.special import common_dtype

__all__ = ["gaussian_kl"]

_Gaussian = tuple[Tensor, Tensor | None, Tensor | None]
"""Mean; standard deviations or None; a triangular factor, or one of low rank beside standard deviations, or None."""


def gaussian_kl(p: Any, q: Any) -> Tensor | None:
    """KL(p || q) of shape ``batch_shape``; None unless both are Gaussians over vectors of one size."""
    first, second = _gaussian(p), _gaussian(q)
    if first is None or second is None or p.event_shape != q.event_shape:
        return None
    return _kl(first, second)


def _gaussian(fn: Any) -> _Gaussian | None:
    if isinstance(fn, td.MultivariateNormal):
        return fn.loc, None, fn._unbroadcasted_scale_tril.double()
    if isinstance(fn, td.LowRankMultivariateNormal):
        return fn.loc, fn._unbroadcasted_cov_diag.double().sqrt(), fn._unbroadcasted_cov_factor.double()
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims == 1 and type(fn.base_dist) in (dist.Normal, td.Normal):
        return fn.base_dist.loc, fn.base_dist.scale.double(), None
    return None


def _kl(p: _Gaussian, q: _Gaussian) -> Tensor:
    (loc_p, std_p, factor_p), (loc_q, std_q, factor_q) = p, q
    squares = _whitened_square((loc_p.double() - loc_q.double()).unsqueeze(-1), std_q, factor_q)
    for part in (std_p, factor_p):
        if part is not None:
            squares = squares + _whitened_square(part, std_q, factor_q, is_diagonal=part is std_p)
    value = 0.5 * (squares - loc_p.shape[-1] + _log_det(std_q, factor_q) - _log_det(std_p, factor_p))
    # Of equal laws, the squares of a whitened factor do not sum to exactly the dimension.
    rounding = torch.where(_are_equal(p, q), value.detach(), 0)
    return (value - rounding).to(common_dtype(loc_p, loc_q))


def _are_equal(p: _Gaussian, q: _Gaussian) -> Tensor:
    """Where two Gaussians have the same parameters, of shape ``batch_shape``."""
    equal = (p[0] == q[0]).all(-1)
    for first, second, dims in ((p[1], q[1], (-1,)), (p[2], q[2], (-2, -1))):
        if first is None or second is None:
            equal = equal & (first is second)
        else:
            equal = equal & ((first == second).all(dims) if first.shape[-1] == second.shape[-1] else False)
    return equal


def _whitened_square(part: Tensor, std: Tensor | None, factor: Tensor | None, is_diagonal: bool = False) -> Tensor:
    r"""Trace of :math:`X^T \Sigma^{-1} X` for a matrix X, or the diagonal of one."""
    if std is None:
        assert factor is not None
        return _solved_square(factor, part.diag_embed() if is_diagonal else part)
    scaled = part / (std if is_diagonal else std.unsqueeze(-1))
    if factor is None:
        return scaled.square().sum(-1) if is_diagonal else scaled.square().sum((-2, -1))
    # With V = factor / std and [V; 1] = [Q; P] R, (1 + V V')^-1 is 1 - Q Q', and Q'Q + P'P = 1: squares, which do not cancel.
    upper, lower, _ = _orthogonal(std, factor)
    if is_diagonal:
        return (scaled.square() * (1 - upper.square().sum(-1))).sum(-1)
    inner = upper.mT @ scaled
    return (scaled - upper @ inner).square().sum((-2, -1)) + (lower @ inner).square().sum((-2, -1))


def _orthogonal(std: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    size, rank = factor.shape[-2:]
    scaled = factor / std.unsqueeze(-1)
    one = torch.eye(rank, dtype=factor.dtype, device=factor.device).expand(*scaled.shape[:-2], rank, rank)
    q, r = torch.linalg.qr(torch.cat([scaled, one], -2))
    return q[..., :size, :], q[..., size:, :], r


def _solved_square(triangular: Tensor, right: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(triangular.shape[:-2], right.shape[:-2])
    triangular, right = (x.expand(*batch, *x.shape[-2:]) for x in (triangular, right))
    return torch.linalg.solve_triangular(triangular, right, upper=False).square().sum((-2, -1))


def _log_det(std: Tensor | None, factor: Tensor | None) -> Tensor:
    """The log determinant of the covariance."""
    if std is None:
        assert factor is not None
        return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    value = 2 * std.log().sum(-1)
    if factor is None:
        return value
    return value + 2 * _orthogonal(std, factor)[2].diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)
